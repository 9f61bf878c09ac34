"""Content-addressed folders: whole or absent, whatever fails and whoever races."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from specattn_codegen.build.store import publish
from specattn_codegen.errors import BuildError, CacheError


def fill(folder: Path) -> None:
    (folder / "data").write_text("whole")


def test_published_once_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "a" / "key"
    assert publish(target, fill) == target
    assert (target / "data").read_text() == "whole"

    def never(_: Path) -> None:
        raise AssertionError("a folder that is there is not written again")

    assert publish(target, never) == target


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise BuildError("the compiler refused")

    with pytest.raises(BuildError, match="refused"):
        publish(tmp_path / "key", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match=r"No space left.*SPECATTN_CACHE_DIR"):
        publish(tmp_path / "key", full)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_serves_this_process_from_elsewhere_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, logger="specattn"):
        made = [publish(blocked / name, fill) for name in ("one", "two", "one")]
    assert [(folder / "data").read_text() for folder in made] == ["whole"] * 3
    assert made[0] == made[2] != made[1]
    assert len(caplog.records) == 1
    assert "SPECATTN_CACHE_DIR" in caplog.text


def test_racing_writers_agree(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write(folder: Path) -> None:
        barrier.wait()
        fill(folder)

    threads = [threading.Thread(target=publish, args=(tmp_path / "key", write)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key" / "data").read_text() == "whole"


def test_a_killed_writer_publishes_nothing(tmp_path: Path) -> None:
    """The process dies between writing and renaming; what it leaves is not the folder and harms no later writer."""
    code = (
        "import os, signal, pathlib, sys\n"
        "from specattn_codegen.build.store import publish\n"
        "def write(folder):\n"
        "    (folder / 'data').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "publish(pathlib.Path(sys.argv[1]), write)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "key")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "key").exists()
    publish(tmp_path / "key", fill)
    assert (tmp_path / "key" / "data").read_text() == "whole"
