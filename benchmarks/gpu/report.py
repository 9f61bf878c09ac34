"""Results to pictures and to the performance section of a text: `python -m benchmarks.gpu.report --help`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.gpu import CHECKOUT, journal
from benchmarks.gpu.journal import JOURNAL, Journal
from benchmarks.gpu.standing import (
    Answers,
    Parts,
    Race,
    Target,
    peers_of,
    races,
    read_gbs,
    rounds,
    share_of_read,
    targets,
)
from specattn_bench import plots
from specattn_bench.ceilings import Ceilings
from specattn_bench.plots import Bars, Point
from specattn_codegen.errors import PackError, SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors import gpus

RESULTS = CHECKOUT / "benchmarks" / "results"
PACKS = CHECKOUT / "tuned_configs"
PAGE = CHECKOUT / "docs" / "performance.md"
BEGIN, END = "<!-- performance: made by python -m benchmarks.gpu.report -->", "<!-- performance: end -->"
TRIALS = "trials.jsonl"
PICTURED_ROWS = (1, 8)
ROOFLINE, SPEED_UPS = "roofline.png", "speed-ups.png"


def collect(source: Path, gpu: str, results: Path, packs: Path) -> list[Path]:
    """Puts a campaign's journal and trials among the results, and its winners into the packs. Raises SpecError."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = source
        if source.is_file():
            folder = Path(scratch)
            journal.unpack(source, folder)
        if not (folder / JOURNAL).is_file():
            raise SpecError(f"--from {source}: holds no {JOURNAL}; give a campaign's folder or its archive")
        answers = Journal(folder=folder, revision="").answers()
        if answers.get("campaign", {}).get("rehearsal") is not False:
            raise SpecError(f"--from {source}: a rehearsal's, which is no result of a {gpu}")
        kept = results / gpu
        kept.mkdir(parents=True, exist_ok=True)
        for name in (JOURNAL, TRIALS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, kept / name)
        found = sorted((folder / "packs" / gpu).glob("*.json"))
        return [_merged(pack.load(path), gpu, packs) for path in found]


def _merged(found: pack.Pack, gpu: str, packs: Path) -> Path:
    return pack.publish(packs, gpus.find(gpu), found.heads, found.entries)


def section(gpu: str, results: Path, packs: Path) -> str:
    """The text between the markers: what was measured, or what is modelled as long as nothing was."""
    answers = Journal(folder=results / gpu, revision="").answers()
    if not answers:
        return f"{_not_measured(gpu)}\n\n{_targets(targets({}))}\n\n{_modelled(gpu, packs)}"
    return "\n\n".join([_measured(gpu, answers), _targets(targets(answers)), _verified(answers), _rounds(answers)])


def _not_measured(gpu: str) -> str:
    return (
        f"**Not measured.** No {gpu.upper()} has run these kernels, and no speed is claimed for one. What is aimed at, "
        "and what `python -m benchmarks.gpu` will find:"
    )


