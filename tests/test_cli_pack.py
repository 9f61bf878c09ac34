"""specattn-pack as a user calls it: what is shown, what is refused and with which exit code, what is left on disk."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pack_cases import ARCH, HEADS, LARGE, SCORED, SELECT, SMALL, VERIFY, entry, publish
from specattn_codegen import paths
from specattn_codegen.cli import pack as cli
from specattn_codegen.environment import silicon
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder, pack, pack_file, pack_merge
from specattn_codegen.packs.explain import neighbours
from specattn_codegen.packs.pack import ChosenBy, Pack
from specattn_codegen.processors import gpus

TINY = ("--q-len", "1", "--kv-len", "256")  # far from LARGE
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own layer; nothing but it and the shipped packs is there."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    monkeypatch.delenv("SPECATTN_CONFIG_DIR", raising=False)
    return tmp_path / "config" / "specattn" / "tuned_configs"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code, and what it says on both streams."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specattn-pack", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def written(path: Path, *entries: pack.Entry, arch: str = "h100") -> Path:
    pack.write(path, Pack(arch=silicon(gpus.find(arch)), heads=HEADS, entries=pack.in_order(entries)))
    return path


def test_packs_are_listed_by_layer_and_a_bad_one_says_why(run: Run, user: Path) -> None:
    publish(user, entry(), entry(SCORED))
    (user / "h200").mkdir()
    (user / "h200" / "q32-kv8-d128.json").write_text("{")
    code, out, _ = run("list", "--json")
    assert code == 0
    rows = {(row["layer"], row["pack"]): row for row in json.loads(out)}
    assert rows["user", "h100/q32-kv8-d128"]["label"] == "2 modelled"
    assert "unreadable" in rows["user", "h200/q32-kv8-d128"]["label"]
    assert ("shipped", "h100/q32-kv8-d128") in rows
    code, out, _ = run("list")
    assert code == 0
    assert "site: none in" in out
    assert out.index("user ") < out.index("shipped ")
    assert "today" not in out
    rows = {(row["layer"], row["pack"]): row["today"] for row in json.loads(run("list", "--json", "--today")[1])}
    assert rows["user", "h100/q32-kv8-d128"] == "2 exact"
    assert rows["user", "h200/q32-kv8-d128"] == ""


def test_many_packs_of_a_processor_are_one_line_until_it_is_named(run: Run, user: Path) -> None:
    for group in range(1, 11):
        heads = HeadConfig(num_q_heads=8 * group, num_kv_heads=8, head_dim=128)
        spec = dataclasses.replace(VERIFY, heads=heads)
        found = Pack(arch=silicon(ARCH), heads=heads, entries=(dataclasses.replace(entry(), spec=spec),))
        pack.write(user / "h100" / f"{heads.name}.json", found)
    (user / "h100" / "bad.json").write_text("{")
    code, out, _ = run("list", "--today")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "h100: 10 packs" in line]
    assert line.split()[:6] == ["user", "h100:", "10", "packs", "10", "10"]
    assert "10 modelled" in line
    assert "q80-kv8-d128" not in out
    assert "h100/bad" in out
    _, out, _ = run("list", "h100")
    assert all(f"h100/q{8 * group}-kv8-d128" in out for group in range(1, 11))
    assert len(json.loads(run("list", "--json")[1])) >= 11
    assert run("list", "a100", "--packs", str(user))[1].count("q8-kv8-d128") == 0


def test_a_pack_is_shown_with_what_holds_today(run: Run, user: Path) -> None:
    path = publish(user, entry(), dataclasses.replace(entry(SCORED), source_digest="0" * 20))
    code, out, _ = run("show", "h100/q32-kv8-d128")
    assert code == 0
    assert str(path) in out  # the user's, before the shipped one of that name
    assert json.loads(path.read_text())["digest"] in out
    for words in ("Apache-2.0", "2 modelled", "exact: ", "stale: ", "12.5 us"):
        assert words in out
    code, _, err = run("show", "h100/nope")
    assert code == 2
    assert "specattn-pack list" in err
    assert err.count("\n") == 1


def test_help_teaches_and_no_command_is_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert out == run("--help")[1]
    for words in ("specattn-pack verify path/to/packs", "SPECATTN_CONFIG_DIR", "WHAT, below"):
        assert words in out


def test_verify_refuses_damage_and_dead_plans_in_a_line_each(run: Run, tmp_path: Path) -> None:
    good = publish(tmp_path / "good", entry())
    edited, cut, dead, future = (tmp_path / f"{name}.json" for name in ("edited", "cut", "dead", "future"))
    edited.write_text(good.read_text().replace("12.5", "1.25"))
    cut.write_text(good.read_text()[:500])
    written(dead, dataclasses.replace(entry(), plan=entry().plan.replace(block_n=48)))
    future.write_text(pack_file.to_text(json.loads(good.read_text()) | {"schema_version": 9}))
    assert run("verify", good)[:2] == (0, f"ok: {good}: 1 entries, 1 exact\n")
    reasons = {
        edited: "digest",
        cut: "not a pack",
        dead: "1 invalid",
        future: "schema_version 9",
        tmp_path / "no": "No",
    }
    for path, words in reasons.items():
        code, out, err = run("verify", path)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert str(path) in err
        assert words in err
    code, out, err = run("verify", tmp_path)
    assert (code, out.count("\n"), err.count("\n")) == (2, 1, 4)


def test_what_a_terminal_would_obey_is_not_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "evil\x1b[31m\nname.json").write_text("{}")
    shown = [run("verify", tmp_path), run("list", "--packs", tmp_path), run("list", "--json", "--packs", tmp_path)]
    assert [code for code, _, _ in shown] == [2, 0, 0]
    assert all("\x1b" not in out + err for _, out, err in shown)
    assert "evil?[31m?name" in shown[0][2]
    assert shown[0][2].count("\n") == 1


def test_fresh_also_refuses_what_is_stale(run: Run, tmp_path: Path) -> None:
    old = written(tmp_path / "old.json", dataclasses.replace(entry(), source_digest="0" * 20))
    assert run("verify", old)[0] == 0
    code, _, err = run("verify", "--fresh", old)
    assert code == 2
    assert "1 stale" in err


def test_a_difference_is_shown_and_is_exit_code_1(run: Run, tmp_path: Path) -> None:
    before = written(tmp_path / "before.json", entry(), entry(SELECT), entry(SCORED))
    after = written(tmp_path / "after.json", entry(num_warps=8), entry(SCORED), entry(workload=LARGE))
    assert run("diff", before, before)[:2] == (0, "equal: 3 entries\n")
    code, out, _ = run("diff", before, after)
    assert code == 1
    assert "3 of 3 entries differ" in out
    signs = [line.split()[0] for line in out.splitlines() if "verify" in line or "select" in line]
    assert sorted(signs) == ["+", "-", "~"]


Measurement = tuple[ChosenBy, float, float]  # label, latency_us, noise_us
MERGES: dict[str, tuple[Measurement, Measurement, float]] = {
    "the later of two models": (("modelled", 9.0, 0.0), ("modelled", 11.0, 0.0), 11.0),
    "measured before modelled": (("measured", 20.0, 1.0), ("modelled", 5.0, 0.0), 20.0),
    "measured after modelled": (("modelled", 5.0, 0.0), ("measured", 20.0, 1.0), 20.0),
    "faster beyond noise": (("measured", 20.0, 1.0), ("measured", 17.0, 1.0), 17.0),
    "faster within noise": (("measured", 20.0, 1.0), ("measured", 18.5, 1.0), 20.0),
}


POLICIES = ((9.0, "blocks, median"), (20.0, "graphs, median"))


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_keeps_the_better(run: Run, tmp_path: Path, name: str) -> None:
    first, second, kept = MERGES[name]
    files = [
        written(tmp_path / f"{i}.json", dataclasses.replace(entry(chosen_by=label, latency_us=us), noise_us=noise))
        for i, (label, us, noise) in enumerate((first, second))
    ]
    assert run("merge", *files, "--out", tmp_path / "out.json")[0] == 0
    (best,) = pack.load(tmp_path / "out.json").entries
    assert best.latency_us == kept


def test_times_of_two_policies_do_not_compare() -> None:
    old, new = (dataclasses.replace(entry(chosen_by="measured", latency_us=us), policy=how) for us, how in POLICIES)
    assert pack_merge.better(old, new) == new
    assert pack_merge.better(old, dataclasses.replace(new, policy=old.policy)) == old


def test_a_merge_joins_licences_and_unknown_fields_and_refuses_other_processors(run: Run, tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.json", entry())
    theirs = written(tmp_path / "theirs.json", entry(SCORED))
    plain = json.loads(theirs.read_text()) | {"licence": "MIT", "novel": {"a": 1}}
    theirs.write_text(pack_file.to_text(plain))
    assert run("merge", mine, theirs, "--out", tmp_path / "out.json")[0] == 0
    merged = json.loads((tmp_path / "out.json").read_text())
    assert merged["licence"] == "Apache-2.0 AND MIT"
    assert merged["novel"] == {"a": 1}
    assert len(merged["entries"]) == 2
    other = written(tmp_path / "other.json", entry(), arch="a100")
    code, _, err = run("merge", mine, other, "--out", tmp_path / "out.json")
    assert code == 2
    assert "different processors" in err
    assert json.loads((tmp_path / "out.json").read_text()) == merged


def test_what_is_installed_is_found_and_what_is_bad_is_not_installed(run: Run, tmp_path: Path, user: Path) -> None:
    shared = written(tmp_path / "shared.json", entry(num_warps=8))
    code, out, _ = run("install", shared)
    assert code == 0
    assert "1 of 1" in out
    found = ladder.lookup(VERIFY, SMALL, ARCH, [user])
    assert found is not None
    assert found.plan["num_warps"] == 8
    assert "0 of 1" in run("install", shared)[1]
    shared.write_text(shared.read_text().replace('"num_warps": 8', '"num_warps": 4'))
    code, _, err = run("install", shared)
    assert code == 2
    assert "digest" in err
    hostile = tmp_path / "hostile.json"
    plain = json.loads(pack.pack_path(user, ARCH, HEADS).read_text())
    plain["arch"]["name"] = "../../../escaped"
    hostile.write_text(pack_file.to_text(plain))
    assert run("install", hostile)[0] == 2
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list", "h1000"), "h1000: no layer has packs for it; there are some for a100, "),
        (("show", "h100/q32-kv8-d129"), "did you mean h100/q32-kv8-d128"),
        (("show", "tests"), "no such file and no pack of that name"),
        (("explain", "--model", "llama3-8b", "--gpu", "h100", "--q-len", "0"), "q_len=0"),
        (("explain", "--model", "llama3-8b", "--gpu", "h100", "--page-size", "0"), "'--page-size': 0"),
        (
            ("explain", "--model", "llama3-8b", "--gpu", "h100", "--score", "all,ends"),
            "all and ends are both of its rows",
        ),
        (("explain", "--model", "llama3-8b", "--gpu", "h100", "--score", "some"), "at most one of each kind"),
        (("verfy",), "see specattn-pack --help"),
    ],
)
def test_a_wrong_use_is_one_line_that_says_what_to_do(run: Run, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_only_what_still_holds_is_promoted(run: Run, tmp_path: Path, user: Path) -> None:
    stale = dataclasses.replace(entry(SELECT), source_digest="0" * 20)
    publish(user, entry(), entry(SCORED, chosen_by="measured"), stale)
    code, out, _ = run("promote", "h100/q32-kv8-d128", "--to", "site")
    assert code == 0
    assert "left behind: 1 entries" in out
    site = tmp_path / "site" / "specattn" / "tuned_configs"
    assert set(pack.load(pack.pack_path(site, ARCH, HEADS)).entries) == {entry(), entry(SCORED, chosen_by="measured")}
    assert run("promote", "h100/q32-kv8-d128", "--to", tmp_path / "mine", "--measured")[0] == 0
    assert len(pack.load(pack.pack_path(tmp_path / "mine", ARCH, HEADS)).entries) == 1
    code, _, err = run("promote", written(tmp_path / "old.json", stale), "--to", "site")
    assert code == 2
    assert "none of its 1 entries holds today" in err


def test_an_explanation_names_rung_plan_source_and_differences(
    run: Run, user: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "shipped_packs_dir", lambda: tmp_path / "nothing ships")
    publish(user, entry(), entry(SCORED), arch=gpus.find("h100-pcie"))
    asked = ("explain", "--heads", "32,8,128", "--gpu", "h100-pcie", "--batch", "4")
    code, out, _ = run(*asked)
    assert code == 0
    for words in ("rung     nearest", "batch: 1 there, 4 asked", "to tune it: specattn-tune --heads 32,8,128"):
        assert words in out
    assert "rung     exact" in run(*asked[:-2])[1]
    assert "rung     default" in run(*asked, "--dtype", "float16")[1]
    tuned = entry(workload=LARGE, merge="fused", block_m=16)
    publish(tmp_path / "large", tuned)
    assert "rung     model" in run(*asked[:3], "--gpu", "h100", "--packs", tmp_path / "large", *TINY)[1]
    assert "rung     sibling" in run(*asked[:3], "--gpu", "h200", "--packs", user, "--page-size", "16")[1]
    code, _, err = run(*asked, "--score", "every")
    assert code == 2
    assert "--score 'every'" in err


def test_neighbours_come_by_structure_then_distance_and_say_why_they_do_not_serve(tmp_path: Path) -> None:
    dead = dataclasses.replace(entry(workload=LARGE), plan=entry().plan.replace(block_n=48))
    publish(tmp_path, entry(), dead, entry(SCORED), entry(SELECT))
    near = neighbours(ladder.read(ARCH, HEADS, [tmp_path]), VERIFY, dataclasses.replace(LARGE, kv_len=100_000))
    assert [one.candidate.entry for one in near] == [dead, entry(), entry(SCORED)]
    assert near[0].differences == ("not usable: block_n=48 is not one of 16, 32, 64, 128",)
    assert near[1].differences == ("kv_len: 4096 there, 100000 asked",)
    assert near[2].differences[0].startswith("score: all-kv_head-weight")


def test_changes_are_the_places_filled_differently() -> None:
    before, after = (
        Pack(arch=silicon(ARCH), heads=HEADS, entries=entries)
        for entries in ((entry(), entry(SELECT)), (entry(latency_us=1.0), entry(SCORED)))
    )
    found = [(change.before, change.after) for change in pack_merge.changes(before, after)]
    assert set(found) == {(entry(), entry(latency_us=1.0)), (entry(SELECT), None), (None, entry(SCORED))}
    assert pack_merge.changes(before, before) == []
