"""Verification attention against the oracle over every pair of what a caller may choose: 24 kernels by 7 problems.

A kernel fixes head dims, group, dtypes, features and score definition; page size, layout and rows are run-time
arguments on the CPU, so every kernel meets each of their values. The 24 kernels are 8 head dims by 3 rows of an
orthogonal array: any two of its columns hold each of their 9 pairs, and each head dim every value of a column.
Sparse attention, which loads and multiplies tiles of keys by the same source, has one kernel for every head dim.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_args

import pytest

from cases import kernel_for, verdict
from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.problems import Layout, attention_problem
from specattn_codegen.spec import DTYPES, FLOAT8, KernelSpec, ScoreGranularity, ScoreHeads, ScoreRows, ScoreSpec

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256)
GROUPS = {"few": (1, 2, 3), "some": (4, 5, 6, 7, 8), "many": (9, 10, 11, 12, 13, 14, 15, 16)}  # packed rows a query
PAGE_SIZES = (1, 8, 16, 32, 64, 128, 880)
ROWS = (*range(1, 17), 33)
LAYOUTS = get_args(Layout)
WEIGHTS = {"exact": {}, "reference": {"normaliser": "reference"}, "logit": {"value": "logit"}}

CHOICES: dict[str, tuple[Any, ...]] = {
    "band": tuple(GROUPS),
    "values": ("as wide as keys", "half as wide", "half as wide again"),
    "dtype": DTYPES,
    "kv_dtype": (None, *FLOAT8),
    "rows": get_args(ScoreRows),
    "weights": tuple(WEIGHTS),
    "granularity": get_args(ScoreGranularity),
}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "heads": get_args(ScoreHeads),
    "softcap": (None, 15.0),
    "window": (None, 61),
    "sinks": (False, True),
}


def level(dim: int, third: int, column: int) -> int:
    """Entry of the orthogonal array of 27 rows, less 3: 0, 1 or 2 in row (dim, third)."""
    high, low = divmod(dim, 3)
    return (third + column // 3 * high + column % 3 * low) % 3


def chosen(dim: int, third: int) -> dict[str, Any]:
    """What one kernel is made of: a column of the array for each choice; switches share the last two columns."""
    row: dict[str, Any] = {"head_dim": HEAD_DIMS[dim]}
    for column, (name, values) in enumerate(CHOICES.items()):
        row[name] = values[level(dim, third, column)]
    for index, (name, values) in enumerate(SWITCHES.items()):
        alone = level(dim, third, len(CHOICES) + index % 2) == index // 2
        row[name] = values[alone ^ (dim >> index % 3 & 1)]  # flipped for half the dims, or two would exclude each other
    return row


ROWS_OF_KERNELS = [chosen(dim, third) for dim in range(8) for third in range(3)]


def group_of(kernel: int) -> int:
    band = ROWS_OF_KERNELS[kernel]["band"]
    earlier = sum(row["band"] == band for row in ROWS_OF_KERNELS[:kernel])
    return GROUPS[band][earlier % len(GROUPS[band])]


def spec_of(kernel: int) -> KernelSpec:
    row = ROWS_OF_KERNELS[kernel]
    dim = row["head_dim"]
    widths = dict(zip(CHOICES["values"], (dim, dim // 2, dim + dim // 2), strict=True))
    heads = HeadConfig(
        num_q_heads=2 * group_of(kernel),
        num_kv_heads=2,
        head_dim=dim,
        v_head_dim=widths[row["values"]],
        softcap=row["softcap"],
        window=row["window"],
        sinks=row["sinks"],
    )
    score = ScoreSpec(rows=row["rows"], heads=row["heads"], granularity=row["granularity"], **WEIGHTS[row["weights"]])
    return KernelSpec(op="verify_attention", heads=heads, dtype=row["dtype"], kv_dtype=row["kv_dtype"], score=score)


def problem_sizes(kernel: int, index: int) -> dict[str, Any]:
    """The problem of one page size: two or three requests of different rows, and one of padding."""
    page_size = PAGE_SIZES[index]
    q_lens = [rows for place, rows in enumerate(ROWS) if (place + kernel) % len(PAGE_SIZES) == index]
    prefixes = (0, 1, page_size - 1, page_size + 1, 300)
    return {
        "q_lens": [*q_lens, 1],
        "kv_lens": [*(rows + prefixes[(rows + kernel) % len(prefixes)] for rows in q_lens), 0],
        "page_size": page_size,
        "layout": LAYOUTS[(kernel + index) % len(LAYOUTS)],
        "seed": kernel,
    }


def values_met(kernel: int, index: int) -> dict[str, tuple[Any, ...]]:
    sizes = problem_sizes(kernel, index)
    fixed = {name: (value,) for name, value in ROWS_OF_KERNELS[kernel].items()}
    met = {"page_size": (sizes["page_size"],), "layout": (sizes["layout"],), "q_len": tuple(sizes["q_lens"][:-1])}
    return {**fixed, "group": (group_of(kernel),), **met}


def test_every_pair_of_values_occurs() -> None:
    """A group of 1 to 16 meets every page size, layout and number of rows; its band meets every other value too."""
    runs = [values_met(kernel, index) for kernel in range(24) for index in range(len(PAGE_SIZES))]
    domains = {**CHOICES, **SWITCHES, "head_dim": HEAD_DIMS, "page_size": PAGE_SIZES, "layout": LAYOUTS, "q_len": ROWS}
    domains["group"] = tuple(range(1, 17))
    for one, other in itertools.combinations(domains, 2):
        if "group" in (one, other) and not {one, other} & {"page_size", "layout", "q_len"}:
            continue
        met = {pair for run in runs for pair in itertools.product(run[one], run[other])}
        assert met >= set(itertools.product(domains[one], domains[other])), (one, other)


@pytest.mark.parametrize("kernel", range(24), ids=lambda kernel: f"{spec_of(kernel).heads.name}-{spec_of(kernel).name}")
def test_verification_equals_the_oracle(kernel: int) -> None:
    built = kernel_for(spec_of(kernel))
    for index in range(len(PAGE_SIZES)):
        sizes = problem_sizes(kernel, index)
        result = verdict(built, attention_problem(built.spec, **sizes))
        assert result.passed, (sizes, result.detail)


@pytest.mark.parametrize("dim", range(8), ids=lambda dim: f"d{HEAD_DIMS[dim]}")
def test_sparse_attention_equals_the_oracle(dim: int) -> None:
    """With a selection per layer and per KV head in turns, of keys and of blocks."""
    verify = spec_of(3 * dim + dim % 3)
    spec = dataclasses.replace(verify, op="sparse_attention", score=None, selection="layer" if dim % 2 else "kv_head")
    built = kernel_for(spec)
    for index, block in enumerate((1, 4, 16, 1, 4, 16, 1)):
        sizes = problem_sizes(dim, index)
        result = verdict(built, attention_problem(spec, **sizes, budget=160 // block, block=block))
        assert result.passed, (sizes, block, result.detail)
