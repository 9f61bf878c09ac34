"""Work and devices split among workers: nobody doubles what another has, a dead one's is free again."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from specattn_bench.endurance import HEADS, SIZES, SPEC, Pretended
from specattn_codegen.errors import SpecError
from specattn_codegen.packs import pack
from specattn_codegen.processors import cpu_info
from specattn_codegen.tuning.claims import DEVICES, SEARCHES, VISIBLE, Claims, own_device, visible_devices
from specattn_codegen.tuning.shared_study import open_storage, storage_at, worker_name
from specattn_codegen.tuning.tune import Method, tune
from specattn_codegen.tuning.tune_session import Budget, Target, Task
from test_tune import Watcher

FORK = multiprocessing.get_context("fork")
PIECES = [f"kernel {number}" for number in range(6)]
Visits = list[tuple[str, bool]]  # what was taken, and whether nobody had done it by then


def split(url: str, answers: multiprocessing.Queue[Visits]) -> None:
    mine, waiting, visits = Claims(open_storage(url), SEARCHES, worker_name()), list(PIECES), Visits()
    while waiting:
        piece = mine.take(waiting)
        waiting.remove(piece)
        with storage_at(url) as storage:
            fresh = not Claims(storage, SEARCHES, "a reader").done(piece)
        visits.append((piece, fresh))
        time.sleep(0.3 if fresh else 0.0)
        mine.release(done=True)
    answers.put(visits)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_each_piece_is_one_workers_and_all_are_seen_by_all(kind: str, tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'studies.log'}" if kind == "journal" else f"sqlite:///{tmp_path / 'studies.db'}"
    Claims(open_storage(url), SEARCHES, "who makes the tables")
    answers: multiprocessing.Queue[Visits] = FORK.Queue()
    workers = [FORK.Process(target=split, args=(url, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    visits = [answers.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    assert [sorted(piece for piece, _ in one) for one in visits] == [PIECES, PIECES]
    alone = Counter(piece for one in visits for piece, fresh in one[: len(PIECES) // 2] if fresh)
    assert max(alone.values()) == 1  # while there was enough for both, no two were at one
    assert set().union(*({piece for piece, fresh in one if fresh} for one in visits)) == set(PIECES)


def test_what_nobody_has_goes_before_what_others_have_before_what_is_done(tmp_path: Path) -> None:
    storage = open_storage(f"journal:{tmp_path / 'studies.log'}")
    first, second, third = (Claims(storage, SEARCHES, worker_name()) for _ in range(3))
    assert first.take(["a", "b", "c"]) == "a"
    first.release(done=True)
    assert first.take(["a", "b", "c"]) == "b"
    assert second.take(["a", "b", "c"]) == "c"
    assert third.take(["a", "b", "c"]) == "b"  # helps
    assert third.take_free(["b", "c"]) is None
    first.release(done=False)
    assert third.take_free(["b", "c"]) == "b"
    assert (first.done("a"), first.done("b")) == (True, False)


def hold(url: str, ready: multiprocessing.Queue[str]) -> None:
    with own_device(open_storage(url), worker_name(), 2) as device:
        ready.put(f"{device} {os.environ[VISIBLE]}")
        time.sleep(600)


def test_one_worker_a_gpu_and_a_dead_ones_gpu_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3, GPU-5f0c")
    url = f"journal:{tmp_path / 'studies.log'}"
    ready: multiprocessing.Queue[str] = FORK.Queue()
    others = [FORK.Process(target=hold, args=(url, ready)) for _ in range(2)]
    for other in others:
        other.start()
    assert {ready.get(timeout=120) for _ in others} == {"3 3", "GPU-5f0c GPU-5f0c"}
    with (
        pytest.raises(SpecError, match="each of the 2 GPUs") as caught,
        own_device(open_storage(url), worker_name(), 2),
    ):
        pass
    assert "\n" not in str(caught.value)
    for other in others:
        other.kill()
        other.join()
    with own_device(open_storage(url), worker_name(), 2) as device:
        assert device == os.environ[VISIBLE] == "3"
        monkeypatch.setenv(VISIBLE, "3")  # as a second worker may be started
        with contextlib.suppress(SpecError), own_device(open_storage(url), worker_name(), 1):
            raise AssertionError("the GPU has a worker")
    with own_device(open_storage(url), worker_name(), 1) as device:
        assert device == "3"


def test_a_worker_elsewhere_is_believed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"journal:{tmp_path / 'studies.log'}")
    assert Claims(storage, DEVICES, "another-host:1:2").take_free(["a"]) == "a"
    assert Claims(storage, DEVICES, worker_name()).take_free(["a"]) is None
    monkeypatch.setattr("specattn_codegen.tuning.shared_study.LOST_AFTER_S", 0.0)
    assert Claims(storage, DEVICES, worker_name()).take_free(["a"]) == "a"


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [(None, 2, ["0", "1"]), ("4,5", 2, ["4", "5"]), ("GPU-a, GPU-b,-1", 2, ["GPU-a", "GPU-b"]), (None, 0, [])],
)
def test_devices_are_called_what_cuda_calls_them(variable: str | None, count: int, names: list[str]) -> None:
    assert visible_devices(variable, count) == names


def tune_here(folder: Path, name: str, answers: multiprocessing.Queue[tuple[str, int, list[str]]]) -> None:
    os.environ["SPECATTN_CACHE_DIR"] = str(folder / name)
    arch = dataclasses.replace(cpu_info.detect(measure=False), bandwidth_gbs=10.0, fp32_tflops=0.1, bf16_tflops=0.1)
    target = Target(arch=arch, backend="cpu", is_present=True, page_size=16)
    tasks = [Task(spec=SPEC, workloads=(size,)) for size in SIZES]
    method = Method(storage=open_storage(f"journal:{folder / 'studies.log'}"), workforce=Pretended())
    watcher = Watcher()
    tune(tasks, target, Budget(trials=12, seed=0), watcher, folder / f"{name} packs", method)
    answers.put((name, len(watcher.trials), [trial.workload.name for trial in watcher.trials if trial.workload]))


def test_two_tuners_split_the_searches_and_both_end_with_every_winner(tmp_path: Path) -> None:
    answers: multiprocessing.Queue[tuple[str, int, list[str]]] = FORK.Queue()
    tuners = [FORK.Process(target=tune_here, args=(tmp_path, name, answers)) for name in ("one", "two")]
    for tuner in tuners:
        tuner.start()
    found = [answers.get(timeout=240) for _ in tuners]
    for tuner in tuners:
        tuner.join()
    assert sum(count for _, count, _ in found) == 12 * len(SIZES)
    firsts = [names[0] for _, _, names in found if names]
    assert len(set(firsts)) == len(firsts)
    packs = [pack.load(path) for path in tmp_path.glob("* packs/cpu/*.json")]
    assert [{entry.workload for entry in one.entries} for one in packs] == [set(SIZES)] * 2
    late = FORK.Process(target=tune_here, args=(tmp_path, "late", answers))
    late.start()
    assert answers.get(timeout=240)[1] == 0
    late.join()
    assert pack.load(tmp_path / "late packs" / "cpu" / f"{HEADS.name}.json").coverage == packs[0].coverage
