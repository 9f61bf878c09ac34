"""How far is sparse attention from reading its scattered keys, and from torch's gathers, in one and the same run?"""

from __future__ import annotations

import itertools

import click

from specattn_bench import answer, ceilings, modelled_report, options, tables
from specattn_bench.answer import Question
from specattn_bench.measured import require_plans
from specattn_bench.options import Common
from specattn_bench.sparse_measured import ALL_KEYS, measure_case
from specattn_bench.sparse_series import SELECTIONS, Asked, Case
from specattn_bench.standing import Beside
from specattn_codegen.errors import SpecError
from specattn_codegen.spec import Dtype

HELP = """Times sparse attention on this CPU beside verification and torch's gathers, or models it on a GPU.

Measured, without --gpu: one request over a paged cache of shuffled pages, selections drawn at random, one for each KV
head or one for the layer, of tokens or of pages of 16 keys; the rows' own keys are a dense tail. Each series is proved
against the float64 oracle, then all series of a case take turns over selections of which no two share a key. Two
ceilings are measured before and after: reading memory in order, and reading rows of as many bytes as lie together at
random places. Peers gather the same keys out of contiguous caches and then attend to them:

\b
  gather, indexing, index_select      torch's three ways to gather
  heads first, keys first             the layouts [Hkv, N, D] and [N, Hkv, D]
  K and V side by side                keys first, both in one row
  SDPA, matmuls                       torch's fused attention; product, softmax, product

\b
Examples:
  specattn-bench sparse
  specattn-bench sparse --dtype bfloat16 --rows 1 --selection per-head --block 1 --seconds 30
  specattn-bench sparse --plan key_tile=64 --budget 4096 --json trial.json --plot trial.png
  specattn-bench sparse --gpu h100
"""
BESIDES = (
    Beside(
        key="times_best_peer",
        column="x gather",
        said="torch's fastest gather and attention",
        others=lambda one: one.kind == "peer",
    ),
    Beside(
        key="times_all_keys",
        column="x all keys",
        said="verifying every key",
        others=lambda one: one.name == ALL_KEYS,
    ),
)
LEGEND = (
    "of gather: of the ceiling of scattered rows. x gather: times as fast as torch's fastest way to gather and attend.",
    "x all keys: as verification, which reads every key.",
)


@click.command("sparse", help=HELP, short_help="Sparse attention over selected keys.")
@options.shared
@click.option("--keys", default=32768, show_default=True, type=click.IntRange(min=64), help="Keys of the request.")
@click.option("--budget", default=2048, show_default=True, type=click.IntRange(min=16), help="Selected keys of a head.")
@click.option("--rows", multiple=True, type=click.IntRange(min=1), help="May be repeated.  [default: 1, 5]")
@click.option(
    "--selection",
    "selections",
    multiple=True,
    type=click.Choice(list(SELECTIONS)),
    help="May be repeated.  [default: both]",
)
@click.option(
    "--block", "blocks", multiple=True, type=click.IntRange(min=1), help="Keys an index names.  [default: 1, 16]"
)
def command(
    common: Common,
    keys: int,
    budget: int,
    rows: tuple[int, ...],
    selections: tuple[str, ...],
    blocks: tuple[int, ...],
) -> None:
    asked = Asked(
        heads=common.heads,
        cases=tuple(
            Case(dtype=dtype, rows=count, keys=keys, budget=budget, selection=selection, block=block)
            for dtype, count, selection, block in itertools.product(
                common.dtypes or default_dtypes(common), rows or (1, 5), selections or SELECTIONS, blocks or (1, 16)
            )
        ),
        page_size=common.page_size,
        plans=common.plans,
    )
    require_sizes(asked.cases)
    title = f"{common.heads.name}, {budget:,} of {keys:,} keys"
    settings = {"heads": common.heads.name, "page_size": common.page_size, **tables.source_facts(common.plans)}
    if common.gpus:
        modelled_report.answer("sparse", common, asked.for_gpus(), title.partition(", ")[2], settings)
        return
    places = common.here("sparse")
    arch = places.arch
    require_plans(asked.kernels(), arch, asked.plans)
    dtypes: list[Dtype] = list(dict.fromkeys(case.dtype for case in asked.cases))
    scattered = [asked.row_bytes(case) for case in asked.cases]
    answer.measure(
        Question(
            name="sparse",
            title=title,
            settings={**settings, "seconds_a_case": common.seconds},
            besides=BESIDES,
            legend=LEGEND,
        ),
        asked.cases,
        lambda case: measure_case(asked, case, arch, common.seconds),
        lambda: ceilings.measure(arch, dtypes, scattered),
        places,
    )


def default_dtypes(common: Common) -> tuple[Dtype, ...]:
    return ("bfloat16",) if common.gpus else ("float32", "bfloat16")


def require_sizes(cases: tuple[Case, ...]) -> None:
    """Raises SpecError."""
    for case in cases:
        if case.budget + case.rows + case.block > case.keys:
            raise SpecError(f"--budget {case.budget}: must leave room in --keys {case.keys} for the rows and a block")
        if case.budget % case.block or case.keys % case.block:
            raise SpecError(f"--block {case.block}: must divide --budget {case.budget} and --keys {case.keys}")
