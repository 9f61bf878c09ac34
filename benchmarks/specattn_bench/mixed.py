"""Is a batch that verifies and drafts in one launch as fast as in two, and how much faster than verifying it all?"""

from __future__ import annotations

import click

from specattn_bench import answer, ceilings, options, tables
from specattn_bench.answer import Question
from specattn_bench.measured import require_plans
from specattn_bench.mixed_measured import ALL_VERIFYING, APART, measure_case
from specattn_bench.mixed_series import Asked, Case
from specattn_bench.options import Common
from specattn_bench.standing import Beside
from specattn_codegen.errors import SpecError
from specattn_codegen.spec import Dtype

HELP = """Times mixed attention on this CPU beside the two launches it replaces, and beside verifying every request.

A batch of --requests, of which --verifying verify --rows rows over their whole cache, with the scores all-kv_head,
and the others draft one row over --budget selected keys for each KV head. Every series is proved against the float64
oracle, then all take turns on data no cache holds.

\b
  ours, one launch                  mixed_attention, told by a mode on the device
  two launches, verify and sparse   verify_attention for some, then sparse_attention for the others
  verifying every request           what a batch costs that cannot mix

\b
Examples:
  specattn-bench mixed
  specattn-bench mixed --requests 4 --verifying 2 --rows 7 --dtype bfloat16 --seconds 30
"""
BESIDES = (
    Beside(key="times_apart", column="x apart", said="two launches", others=lambda one: one.name == APART),
    Beside(
        key="times_all_verifying",
        column="x all",
        said="verifying every request",
        others=lambda one: one.name == ALL_VERIFYING,
    ),
)
LEGEND = ("x apart: times as fast as the two launches. x all: as verifying every request.",)


@click.command("mixed", help=HELP, short_help="Verifying and drafting requests in one launch.")
@options.shared
@click.option("--keys", default=32768, show_default=True, type=click.IntRange(min=64), help="Keys of each request.")
@click.option("--budget", default=2048, show_default=True, type=click.IntRange(min=1), help="Selected keys of a head.")
@click.option("--rows", default=5, show_default=True, type=click.IntRange(min=1), help="Of a verifying request.")
@click.option("--requests", default=8, show_default=True, type=click.IntRange(min=2), help="Of the batch.")
@click.option("--verifying", default=1, show_default=True, type=click.IntRange(min=1), help="Of the requests.")
def command(common: Common, keys: int, budget: int, rows: int, requests: int, verifying: int) -> None:
    if common.gpus:
        raise SpecError("--gpu: no cost model knows mixed batches; model verify and sparse, the launches they replace")
    if verifying >= requests:
        raise SpecError(f"--verifying {verifying}: must be fewer than --requests {requests}, so that some draft")
    if budget + rows > keys:
        raise SpecError(f"--budget {budget}: must leave room in --keys {keys} for the rows")
    dtypes: tuple[Dtype, ...] = common.dtypes or ("float32", "bfloat16")
    asked = Asked(
        heads=common.heads,
        cases=tuple(
            Case(dtype=dtype, requests=requests, verifying=verifying, rows=rows, keys=keys, budget=budget)
            for dtype in dtypes
        ),
        page_size=common.page_size,
        plans=common.plans,
    )
    places = common.here("mixed")
    arch = places.arch
    require_plans(asked.kernels(), arch, asked.plans)
    question = Question(
        name="mixed",
        title=f"{common.heads.name}, {keys:,} keys, drafts over {budget:,}",
        settings={
            "heads": common.heads.name,
            "page_size": common.page_size,
            **tables.source_facts(common.plans),
            "seconds_a_case": common.seconds,
        },
        besides=BESIDES,
        legend=LEGEND,
    )
    answer.measure(
        question,
        asked.cases,
        lambda case: measure_case(asked, case, arch, common.seconds),
        lambda: ceilings.measure(arch, dtypes),
        places,
    )