def _measured(gpu: str, answers: Answers) -> str:
    about = answers.get("ceilings/environment", {})
    environment = about.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else gpu.upper()
    gbs = read_gbs(answers)
    read = "" if gbs is None else f", read ceiling of the run {gbs:.0f} GB/s"
    return (
        f"**Measured** on one {device}{read} ([answers](../benchmarks/results/{gpu}/{JOURNAL}), "
        f"[roofline](../benchmarks/results/{gpu}/{ROOFLINE}), [speed-ups](../benchmarks/results/{gpu}/{SPEED_UPS})). "
        "Of several cases the worst counts."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _targets(aims: Sequence[Target]) -> str:
    words = {True: "yes", False: "no", None: ""}
    rows = [[aim.name, aim.wanted, aim.shown, words[aim.is_met]] for aim in aims]
    return _table(["aim", "wanted", "found", "reached"], rows)


def _verified(answers: Answers) -> str:
    gbs = read_gbs(answers) or float("nan")
    rows = [
        [race.workload.name, name, f"{race.median_us[name]:.1f} us", f"{share_of_read(race, name, gbs):.0%}"]
        + ([f"{min(others.values()) / race.median_us[name]:.2f}"] if (others := peers_of(race)) else [""])
        for race in races(answers, "verify")
        for name in race.median_us
        if race.series[name].least is not None
    ]
    columns = ["verification of", "scores", "median", "of the read ceiling", "times as fast as torch's best"]
    return _table(columns, rows) if rows else "Verification has not been measured yet."


def _rounds(answers: Answers) -> str:
    rows = [
        [
            f"{one.batch} x {one.kv_len // 1024}K",
            key.split("/")[1],
            *(f"{one.us(part) / 1e3:.2f} ms" for part in ("draft", "verify", "select", "dense")),
            *(f"{one.speed_up(tokens):.2f}" for tokens in (3.0, 5.0, 7.0)),
            "" if one.fits_memory else "layers share caches",
        ]
        for key, one in rounds(answers).items()
    ]
    columns = ["requests x keys", "scores", "a draft", "verification", "selection", "a dense step"]
    columns += ["speed-up at 3 tokens a round", "5", "7", ""]
    return _table(columns, rows) if rows else "Rounds have not been measured yet."


def _modelled(gpu: str, packs: Path) -> str:
    """What the cost model expects, from the pack of this GPU or of the nearest that has one."""
    for name in dict.fromkeys((gpu, "h100")):
        path = pack.pack_path(packs, gpus.find(name), HeadConfig.from_model("llama3-8b"))
        try:
            entries = [entry for entry in pack.load(path).entries if entry.chosen_by == "modelled"]
        except (OSError, PackError):
            continue
        return (
            f"**Modelled** for one {name.upper()} by the cost model; nothing was timed:\n\n{_modelled_table(entries)}"
        )
    return "No modelled pack of Llama 3 8B's heads is here either."


def _modelled_table(entries: Sequence[Entry]) -> str:
    rows = [
        [entry.spec.name, entry.workload.name, f"{entry.latency_us:.1f} us", f"{entry.share_of_ceiling:.0%}"]
        for entry in entries
        if entry.workload.kv_len >= 32768
    ]
    return _table(["kernel", "size", "modelled", "of the roofline"], rows)


def draw(answers: Answers, folder: Path, title: str) -> list[Path]:
    """The pictures that the answers allow."""
    drawn: list[Path] = []
    pictured = [race for race in races(answers, "verify") if race.workload.q_len in PICTURED_ROWS]
    ceilings = _ceilings(answers)
    if pictured and ceilings is not None:
        drawn.append(folder / ROOFLINE)
        _roofline(drawn[-1], title, ceilings, pictured)
    if parts := rounds(answers):
        drawn.append(folder / SPEED_UPS)
        _speed_ups(drawn[-1], title, parts)
    return drawn


def _ceilings(answers: Answers) -> Ceilings | None:
    gbs, rates = read_gbs(answers), answers.get("ceilings/matrix", {}).get("tflops")
    if gbs is None or not isinstance(rates, dict):
        return None
    return Ceilings(bandwidth_gbs=gbs, tflops={str(dtype): float(rate) for dtype, rate in rates.items()})


def _roofline(path: Path, title: str, ceilings: Ceilings, pictured: Sequence[Race]) -> None:
    ours = list(dict.fromkeys(name for race in pictured for name in race.median_us if race.series[name].least))
    points = [
        Point(
            series=name,
            dtype="bfloat16",
            case=race.workload.name,
            intensity=least.operations / least.memory_bytes,
            gflops=least.operations / race.median_us[name] / 1e3,
        )
        for race in pictured
        for name in race.median_us
        if (least := race.series[name].least)
    ]
    gbs = ceilings.bandwidth_gbs
    bars = Bars(
        label="torch's fastest attention",
        marks_label="the read ceiling (1: all of it)",
        values={name: _ratios(pictured, name) for name in ours},
        marks={
            name: {r.workload.name: share_of_read(r, name, gbs) for r in pictured if name in r.median_us}
            for name in ours
        },
    )
    plots.draw(path, title, ceilings, points, bars, plots.colours(ours, []))


def _ratios(pictured: Sequence[Race], name: str) -> dict[str, float]:
    return {
        race.workload.name: min(others.values()) / race.median_us[name]
        for race in pictured
        if name in race.median_us and (others := peers_of(race))
    }


def _speed_ups(path: Path, title: str, parts: Mapping[str, Parts]) -> None:
    """Over dense decoding, by the tokens a round emits; a panel for each score definition."""
    kinds = list(dict.fromkeys(key.split("/")[1] for key in parts))
    figure = Figure(figsize=(5.5 * len(kinds), 5.5), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=plots.FONT_SIZE + 3, color=plots.INK, x=0.01, ha="left")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        plots.plain(axes)
        chosen = [one for key, one in parts.items() if key.split("/")[1] == kind]
        for place, one in enumerate(chosen):
            tokens = [1 + step / 4 for step in range(4 * one.draft_len + 1)]
            speeds = [one.speed_up(count) for count in tokens]
            colour = plots.OURS[place % len(plots.OURS)]
            style = plots.STYLES[place // len(plots.OURS) % len(plots.STYLES)]
            axes.plot(tokens, speeds, style, color=colour, label=f"{one.batch} x {one.kv_len // 1024}K keys")
        axes.axhline(1.0, color=plots.FAINT, lw=1)
        axes.set_title(f"scores: {kind}", fontsize=plots.FONT_SIZE + 1, color=plots.INK, loc="left")
        axes.set_xlabel("tokens a round emits", fontsize=plots.FONT_SIZE, color=plots.INK)
        axes.legend(frameon=False, fontsize=plots.FONT_SIZE - 1)
    panels[0].set_ylabel("times as fast as dense decoding", fontsize=plots.FONT_SIZE, color=plots.INK)
    figure.savefig(path, dpi=160)


def put(text: str, into: Path) -> bool:
    """Replaces what stands between the markers of a file. Whether anything changed. Raises SpecError without them."""
    old = into.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SpecError(f"{into}: has no line {BEGIN} followed by {END}; put them where the section belongs")
    new = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
    if new != old:
        into.write_text(new)
    return new != old


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, help="a campaign's folder or archive to take results from")
    parser.add_argument("--gpu", default="h200", help="whose results they are  [default: h200]")
    parser.add_argument(
        "--into", type=Path, action="append", help="files with the markers  [default: docs/performance.md]"
    )
    asked = parser.parse_args()
    try:
        gpu = gpus.find(asked.gpu).name
        if asked.source is not None:
            for path in collect(asked.source, gpu, RESULTS, PACKS):
                print(f"pack: {path}")
        answers = Journal(folder=RESULTS / gpu, revision="").answers()
        for path in draw(answers, RESULTS / gpu, f"measured: Llama 3 8B's heads, bfloat16, on one {gpu.upper()}"):
            print(f"picture: {path}")
        for path in asked.into or [PAGE]:
            print(f"{path}: {'rewritten' if put(section(gpu, RESULTS, PACKS), path) else 'as it was'}")
    except (SpecError, PackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
