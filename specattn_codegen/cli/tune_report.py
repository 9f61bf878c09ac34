"""specattn-tune --report: one static page about a run, with nothing to load from anywhere."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from specattn_codegen import buckets, paths, space
from specattn_codegen.cli.progress import TuningProgress, microseconds, short_plan
from specattn_codegen.cost_model.floor import least_work
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors.arch import Arch
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.tune_session import Target, Task
from specattn_codegen.workloads import default_workloads

WIDTH = 9.5  # inches
MOST_PANELS = 12  # searches that are drawn
FAST, SLOW, BEST = "#1f6f8b", "#c9d3dc", "#d1495b"
BACKED = {"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.75}  # of words over lines


def write_report(path: Path, target: Target, progress: TuningProgress) -> None:
    """Search history, the settings tried, the roofline with every candidate, and which sizes have a winner."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.templates_dir()), undefined=jinja2.StrictUndefined, autoescape=True
    )
    outcomes = Counter(trial.outcome.status.value for _, trial in progress.trials)
    text = environment.get_template("report/report.html.jinja").render(
        title=f"Tuning for {target.arch.name}",
        label="Measured on this machine." if target.is_present else "Modelled: compiled and ranked, nothing was timed.",
        winners=[
            {
                "kernel": entry.spec.name,
                "size": entry.workload.name,
                "plan": short_plan(entry),
                "time": _time(entry),
                "share": f"{entry.share_of_ceiling:.0%}",
                "known_by": f"{entry.chosen_by}, proved by {entry.proved_by}",
            }
            for entry in progress.winners
        ],
        figures=figures(target, progress),
        outcomes=[
            {"status": status, "count": count, "example": _example(progress.trials, status)}
            for status, count in outcomes.most_common()
        ],
    )
    path.write_text(text)


def _time(entry: Entry) -> str:
    """With its noise where it was measured."""
    noise = f" ± {entry.noise_us / entry.latency_us:.1%}" if entry.chosen_by == "measured" else ""
    return microseconds(entry.latency_us) + noise


def _example(trials: Sequence[tuple[Task, Record]], status: str) -> str:
    return next((trial.outcome.detail for _, trial in trials if trial.outcome.status.value == status), "")


def figures(target: Target, progress: TuningProgress) -> list[dict[str, str]]:
    searches: dict[Task, list[Record]] = {}
    for task, trial in progress.trials:
        searches.setdefault(task, []).append(trial)
    shown = dict(list(searches.items())[:MOST_PANELS])
    if not shown:
        return []
    left_out = f" The first {MOST_PANELS} of {len(searches)} searches." if len(searches) > len(shown) else ""
    return [
        {
            "title": "Search history",
            "note": f"Every trial in its order, and the best so far; ticks at the top are failed trials.{left_out}",
            "svg": _svg(_history(shown)),
        },
        {
            "title": "Settings tried",
            "note": f"A line a plan of {target.backend}, over its settings; the faster, the darker.{left_out}",
            "svg": _svg(_parallel(shown, target)),
        },
        {
            "title": "Roofline",
            "note": "Every candidate by the least work possible, under the ceilings of memory and arithmetic.",
            "svg": _svg(_roofline(searches, target.arch)),
        },
        {
            "title": "Coverage",
            "note": "Which of the usual sizes have a winner of their own (exact), one within reach (nearest), or none.",
            "svg": _svg(_coverage(progress, target)),
        },
    ]


