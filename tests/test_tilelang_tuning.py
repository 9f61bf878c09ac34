"""TileLang beside Triton in one search for an absent GPU: both are compiled and ranked; a pack takes what is proved."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from specattn_bench.languages import compared
from specattn_codegen import space
from specattn_codegen.cli.progress import PLAIN_WIDTH, closing_table, microseconds
from specattn_codegen.cli.rivals import find_rivals, rivals_table
from specattn_codegen.cost_model import predict
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder, pack
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.tune import plan_tasks, tune
from specattn_codegen.tuning.tune_session import Budget, Target
from test_tune import Watcher

pytest.importorskip("tilelang", reason="TileLang is not installed")

from rich.console import Console
from tilelang import env

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
SIZES = (Workload(batch=1, q_len=3, kv_len=700), Workload(batch=4, q_len=3, kv_len=20_000))
H100 = Target(arch=gpus.find("h100"), backend="triton", is_present=False, page_size=16, further=("tilelang",))


@pytest.mark.skipif(not env.CUDA_HOME, reason="nvcc is not installed, and TileLang compiles with it")
def test_what_nothing_proves_is_recorded_and_shown_and_in_no_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    watcher, packs = Watcher(), tmp_path / "packs"
    tune(plan_tasks([(VERIFY, SIZES)], H100), H100, Budget(trials=1, seed=0), watcher, packs)

    compiled = [one for one in record.read(record.records_path(H100.arch, HEADS)) if one.stage == "compile"]
    assert {(one.plan, one.environment.compiler.split()[0]) for one in compiled} == {
        (space.default_plan(VERIFY, H100.arch, backend), backend) for backend in ("triton", "tilelang")
    }
    for one in compiled:
        assert one.predicted_us == {
            size.name: predict(VERIFY, size, one.plan, H100.arch, one.outcome.resources).latency_us for size in SIZES
        }
    saved = pack.load(pack.pack_path(packs, H100.arch, HEADS)).entries
    assert {(entry.plan.backend, entry.proved_by) for entry in saved} == {("triton", "interpreter-float16-twin")}
    for size in SIZES:
        found = ladder.lookup(VERIFY, size, H100.arch, [packs])
        assert found is not None
        assert found.plan.backend == "triton"

    rivals = find_rivals(watcher.winners, watcher.trials)
    (theirs,) = (one for one in compiled if one.plan.backend == "tilelang")
    assert [(one.entry.workload, one.plan, one.latency_us) for one in rivals] == [
        (entry.workload, theirs.plan, theirs.predicted_us[entry.workload.name]) for entry in watcher.winners
    ]
    for row in compared(saved, compiled):
        recorded = {"plan": theirs.plan.as_dict(), "predicted_us": round(theirs.predicted_us[str(row["workload"])], 2)}
        assert (row["backend"], row["proved_by"]) == ("triton", "interpreter-float16-twin")
        assert row["rivals"] == [{"backend": "tilelang", **recorded, "proved_by": "none"}]
    shown = io.StringIO()
    Console(width=PLAIN_WIDTH, file=shown).print(rivals_table(rivals))
    assert "proved by none" in shown.getvalue()
    assert str(theirs.plan)[:40] in shown.getvalue()
    narrow = io.StringIO()
    for table in (closing_table(watcher.winners), rivals_table(rivals)):
        Console(width=80, file=narrow).print(table)
    for latency_us in [*(one.latency_us for one in rivals), *(entry.latency_us for entry in watcher.winners)]:
        assert microseconds(latency_us) in narrow.getvalue()
