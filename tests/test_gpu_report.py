"""A campaign's answers against what was aimed at, and the text and pictures made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import journal, report, standing
from benchmarks.gpu.journal import Journal
from specattn_codegen import environment, space
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.workloads import REFERENCE_SCORES

HEADS = HeadConfig.from_model("llama3-8b")
H200 = gpus.find("h200")
PEER = "SDPA flash, group as rows"


def timed(median_us: float, least_bytes: int = 0) -> dict[str, object]:
    timing = {"median_us": median_us, "p20_us": median_us, "p80_us": median_us, "n": 9}
    least = {"memory_bytes": least_bytes, "operations": 8 * least_bytes}
    return {"timing": timing, **({"plan": "p", "found": "exact", "least": least} if least_bytes else {})}


def race(series: dict[str, object], q_len: int = 8) -> dict[str, object]:
    return {"workload": {"batch": 4, "q_len": q_len, "kv_len": 32768, "budget": 0}, "series": series}


def parts(dense_us: float) -> dict[str, object]:
    medians = {"draft": 1000.0, "verify": 3000.0, "select": 200.0, "dense": dense_us, "whole": 10_000.0}
    timings = {name: timed(median)["timing"] for name, median in medians.items()}
    return {"batch": 1, "kv_len": 102_400, "draft_len": 6, "fits_memory": False, "timings": timings}


VERIFIED = {
    "no scores": timed(125.0, 450_000_000),
    "reference": timed(127.5, 455_000_000),
    "ends": timed(140.0, 460_000_000),
    "ends, dump and reduce (Vegas' method)": timed(134.0, 460_000_000),
    "all": timed(170.0, 500_000_000),
    "all, second pass (SparseSpec's method)": timed(150.0, 500_000_000),
    PEER: timed(250.0),
    f"{PEER}, nothing masked": timed(100.0),
    "SDPA cuDNN, group as rows": {"refused": "RuntimeError: no"},
    standing.SCORED: timed(90.0),
}
ANSWERS: dict[str, dict[str, object]] = {
    "campaign": {"rehearsal": False},
    "ceilings/environment": {"environment": {"device": "NVIDIA H200"}},
    "ceilings/read": {"gbs": 4000.0},
    "ceilings/matrix": {"tflops": {"bfloat16": 790.0, "float16": 790.0}},
    "graphs/reference": {"same_bits": True},
    "graphs/vegas": {"same_bits": False},
    "peers/verify/b4-q8-n32768": race(VERIFIED),
    "peers/flex/b4-q8-n32768": race({"no scores": timed(130.0, 450_000_000), "FlexAttention": timed(195.0)}),
    "peers/sparse/b4-n32768-block1": race({"ours": timed(10.0, 28_000_000)}, q_len=1),
    "peers/sparse/b4-n32768-block16": race({"ours": timed(10.0, 36_000_000)}, q_len=1),
    "peers/select/b4-n32768": race({"ours": timed(50.0, 9_000_000), "torch.topk": timed(400.0)}),
    "rounds/reference/b1-n102400": parts(5000.0),
}


def test_every_aim_is_held_against_its_worst_case() -> None:
    aims = {aim.name.split(" at 100K")[0]: aim for aim in standing.targets(ANSWERS)}
    found = {name: aim.found for name, aim in aims.items()}
    assert found == {
        "verification: share of the read ceiling": pytest.approx(450e6 / 125e-6 / 4e12),
        "verification: times as fast as its best peer": pytest.approx(1.5),  # what masks nothing does other work
        "scores, reference: time over none": pytest.approx(0.02),
        "scores, first and last row: time over none": pytest.approx(0.072),  # the faster of two methods
        "scores, all rows: time over the floor of its bytes": pytest.approx(150e-6 * 4e12 / 500e6),
        "sparse attention, keys one by one: share of the read ceiling": pytest.approx(0.70),
        "sparse attention, pages of 16: share of the read ceiling": pytest.approx(0.90),
        "selection: times as fast as torch.topk": pytest.approx(8.0),
        "selection of all layers: share of a round": pytest.approx(0.02),
        "a whole round is one CUDA graph with the same bits (1: yes)": 0.0,
        "speed-up over dense decoding": pytest.approx(6.24 * 5000 / (6 * 1000 + 3000 + 200)),
    }
    assert {name for name, aim in aims.items() if not aim.is_met} == {
        "a whole round is one CUDA graph with the same bits (1: yes)"
    }


def test_nothing_measured_meets_nothing_and_misses_nothing() -> None:
    assert all(aim.found is None and aim.is_met is None and aim.cases == 0 for aim in standing.targets({}))


@pytest.fixture
def campaign_folder(tmp_path: Path) -> Path:
    """As a campaign on a GPU leaves it, with one measured winner."""
    folder = tmp_path / "campaign"
    book = Journal(folder=folder, revision="r")
    for key, answer in ANSWERS.items():
        book.done(key, 1.0, answer)
    spec = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16, score=REFERENCE_SCORES)
    entry = Entry(
        spec=spec,
        workload=Workload(batch=4, q_len=7, kv_len=32768),
        plan=space.default_plan(spec, H200, "triton"),
        chosen_by="measured",
        proved_by="device",
        latency_us=127.5,
        noise_us=0.4,
        share_of_ceiling=0.88,
        resources=(),
        source_digest="0" * 20,
        environment=environment.current("triton", "NVIDIA H200"),
    )
    pack.publish(folder / "packs", H200, HEADS, [entry])
    return folder


def test_an_archive_becomes_results_packs_pictures_and_text(campaign_folder: Path, tmp_path: Path) -> None:
    archive = journal.pack(campaign_folder)
    results, packs = tmp_path / "results", tmp_path / "packs"
    (merged,) = report.collect(archive, "h200", results, packs)
    assert [one.chosen_by for one in pack.load(merged).entries] == ["measured"]
    assert (results / "h200" / journal.JOURNAL).read_bytes() == (campaign_folder / journal.JOURNAL).read_bytes()

    answers = Journal(folder=results / "h200", revision="").answers()
    drawn = report.draw(answers, results / "h200", "measured")
    assert [path.name for path in drawn] == [report.ROOFLINE, report.SPEED_UPS]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)

    text = report.section("h200", results, packs)
    assert text.startswith("**Measured** on one NVIDIA H200, read ceiling of the run 4000 GB/s")
    assert "| verification: share of the read ceiling | at least 0.9 | 0.90 | yes |" in text
    assert "| 4 requests, 8 rows, 32K keys | reference | 127.5 us | 89% | 1.96 |" in text
    assert (
        "| 1 x 100K | reference | 1.00 ms | 3.00 ms | 0.20 ms | 5.00 ms | 1.63 | 2.72 | 3.80 | layers share caches |"
        in text
    )
    assert "odelled" not in text


def test_without_results_the_text_says_so_and_calls_a_model_a_model(tmp_path: Path) -> None:
    text = report.section("h200", tmp_path, report.PACKS)
    assert text.startswith("**Not measured.** No H200 has run these kernels")
    assert text.count("not measured") == len(standing.targets({}))
    assert "**Modelled** for one H" in text
    assert "nothing was timed" in text


def test_a_rehearsal_is_no_result(campaign_folder: Path, tmp_path: Path) -> None:
    Journal(folder=campaign_folder, revision="r").done("campaign", 0.0, {"rehearsal": True})
    with pytest.raises(SpecError, match="a rehearsal's, which is no result of a h200"):
        report.collect(campaign_folder, "h200", tmp_path / "results", tmp_path / "packs")
    with pytest.raises(SpecError, match=r"holds no journal\.jsonl"):
        report.collect(tmp_path, "h200", tmp_path / "results", tmp_path / "packs")


def test_a_section_is_put_between_its_markers_and_only_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter\n")
    assert report.put("new | text", page)
    assert page.read_text() == f"# Before\n\n{report.BEGIN}\n\nnew | text\n\n{report.END}\n\nAfter\n"
    assert not report.put("new | text", page)
    page.write_text("# No markers\n")
    with pytest.raises(SpecError, match="put them where the section belongs"):
        report.put("text", page)
