"""What of a rendered file reaches a compiler, and what does not."""

from __future__ import annotations

import pytest

from specattn_codegen import space
from specattn_codegen.build.program import function_program, whole_program
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec
from specattn_codegen.tuning.jobs import render_for

TEXT = '''"""A file."""
import triton.language as tl

TILE = tl.constexpr(16)
LIMIT = tl.constexpr(2)  # of nothing
PLAIN = 3


def helper(x):
    """Adds."""
    return x + TILE


def kernel(pointer: "*fp32", n: "i32"):
    return helper(tl.load(pointer))  # reads


def other(x):
    return x * LIMIT
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [("A file", "Another"), ("of nothing", "of all"), ("Adds.", "Sums.\n\n    More."), ("\n\n\ndef", "\n\n\n\n\ndef")],
)
def test_comments_docstrings_and_blank_lines_are_no_part_of_a_program(old: str, new: str) -> None:
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    assert whole_program(changed) == whole_program(TEXT)
    assert function_program(changed, "kernel") == function_program(TEXT, "kernel")


@pytest.mark.parametrize(
    ("old", "new", "touched"),
    [
        ("constexpr(16)", "constexpr(32)", {"kernel"}),
        ("x + TILE", "x - TILE", {"kernel"}),
        ('"i32"', '"i64"', {"kernel"}),
        ("triton.language", "triton.other", {"kernel", "other"}),
        ("constexpr(2)", "constexpr(4)", {"other"}),
        ("PLAIN = 3", "PLAIN = 4", set[str]()),
    ],
)
def test_a_function_is_made_of_all_it_uses_and_of_nothing_else(old: str, new: str, touched: set[str]) -> None:
    changed = TEXT.replace(old, new)
    assert whole_program(changed) != whole_program(TEXT)
    for name in ("kernel", "other"):
        assert (function_program(changed, name) != function_program(TEXT, name)) == (name in touched)


def test_a_selection_is_one_program_for_all_heads_and_attention_is_not() -> None:
    arch = gpus.find("h100")
    few, many = (HeadConfig(num_q_heads=32, num_kv_heads=heads, head_dim=128) for heads in (4, 8))

    def program(heads: HeadConfig, op: str) -> str:
        is_selection = op == "select_kv"
        spec = KernelSpec(
            op=op,  # pyright: ignore[reportArgumentType]
            heads=heads,
            dtype="float32" if is_selection else "float16",
            page_size=0 if is_selection else 16,
            selection="kv_head" if is_selection else None,
        )
        return whole_program(render_for(spec, space.default_plan(spec, arch, "triton"), arch).text)

    assert program(few, "select_kv") == program(many, "select_kv")
    assert program(few, "verify_attention") != program(many, "verify_attention")
