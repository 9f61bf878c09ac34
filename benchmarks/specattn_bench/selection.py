"""How far is selection from reading its scores once, and from torch's top-k and sort, in one and the same run?"""

from __future__ import annotations

import click
import torch

from specattn_bench import answer, ceilings, modelled_report, options, tables
from specattn_bench.answer import Question
from specattn_bench.measured import require_plans
from specattn_bench.options import Common
from specattn_bench.selection_measured import measure_case
from specattn_bench.selection_peers import SORT
from specattn_bench.selection_series import BISECTED, RULES, VERIFY_ROWS, Asked, Case
from specattn_bench.standing import Beside
from specattn_codegen.errors import SpecError
from specattn_codegen.spec import Dtype

HELP = f"""Times select_kv on this CPU beside torch's top-k and sort, or models its top-k on a GPU.

Scores are heavy-tailed like attention's: float32, one row for every request and KV head. Rules: the 2,048 best keys;
the best 5 %; the fewest keys with 95 % of the mass; every key from a threshold on that a sixteenth reach; the best 128
pages of 16 keys. Every series is proved against the float64 oracle, then all series of a case take turns on scores no
cache holds, into the same outputs. The first size is also timed on one thread.

\b
  ours  from the scores                 alone
        from verification's histogram   which says where the best scores begin
        the smallest set                top-p as the rule has it
        bisection, {BISECTED} steps             the fixed halvings of arXiv 2510.27641, which take more keys
  peers torch.topk, sorted and not; torch.sort; for a mass also the sum along it, of all or of an eighth

Ours writes indices in ascending order, which a paged gather wants; peers leave theirs in the order of the scores.
Selection over --layers layers in one call stands beside verifying those layers, {VERIFY_ROWS} rows with scores, once
for every --dtype of the cache.

\b
Examples:
  specattn-bench select
  specattn-bench select --size 1x32768 --rule top-p-0.95 --seconds 5
  specattn-bench select --size 16x131072 --rule top-5% --layers 0 --json trial.json --plot trial.png
  specattn-bench select --gpu h100
"""
BESIDES = (
    Beside(
        key="times_best_peer",
        column="x peer",
        said="torch's fastest way, or verification",
        others=lambda one: one.kind != "ours",
    ),
    Beside(
        key="times_sort",
        column="x sort",
        said="torch.sort",
        others=lambda one: one.kind == "peer" and one.name.startswith(SORT),
    ),
)
LEGEND = (
    "x peer: times as fast as torch's fastest way, or as verifying the same layers. x sort: as torch.sort, for a mass",
    "with the sum along it.",
)


@click.command("select", help=HELP, short_help="Selection: top-k, top-p, thresholds, pages.")
@options.shared
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="REQUESTSxKEYS",
    help="May be repeated.  [default: 1x32768, 1x131072, 32x32768]",
)
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), help="May be repeated.  [default: all]")
@click.option("--layers", default=32, show_default=True, type=click.IntRange(min=0), help="In one call; 0: leave out.")
def command(common: Common, sizes: tuple[str, ...], rules: tuple[str, ...], layers: int) -> None:
    found = [parse_size(text) for text in sizes or ("1x32768", "1x131072", "32x32768")]
    dtypes: tuple[Dtype, ...] = () if common.gpus else common.dtypes or ("float32", "bfloat16")
    places = None if common.gpus else common.here("select")
    asked = Asked(
        heads=common.heads,
        cases=find_cases(common, found, rules or tuple(RULES), layers, dtypes),
        page_size=common.page_size,
        plans=common.plans,
    )
    settings = {"heads": common.heads.name, **tables.source_facts(common.plans)}
    if places is None:
        modelled_report.answer("select", common, asked.for_gpus(), "top-k selection", settings)
        return
    arch = places.arch
    require_plans(asked.kernels(), arch, asked.plans)
    question = Question(
        name="select",
        title=f"selection, {common.heads.num_kv_heads} rows a request",
        settings={**settings, "seconds_a_case": common.seconds},
        besides=BESIDES,
        legend=LEGEND,
    )
    answer.measure(
        question,
        asked.cases,
        lambda case: measure_case(asked, case, arch, common.seconds),
        lambda: ceilings.measure(arch, ("float32", *dtypes)),
        places,
    )


def parse_size(text: str) -> tuple[int, int]:
    """`32x131072` -> (32, 131072). Raises SpecError."""
    batch, _, keys = text.partition("x")
    if not (batch.isdecimal() and keys.isdecimal() and int(batch) and int(keys) >= 16):
        raise SpecError(f"--size {text}: must be requests and at least 16 keys, as in 32x131072")
    return int(batch), int(keys)


def find_cases(
    common: Common, sizes: list[tuple[int, int]], rules: tuple[str, ...], layers: int, dtypes: tuple[Dtype, ...]
) -> tuple[Case, ...]:
    """Every rule at every size, at the first size also on one thread; then the layers of one request."""
    everyone = torch.get_num_threads()
    heads = common.heads.num_kv_heads
    cases = [
        Case(layers=1, batch=batch, heads=heads, keys=keys, rule=rule, threads=count)
        for place, (batch, keys) in enumerate(sizes)
        for count in dict.fromkeys((everyone, 1) if place == 0 else (everyone,))
        for rule in rules
    ]
    cases += [
        Case(layers=layers, batch=1, heads=heads, keys=sizes[0][1], rule=rules[0], threads=everyone, verified=dtype)
        for dtype in dtypes
        if layers
    ]
    return tuple(cases)
