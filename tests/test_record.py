"""Records: whole lines, torn lines, many writers."""

from __future__ import annotations

import dataclasses
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specattn_codegen import space
from specattn_codegen.build.resources import Resources
from specattn_codegen.environment import current, silicon
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.processors.conditions import Conditions
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record

ARCH = gpus.find("h100")
SPEC = KernelSpec(
    op="verify_attention",
    heads=HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64, softcap=50),
    dtype="bfloat16",
    page_size=16,
)


def trial(detail: str = "", status: Status = Status.OK) -> Record:
    return Record(
        stage="measure",
        spec=SPEC,
        workload=Workload(batch=1, q_len=7, kv_len=4096),
        plan=space.default_plan(SPEC, ARCH, "triton"),
        source_digest="0123456789abcdef0123",
        silicon=silicon(ARCH),
        environment=current("triton", "a test"),
        outcome=Outcome(
            status=status,
            detail=detail,
            worst_error=0.25,
            timings=(summary([12.0, 12.5, 13.0] * 3),),
            workspace_bytes=4096,
            conditions=Conditions(clock_mhz=(1200, 1980), slowed_by=("power brake",), other_processes=1),
            resources=(
                Resources(
                    kernel="attend_splits",
                    registers=96,
                    spill_bytes=0,
                    smem_bytes=40960,
                    num_warps=4,
                    binary_bytes=9000,
                ),
            ),
        ),
        predicted_us={"b1-q7-n4096": 11.25},
    )


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    assert record.read(path) == []
    trials = [trial(str(number), status) for number, status in enumerate(Status)]
    for one in trials:
        record.append(path, one)
    assert record.read(path) == trials
    assert path.read_bytes().count(b"\n") == len(trials)


@pytest.mark.parametrize("cut", [1, 17, 400])
def test_a_torn_last_line_costs_one_record_and_no_more(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    record.append(path, trial("whole"))
    record.append(path, trial("torn"))
    path.write_bytes(path.read_bytes()[:-cut])
    left = [one.outcome.detail for one in record.read(path)]
    assert left == (["whole", "torn"] if cut == 1 else ["whole"])
    record.append(path, trial("after"))
    assert [one.outcome.detail for one in record.read(path)] == [*left, "after"]


def test_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"stage":"dance"}\n' + b"[" * 100_000 + b"\n\xff\xfe\n" + b'{"n":' + b"9" * 5000 + b"}\n\n")
    record.append(path, trial("mine"))
    assert [one.outcome.detail for one in record.read(path)] == ["mine"]


def test_many_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda number: record.append(path, trial(str(number))), range(64)))
    assert sorted(int(one.outcome.detail) for one in record.read(path)) == list(range(64))


def test_a_full_disk_is_an_error_not_half_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left") as caught:
        record.append(path, trial())
    assert caught.value.errno == errno.ENOSPC
    assert record.read(path) == []


def test_a_trial_knows_itself_after_the_disk(tmp_path: Path) -> None:
    """A softcap of 50 comes back as 50.0, and is the same trial; another compiler makes another."""
    path = tmp_path / "records.jsonl"
    one = trial()
    record.append(path, one)
    (found,) = record.read(path)
    assert found.identity == one.identity
    assert hash(found.identity) == hash(one.identity)
    newer = dataclasses.replace(one, environment=dataclasses.replace(one.environment, compiler="triton 99"))
    assert newer.identity != one.identity


def test_only_a_timeout_is_worth_trying_again() -> None:
    assert {status for status in Status if not trial(status=status).is_settled} == {Status.TIMEOUT}
