"""A disk that fills up while something runs: what waits is saved later or named, and lookups go on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from specattn_codegen.errors import BuildError, CacheError, SharingError, UnsavedError
from specattn_codegen.packs import pack
from specattn_codegen.plan import Plan
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outbox import Outbox, require_saved
from specattn_codegen.tuning.outcome import Outcome
from specattn_codegen.tuning.search import Search
from specattn_codegen.tuning.shared_study import storage_at
from specattn_codegen.tuning.worker import WorkerPool
from test_cli_tune import start
from test_shared_study import search_on

SMALL_DISK = "size=3m"
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", SMALL_DISK, "none", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, records: Path | None = None) -> None:
    """Leaves no room for anything more, not even in the last page of the records."""
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free))
    if records is not None:
        with records.open("ab") as file:
            file.write(b"\n" * (-file.tell() % PAGE))


@dataclass
class Shelf:
    """A place that takes `room` items."""

    room: int
    items: list[str]

    def save(self, item: str) -> None:
        if len(self.items) >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.items.append(item)


def box(shelf: Shelf) -> Outbox[str]:
    return Outbox(Path("shelf"), shelf.save, lambda item: f"item {item}")


def test_what_does_not_fit_waits_in_its_order_and_goes_with_the_next(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(room=1, items=[])
    outbox = box(shelf)
    with caplog.at_level(logging.WARNING, logger="specattn"):
        for item in "abc":
            outbox.send([item])
    assert (shelf.items, outbox.waiting) == (["a"], ["b", "c"])
    assert len(caplog.records) == 1
    shelf.room = 9
    outbox.send(["d"])
    assert (shelf.items, outbox.waiting) == (["a", "b", "c", "d"], [])
    require_saved(outbox, outbox)


def test_everything_that_is_left_is_named() -> None:
    full, roomy = box(Shelf(room=1, items=[])), box(Shelf(room=9, items=[]))
    full.send("ab")
    roomy.send("x")
    with pytest.raises(UnsavedError) as caught:
        require_saved(full, roomy)
    first, *named = str(caught.value).splitlines()
    assert first.startswith("shelf: No space left on device; 1 results are not saved")
    assert named == ["  not saved: item b"]


def test_a_bug_is_no_full_disk() -> None:
    def broken(item: str) -> None:
        raise OSError(errno.EBADF, item)

    with pytest.raises(OSError, match="x"):
        Outbox(Path("shelf"), broken, str).send(["x"])


@dataclass(frozen=True)
class Raise:
    error: Exception

    def run(self) -> Outcome:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        BuildError("ptxas: No space left on device"),
        CacheError("cannot write the kernel cache"),
    ],
)
def test_a_worker_that_cannot_write_teaches_nothing_of_its_candidate(error: Exception) -> None:
    with WorkerPool(size=1, deadline_s=30.0) as pool, pytest.raises(CacheError, match=r"No space left|cannot write"):
        list(pool.run([Raise(error)]))


def test_tuning_on_a_disk_that_fills_up_ends_with_its_winners_and_the_names_of_what_is_not_saved(disk: Path) -> None:
    process = start(disk / "packs", "--op", "select_kv", "--trials", "1", SPECATTN_CACHE_DIR=str(disk / "cache"))
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert next(line for line in lines if line.startswith("[1/4]"))
    (records,) = (disk / "cache" / "records").rglob("*.jsonl")
    fill(disk, records)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert out.count("measured") >= 4  # every search ended, and its winner is shown
    shown = err.splitlines()
    headline = next(line for line in shown if line.startswith("error: "))
    assert "No space left on device" in headline
    left = [line for line in shown if line.startswith("  not saved: ")]
    assert {line.split()[2] for line in left} == {"measure", "winner"}
    saved = len(record.read(records))
    assert saved + sum(" measure of " in line for line in left) == 4
    assert pack.load(disk / "packs" / "cpu" / "q8-kv2-d32.json").entries  # whole, as it was before


def tell(url: str, search: Search, plan: Plan) -> None:
    """What `specattn-tune --storage` does with a trial, which here does not fit into what is left of a page."""
    with storage_at(url):
        search.tell(plan, 1.0, "n" * 3 * PAGE)


@pytest.mark.parametrize("scheme", ["journal:", "sqlite:///"])
def test_a_shared_storage_that_fills_up_is_one_clear_line_and_goes_on_with_room(disk: Path, scheme: str) -> None:
    url = f"{scheme}{disk / 'studies'}"
    search = search_on(url)
    (plan,) = search.ask(1)
    fill(disk)
    with pytest.raises(SharingError, match=r"full|No space left") as caught:
        tell(url, search, plan)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    (disk / "ballast").unlink()
    again = search_on(url)
    (other,) = again.ask(1)
    tell(url, again, other)
    assert search_on(url).left == again.left


LOOK_UP = """
import sys, torch
from specattn_codegen import HeadConfig
from specattn_runtime import TopK, load_kernels
kernels = load_kernels(HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32), packs=sys.argv[1:])
chosen = kernels.select_kv(torch.arange(100.0).view(1, 1, 100), torch.tensor([100], dtype=torch.int32), TopK(k=2))
print(chosen.indices.tolist())
"""


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_lookups_and_kernels_go_on_where_the_cache_takes_nothing(disk: Path, state: str) -> None:
    fill(disk)
    if state == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP, disk],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SPECATTN_CACHE_DIR": str(disk / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[[[98, 99]]]"), done.stderr
    assert done.stderr.count("the kernel cache cannot be written") == 1
