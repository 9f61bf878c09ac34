"""Searches that several processes share, on every storage: no plan twice, none lost with its worker."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec
from specattn_codegen.tuning.search import Search, Strategy, space_of
from specattn_codegen.tuning.shared_study import Share, open_storage, reap, storage_at, worker_name

SPEC = KernelSpec(
    op="sparse_attention", heads=HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32), selection="layer"
)
TRIALS = 16
WORKERS = 3
SERVER_STARTS_S = 60.0
FORK = multiprocessing.get_context("fork")


def search_on(url: str, seed: int = 0, trials: int = TRIALS) -> Search:
    share = Share(storage=open_storage(url), name="one", worker=worker_name())
    strategy = Strategy(sampler="tpe", trials=trials, seed=seed, share=share)
    return Search(space_of(SPEC, cpu_info.detect(measure=False), "cpu"), seeds=(), strategy=strategy)


def cost(plan: Plan) -> float:
    return 1.0 + abs(plan.integer("key_tile") - 64) + plan.integer("split_keys") / 1e3


def work(url: str, seed: int, results: multiprocessing.Queue[tuple[list[str], list[str]]]) -> None:
    """Searches until there is nothing left; what this worker tried, and what it heard of."""
    search, tried, heard = search_on(url, seed), [], list[str]()
    while plans := search.ask(1):
        tried.append(str(plans[0]))
        time.sleep(0.01)
        search.tell(plans[0], cost(plans[0]), str(plans[0]))
        heard.extend(search.heard())
    results.put((tried, [*heard, *search.heard()]))


def run_together(url: str, workers: int = WORKERS) -> None:
    with storage_at(url) as storage:  # one process makes a database's tables
        assert storage.get_all_studies() == []
    results: multiprocessing.Queue[tuple[list[str], list[str]]] = FORK.Queue()
    processes = [FORK.Process(target=work, args=(url, seed, results)) for seed in range(workers)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    tried = [plan for own, _ in answers for plan in own]
    assert len(tried) == len(set(tried)) == TRIALS
    for own, heard in answers:
        assert not set(own) & set(heard)
        assert set(heard) <= set(tried)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_several_processes_try_every_plan_once(kind: str, tmp_path: Path) -> None:
    run_together(f"journal:{tmp_path / 'studies.log'}" if kind == "journal" else f"sqlite:///{tmp_path / 'studies.db'}")


def server_folder() -> Path | None:
    """Where PostgreSQL's own programs are: on the PATH, or where Debian keeps them."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return candidates[-1] if candidates and (candidates[-1] / "postgres").exists() else None


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of a throw-away cluster on a local port. PostgreSQL refuses to run as root, so `nobody` runs it then."""
    programs = server_folder()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'specattn-codegen[postgresql]'")
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, user)
        data = str(folder / "data")
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "tuner", "--auth=trust", "--no-sync"],
            user=user, cwd=name, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"initdb does not work here: {made.stderr.strip().splitlines()[-1]}")
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", name, "-h", "127.0.0.1", "-p", str(port), "-F"],
            user=user, cwd=name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(port, server)
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SERVER_STARTS_S
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


def test_several_processes_on_postgresql(postgresql: str) -> None:
    run_together(postgresql)


def serve(path: Path, port: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.storages.run_grpc_proxy_server(open_storage(f"journal:{path}"), host="127.0.0.1", port=port)


def test_a_search_through_the_grpc_proxy(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'specattn-codegen[grpc]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(tmp_path / "studies.log", port))
    server.start()
    try:
        open_storage(f"grpc://127.0.0.1:{port}").wait_server_ready(timeout=120)  # pyright: ignore[reportAttributeAccessIssue]
        search = search_on(f"grpc://127.0.0.1:{port}", trials=6)
        tried: list[Plan] = []
        while plans := search.ask(1):
            tried.extend(plans)
            search.tell(plans[0], cost(plans[0]))
        assert len(set(tried)) == 6
        again = search_on(f"journal:{tmp_path / 'studies.log'}", trials=8)
        assert again.left == 2
        assert not set(again.ask(2)) & set(tried)
    finally:
        server.terminate()
        server.join()


def abandon(url: str, results: multiprocessing.Queue[str]) -> None:
    results.put(str(search_on(url).ask(1)[0]))
    time.sleep(600)


def test_a_killed_workers_plan_is_tried_again(tmp_path: Path) -> None:
    url = f"journal:{tmp_path / 'studies.log'}"
    results: multiprocessing.Queue[str] = FORK.Queue()
    process = FORK.Process(target=abandon, args=(url, results))
    process.start()
    taken = results.get(timeout=120)
    search = search_on(url, trials=TRIALS)
    assert search.left == TRIALS - 1
    assert str(search.ask(1)[0]) != taken
    process.kill()
    process.join()
    study = Share(storage=open_storage(url), name="one", worker=worker_name()).open(optuna.samplers.RandomSampler())
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    assert states == [TrialState.FAIL, TrialState.RUNNING]  # the dead worker's, and this one's
    assert reap(study) == 0
    tried = {str(plan) for plan in search.ask(TRIALS)}
    assert search.left == 0
    assert len(tried) == TRIALS - 1
    search.close()
    assert search_on(url).left == TRIALS


def test_a_torn_line_of_a_journal_is_taken_away_by_the_next_writer(tmp_path: Path) -> None:
    journal = tmp_path / "studies.log"
    search = search_on(f"journal:{journal}")
    (plan,) = search.ask(1)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"tri')  # as a kill leaves it
    search.tell(plan, cost(plan))
    assert journal.read_bytes().startswith(whole)
    assert search_on(f"journal:{journal}").left == TRIALS - 1


@pytest.mark.parametrize(
    ("url", "says"),
    [("studies.log", "journal:PATH"), ("journal:", "names no file"), ("nosql://host/db", "cannot be opened")],
)
def test_a_bad_storage_is_one_clear_line(url: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)