def _svg(figure: Figure) -> str:
    """Without the XML prologue, so that it may stand in a page. Text stays text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specattn"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def time_us(trial: Record) -> float | None:
    """Measured, or predicted as the geometric mean would be ranked: the mean over sizes; None for a failed trial."""
    if trial.outcome.status is not Status.OK:
        return None
    if trial.outcome.timings:
        return trial.outcome.timings[0].median_us
    return sum(trial.predicted_us.values()) / len(trial.predicted_us) if trial.predicted_us else None


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="tight")
    panels = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, panels


def _history(searches: dict[Task, list[Record]]) -> Figure:
    figure, panels = _panels(len(searches), 2.2)
    for panel, (task, trials) in zip(panels, searches.items(), strict=True):
        times = [time_us(trial) for trial in trials]
        done = [(index + 1, time) for index, time in enumerate(times) if time is not None]
        best = [(index, min(time for at, time in done if at <= index)) for index, _ in done]
        panel.plot([at for at, _ in done], [time for _, time in done], "o", color=FAST, markersize=3.5)
        panel.plot([at for at, _ in best], [time for _, time in best], color=BEST, drawstyle="steps-post")
        failed = [index + 1 for index, time in enumerate(times) if time is None]
        for trial in failed:
            panel.axvline(trial, ymin=0.94, color="#444")
        panel.set_title(task.name, fontsize=8)
        panel.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_major_formatter(plain)
        panel.yaxis.set_minor_formatter(plain)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("trial", fontsize=7)
        panel.set_ylabel("microseconds", fontsize=7)
        panel.tick_params(labelsize=6, which="both")
    return figure


def _parallel(searches: dict[Task, list[Record]], target: Target) -> Figure:
    figure, panels = _panels(len(searches), 2.4)
    for panel, (task, trials) in zip(panels, searches.items(), strict=True):
        axes = [axis for axis in space.axes(task.spec, target.backend) if len(axis.values) > 1]
        timed = sorted(
            (
                (time, trial)
                for trial in trials
                if trial.plan.backend == target.backend and (time := time_us(trial)) is not None
            ),
            key=lambda one: -one[0],
        )
        for rank, (_, trial) in enumerate(timed):
            heights = [axis.values.index(trial.plan[axis.name]) / (len(axis.values) - 1) for axis in axes]
            is_best = rank == len(timed) - 1
            panel.plot(
                range(len(axes)),
                heights,
                color=BEST if is_best else FAST,
                alpha=1.0 if is_best else 0.1 + 0.6 * rank / len(timed),
                linewidth=2.0 if is_best else 1.0,
                marker="o",
                markersize=2.5,
            )
        for index, axis in enumerate(axes):
            for position, value in enumerate(axis.values):
                height = position / (len(axis.values) - 1)
                panel.text(index + 0.06, height, str(value), fontsize=6, va="center", bbox=BACKED)
        panel.set_xticks(range(len(axes)), [axis.name for axis in axes], fontsize=6, rotation=20)
        panel.set_xlim(-0.3, len(axes) - 0.4)
        panel.set_ylim(-0.1, 1.15)
        panel.set_yticks([])
        panel.set_title(task.name, fontsize=8)
    return figure


def _roofline(searches: dict[Task, list[Record]], arch: Arch) -> Figure:
    figure = Figure(figsize=(WIDTH, 4), layout="tight")
    panel = figure.add_subplot()
    intensities: list[float] = []
    for task, trials in searches.items():
        for workload in task.workloads:
            work = least_work(task.spec, workload)
            intensity = work.operations / work.memory_bytes
            times = [_time_at(trial, workload.name) for trial in trials]
            rates = [work.operations / time / 1e3 for time in times if time is not None]
            intensities.append(intensity)
            panel.plot([intensity] * len(rates), rates, "o", color=FAST, alpha=0.35, markersize=4)
            if rates:
                panel.plot([intensity], [max(rates)], "D", color=BEST, markersize=5)
    low, high = min(intensities) / 3, max(intensities) * 30
    peak = max(arch.bf16_tflops, arch.fp32_tflops) * 1e3
    for rate, name in ((peak, "bfloat16"), (arch.fp32_tflops * 1e3, "float32")):
        if arch.bandwidth_gbs and rate:
            ridge = rate / arch.bandwidth_gbs
            panel.plot([low, ridge, max(high, ridge * 2)], [low * arch.bandwidth_gbs, rate, rate], color="#444")
            panel.annotate(f"{name} peak", (max(high, ridge * 2), rate), ha="right", va="bottom", fontsize=8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("operations per byte that must move")
    panel.set_ylabel("operations per second, 10^9")
    return figure


def _time_at(trial: Record, workload: str) -> float | None:
    if trial.outcome.status is not Status.OK:
        return None
    return trial.predicted_us.get(workload) or (trial.outcome.timings[0].median_us if trial.outcome.timings else None)


def _coverage(progress: TuningProgress, target: Target) -> Figure:
    """A row a kernel, a column a size."""
    specs = list(dict.fromkeys(task.spec for task, _ in progress.trials))
    sizes = list(dict.fromkeys(size.name for spec in specs for size in default_workloads(spec, target.arch)))
    figure = Figure(figsize=(WIDTH, 1.6 + 0.3 * len(specs)), layout="tight")
    panel = figure.add_subplot()
    colours = {"exact": FAST, "nearest": "#8fbcc9", "none": SLOW}
    for row, spec in enumerate(specs):
        won = [entry.workload for entry in progress.winners if entry.spec == spec]
        for size in default_workloads(spec, target.arch):
            distance = min((buckets.distance(spec.op, size, one) for one in won), default=float("inf"))
            rung = "exact" if distance == 0 else "nearest" if distance <= buckets.FARTHEST else "none"
            panel.plot(sizes.index(size.name), row, "s", color=colours[rung], markersize=13)
    for rung, colour in colours.items():
        panel.plot([], [], "s", color=colour, label=rung)
    panel.set_xticks(range(len(sizes)), sizes, fontsize=6, rotation=35, ha="right")
    panel.set_yticks(range(len(specs)), [spec.name for spec in specs], fontsize=7)
    panel.set_xlim(-0.6, len(sizes) - 0.4)
    panel.set_ylim(len(specs) - 0.4, -0.6)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
