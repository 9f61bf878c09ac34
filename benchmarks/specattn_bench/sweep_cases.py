"""Search problems whose every plan is timed, and the files that hold the times. Chosen before any search was run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specattn_bench import report
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs.pack_file import write_whole
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import Axis
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.search import Searched
from specattn_codegen.workloads import BUDGET, PILLAR_SCORES, VEGAS_SCORES

PAGE_SIZE = 16
LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
QWEN = HeadConfig(num_q_heads=28, num_kv_heads=4, head_dim=128)
LONG = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchCase:
    """One kernel at one size, on the CPU."""

    name: str
    spec: KernelSpec
    workload: Workload


CASES: dict[str, SearchCase] = {
    case.name: case
    for case in (
        SearchCase(
            name="verify-float32",
            spec=KernelSpec(op="verify_attention", heads=LLAMA, dtype="float32", score=PILLAR_SCORES),
            workload=Workload(batch=1, q_len=7, kv_len=4096),
        ),
        SearchCase(
            name="verify-bfloat16",
            spec=KernelSpec(op="verify_attention", heads=QWEN, dtype="bfloat16", score=VEGAS_SCORES),
            workload=Workload(batch=1, q_len=7, kv_len=4096),
        ),
        SearchCase(
            name="sparse-bfloat16",
            spec=KernelSpec(op="sparse_attention", heads=LLAMA, dtype="bfloat16", selection="layer"),
            workload=Workload(batch=4, q_len=1, kv_len=LONG, budget=BUDGET.budget(LONG - 1)),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Every feasible plan's times, in microseconds: one median a round, the rounds in the order they were made."""

    header: Mapping[str, object]
    default: Plan
    rounds_us: Mapping[Plan, Sequence[float]]

    @property
    def space(self) -> Searched:
        """The space as it was then, whatever it is today."""
        plans = tuple(self.rounds_us)
        names = [name for name, _ in plans[0].settings]
        values = ({plan[name]: None for plan in plans} for name in names)
        axes = (Axis(name, _ordered(found)) for name, found in zip(names, values, strict=True))
        return Searched(axes=tuple(axes), default=self.default, feasible=plans)

    @property
    def times_us(self) -> dict[Plan, float]:
        return {plan: statistics.median(rounds) for plan, rounds in self.rounds_us.items()}

    @property
    def noise(self) -> float:
        """Share by which a plan's rounds typically lie from their median."""
        spreads = (
            abs(time - statistics.median(rounds)) / statistics.median(rounds)
            for rounds in self.rounds_us.values()
            for time in rounds
        )
        return statistics.median(spreads)


def _ordered(found: Iterable[Setting]) -> tuple[Setting, ...]:
    """Numbers by size, words in the order of the file, which is that of their axis."""
    values = tuple(found)
    return tuple(sorted(values)) if all(isinstance(value, int) for value in values) else values


def sweep_path(arch: Arch, case: SearchCase) -> Path:
    return report.saved_path(arch, f"sweep-{case.name}")


def read(path: Path) -> Sweep:
    stored = json.loads(path.read_text())
    names: list[str] = stored["settings"]
    rounds: dict[Plan, Sequence[float]] = {}
    for *values, times in stored["plans"]:
        settings: dict[str, Setting] = dict(zip(names, values, strict=True))
        rounds[Plan.of("cpu", **settings)] = times
    default: dict[str, Setting] = stored["default"]
    return Sweep(header=stored["header"], default=Plan.of("cpu", **default), rounds_us=rounds)


def write(path: Path, sweep: Sweep) -> None:
    """One plan a line: the values of its settings, then its rounds."""
    names = sorted(next(iter(sweep.rounds_us)).as_dict())
    lines = [
        json.dumps([*(plan[name] for name in names), [round(time, 1) for time in rounds]])
        for plan, rounds in sweep.rounds_us.items()
    ]
    header = json.dumps(sweep.header, indent=2)
    rows = ",\n".join(lines)
    default = json.dumps(sweep.default.as_dict())
    write_whole(
        path,
        f'{{"header": {header},\n"default": {default},\n"settings": {json.dumps(names)},\n"plans": [\n{rows}\n]}}\n',
    )
