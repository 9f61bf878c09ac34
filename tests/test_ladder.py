"""The ladder: its own rungs in their order, layers, siblings, what is not believed, and what ranks compare."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_cases import ARCH, HEADS, LARGE, SCORED, SELECT, SMALL, VERIFY, entry, publish
from specattn_codegen import buckets, space
from specattn_codegen.cost_model import guess_resources, predict
from specattn_codegen.environment import silicon
from specattn_codegen.packs import ladder, pack, pack_file
from specattn_codegen.packs.ladder import Ladder
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.processors import gpus
from specattn_codegen.spec import Workload


def found(root: Path, **sizes: int) -> tuple[str, Entry] | None:
    hit = ladder.lookup(VERIFY, dataclasses.replace(SMALL, **sizes), ARCH, [root])
    return hit and hit.candidate and (hit.rung, hit.candidate.entry)


def test_the_own_bucket_then_the_nearest_then_nothing(tmp_path: Path) -> None:
    near, far = entry(block_n=32), entry(workload=LARGE, block_n=64)
    publish(tmp_path, near, far)
    assert found(tmp_path) == ("exact", near)
    assert found(tmp_path, q_len=8, kv_len=4500) == ("exact", near)
    assert found(tmp_path, kv_len=16384) == ("nearest", near)  # 2 octaves from 4096, 3 from 131072
    assert found(tmp_path, kv_len=65536) == ("nearest", far)
    assert found(tmp_path, batch=16) == ("nearest", near)
    assert found(tmp_path, batch=64) is None
    assert ladder.lookup(SCORED, SMALL, ARCH, [tmp_path]) is None
    assert ladder.lookup(dataclasses.replace(VERIFY, dtype="float16"), SMALL, ARCH, [tmp_path]) is None


def test_the_first_layer_that_has_the_bucket_wins(tmp_path: Path) -> None:
    layers = [tmp_path / name for name in ("first", "second", "absent")]
    publish(layers[0], entry(workload=LARGE, latency_us=1.0))
    publish(layers[1], entry(latency_us=2.0), entry(workload=LARGE, latency_us=3.0))
    small, large = (ladder.lookup(VERIFY, workload, ARCH, layers) for workload in (SMALL, LARGE))
    assert small is not None
    assert small.candidate is not None
    # exact in a later layer goes before nearest in an earlier one
    assert (small.rung, small.candidate.entry.latency_us) == ("exact", 2.0)
    assert large is not None
    assert large.candidate is not None
    assert large.candidate.entry.latency_us == 1.0


def test_a_layer_may_be_one_pack(tmp_path: Path) -> None:
    path = publish(tmp_path / "folder", entry())
    moved = path.rename(tmp_path / "anything.json")
    hit = ladder.lookup(VERIFY, SMALL, ARCH, [moved])
    assert hit is not None
    assert hit.rung == "exact"
    assert ladder.lookup(VERIFY, SMALL, gpus.find("a100"), [moved]) is None


def test_selection_serves_every_cache_dtype_and_page_size(tmp_path: Path) -> None:
    publish(tmp_path, entry(SELECT))
    asked = dataclasses.replace(SELECT, dtype="bfloat16", page_size=16)
    hit = ladder.lookup(asked, SMALL, ARCH, [tmp_path])
    assert hit is not None
    assert hit.plan == space.default_plan(SELECT, ARCH, "triton")


def test_a_sibling_serves_where_the_own_processor_has_nothing_within_reach(tmp_path: Path) -> None:
    """Same instruction set, other size; its distance counts towards the cap like that of the workload."""
    h200, pcie = gpus.find("h200"), gpus.find("h100-pcie")
    publish(tmp_path, entry(latency_us=1.0), arch=h200)
    publish(tmp_path, entry(latency_us=2.0), arch=pcie)
    assert found(tmp_path) == ("sibling", entry(latency_us=1.0))  # half an octave of bandwidth away; PCIe is nearly one
    assert found(tmp_path, kv_len=2**15) == ("sibling", entry(latency_us=1.0))
    assert found(tmp_path, kv_len=2**16) is None  # 4 octaves of size and one more of silicon
    own = entry(workload=LARGE, latency_us=3.0)
    publish(tmp_path, own)
    assert found(tmp_path, kv_len=2**14) == ("nearest", own)
    assert found(tmp_path) == ("sibling", entry(latency_us=1.0))  # the own is 5 octaves away
    for stranger in ("a100", "b200", "mi300x"):
        assert ladder.lookup(VERIFY, SMALL, gpus.find(stranger), [tmp_path]) is None


def test_a_siblings_plan_must_fit_here(tmp_path: Path) -> None:
    roomy = gpus.find("h100")
    cramped = dataclasses.replace(ARCH, num_sms=130, smem_per_block=40_000)
    publish(tmp_path, entry(block_n=64, num_stages=3), arch=roomy)
    assert ladder.lookup(VERIFY, SMALL, cramped, [tmp_path]) is None
    publish(tmp_path, entry(block_n=32, num_stages=2), arch=roomy)
    hit = ladder.lookup(VERIFY, SMALL, cramped, [tmp_path])
    assert hit is not None
    assert hit.rung == "sibling"


TINY = Workload(batch=1, q_len=1, kv_len=256)  # far from LARGE


def test_far_from_every_entry_the_model_chooses_among_the_proved_plans(tmp_path: Path) -> None:
    """What is proved at one size is proved at all: the fastest serves, whatever entry it stands in."""
    plans = [{"num_stages": 1}, {"merge": "fused", "block_m": 16}, {"merge": "fused", "block_n": 128, "block_m": 64}]
    sizes = [dataclasses.replace(LARGE, q_len=4**step) for step in range(3)]
    publish(tmp_path, *(entry(workload=size, **plan) for size, plan in zip(sizes, plans, strict=True)))
    known = ladder.read(ARCH, HEADS, [tmp_path])
    hit = known.find(VERIFY, TINY)
    assert hit.candidate is not None
    assert (hit.rung, hit.plan, hit.candidate.entry.workload) == ("model", entry(**plans[1]).plan, sizes[1])
    times = {
        plan: predict(VERIFY, TINY, plan, ARCH, guess_resources(VERIFY, plan, ARCH)).latency_us
        for plan in (entry(**each).plan for each in ({}, *plans))
    }
    assert times[hit.plan] == min(times.values())
    mixed = dataclasses.replace(VERIFY, op="mixed_attention", selection="kv_head")
    assert known.find(mixed, TINY).plan == hit.plan


def test_a_proved_plan_that_gains_nothing_leaves_the_default(tmp_path: Path) -> None:
    publish(tmp_path, entry(workload=LARGE, num_stages=1))
    hit = ladder.read(ARCH, HEADS, [tmp_path]).find(VERIFY, TINY)
    assert (hit.rung, hit.plan) == ("default", entry().plan)


def test_without_any_proof_the_default_serves() -> None:
    hit = Ladder(arch=ARCH, heads=HEADS, candidates=()).find(VERIFY, SMALL)
    assert (hit.rung, hit.plan, hit.candidate) == ("default", space.default_plan(VERIFY, ARCH, "triton"), None)
    cpu = dataclasses.replace(ARCH, name="cpu", vendor="cpu", target="avx512", compute_capability=0)
    spec = dataclasses.replace(VERIFY, dtype="float32", page_size=0)
    hit = Ladder(arch=cpu, heads=HEADS, candidates=()).find(spec, SMALL)
    assert (hit.rung, hit.plan) == ("default", space.default_plan(spec, cpu, "cpu"))


@pytest.mark.parametrize("proof", ["none", "", "faith", None])
def test_an_entry_without_a_proof_is_not_believed(tmp_path: Path, proof: str | None) -> None:
    path = publish(tmp_path, entry())
    plain = json.loads(path.read_text())
    plain["entries"][0]["proved_by"] = proof
    path.write_text(pack_file.to_text(plain))
    assert ladder.read(ARCH, HEADS, [tmp_path]).candidates == ()


@pytest.mark.parametrize("change", [{"block_n": 48}, {"block_n": "64"}, {"novel": 1}, {"block_m": 64, "num_warps": 2}])
def test_a_plan_outside_todays_space_is_not_believed(tmp_path: Path, change: dict[str, object]) -> None:
    path = publish(tmp_path, entry())
    plain = json.loads(path.read_text())
    plain["entries"][0]["plan"]["settings"].update(change)
    path.write_text(pack_file.to_text(plain))
    pack.load(path)
    assert ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None


def test_a_kernel_its_backend_does_not_serve_is_not_believed(tmp_path: Path) -> None:
    publish(tmp_path, entry(SELECT))
    spec = dataclasses.replace(VERIFY, dtype="float32")
    exact = dataclasses.replace(entry(), spec=spec, plan=space.default_plan(VERIFY, ARCH, "tilelang"))
    pack.write(tmp_path / "exact.json", Pack(arch=silicon(ARCH), heads=HEADS, entries=(exact,)))
    (candidate,) = ladder.read(ARCH, HEADS, [tmp_path / "exact.json"]).candidates
    assert candidate.why_unusable is not None
    assert "dtype=float32" in candidate.why_unusable


WORKLOADS = st.builds(
    Workload, batch=st.integers(1, 300), q_len=st.integers(1, 30), kv_len=st.integers(30, 2**20), budget=st.just(0)
)


@settings(deadline=None)  # the first to reach the model pays for it
@given(tuned=st.lists(WORKLOADS, max_size=4), asked=WORKLOADS)
def test_rungs_say_what_they_are(tuned: list[Workload], asked: Workload) -> None:
    candidates = tuple(
        ladder.Candidate(
            entry=entry(workload=workload),
            path=Path("pack.json"),
            silicon=silicon(ARCH),
            apart=0.25 if index % 2 else 0.0,
            why_unusable=None,
        )
        for index, workload in enumerate(tuned)
    )
    hit = Ladder(arch=ARCH, heads=HEADS, candidates=candidates).find(VERIFY, asked)
    octaves = {one: one.apart + buckets.distance("verify_attention", one.entry.workload, asked) for one in candidates}
    own = [one for one in candidates if not one.apart]
    same_bucket = [
        one
        for one in own
        if buckets.buckets("verify_attention", one.entry.workload) == buckets.buckets("verify_attention", asked)
    ]
    if same_bucket:
        assert (hit.rung, hit.candidate) == ("exact", same_bucket[0])
    elif near := [one for one in own if octaves[one] <= buckets.FARTHEST]:
        assert hit.rung == "nearest"
        assert hit.candidate is not None
        assert octaves[hit.candidate] == min(octaves[one] for one in near)
    elif near := [one for one in candidates if octaves[one] <= buckets.FARTHEST]:
        assert hit.rung == "sibling"
        assert hit.candidate is not None
        assert octaves[hit.candidate] == min(octaves[one] for one in near)
    elif hit.rung == "model":
        assert hit.candidate in candidates
        assert hit.plan == hit.candidate.entry.plan
    else:
        assert (hit.rung, hit.candidate) == ("default", None)


def test_ranks_agree_by_digest_whatever_the_provenance_and_differ_by_plans(tmp_path: Path) -> None:
    slow, fast, other = (tmp_path / name for name in ("slow", "fast", "other"))
    publish(slow, entry(latency_us=20.0), entry(SELECT))
    publish(fast, entry(latency_us=10.0), entry(SELECT))
    publish(other, entry(num_warps=8), entry(SELECT))
    digests = [ladder.read(ARCH, HEADS, [root]).digest for root in (slow, fast, other, tmp_path / "none")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    renamed = dataclasses.replace(ARCH, name="h100-80gb-hbm3")
    assert ladder.read(renamed, HEADS, [slow]).digest == digests[0]
    assert ladder.read(dataclasses.replace(ARCH, num_sms=130), HEADS, [slow]).digest != digests[0]


def test_a_frozen_process_reads_once(tmp_path: Path) -> None:
    publish(tmp_path, entry())
    before = ladder.read_once(ARCH, HEADS, (tmp_path,))
    publish(tmp_path, entry(num_warps=8))
    assert ladder.read_once(ARCH, HEADS, (tmp_path,)) is before
    assert ladder.read(ARCH, HEADS, (tmp_path,)).digest != before.digest


def test_a_layer_nobody_may_read_is_a_miss_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, entry())

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refuse)
    with caplog.at_level(logging.WARNING, logger="specattn"):
        assert ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None
        assert ladder.lookup(SCORED, SMALL, ARCH, [tmp_path]) is None
    assert len(caplog.records) == 1
