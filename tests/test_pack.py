"""Packs: what is written is read, what is damaged is a miss, and labels never mix."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pack_cases import ARCH, HEADS, LARGE, SCORED, SELECT, SMALL, VERIFY, entry, publish
from specattn_codegen import paths, space
from specattn_codegen.environment import silicon
from specattn_codegen.errors import PackError
from specattn_codegen.packs import ladder, pack, pack_file
from specattn_codegen.packs.pack import ChosenBy, Pack
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import Workload


def test_what_is_published_is_loaded_and_reads_well(tmp_path: Path) -> None:
    entries = (entry(), entry(SCORED, LARGE), entry(SELECT))
    path = publish(tmp_path, *entries)
    assert path == tmp_path / "h100" / "q32-kv8-d128.json"
    loaded = pack.load(path)
    assert set(loaded.entries) == set(entries)
    assert loaded.arch == silicon(ARCH)
    plain = json.loads(path.read_text())
    assert plain["schema_version"] == pack_file.SCHEMA_VERSION
    assert plain["heads"]["num_q_heads"] == 32
    assert [one["plan"]["settings"] for one in plain["entries"]] == [one.plan.as_dict() for one in loaded.entries]
    assert plain["licence"] == "Apache-2.0"
    assert plain["coverage"] == {
        "select_kv-kv_head": ["b1-q7-n4096"],
        "verify_attention-all-kv_head-bfloat16-p16": ["b1-q7-n131072"],
        "verify_attention-bfloat16-p16": ["b1-q7-n4096"],
    }
    assert plain["provenance"]["proved_by"] == {"interpreter-float16-twin": 3}
    assert path.read_text() == pack_file.to_text(dict(reversed(plain.items())))
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= pack_file.LINE + len('"digest": ,')
    assert '      "workload": {"batch": 1, "budget": 0, "kv_len": 4096, "q_len": 7}' in lines
    assert pack.encode(loaded) == path.read_text()


def test_new_winners_replace_their_own_bucket_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path, entry(latency_us=20.0), entry(SCORED))
    path = publish(tmp_path, entry(latency_us=10.0, workload=Workload(batch=1, q_len=8, kv_len=4000)))
    entries = pack.load(path).entries
    assert {(one.spec, one.latency_us) for one in entries} == {(VERIFY, 10.0), (SCORED, 12.5)}


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("measured", "modelled", "measured"),
        ("modelled", "measured", "measured"),
        ("measured", "measured", "new"),
        ("modelled", "modelled", "new"),
    ],
)
def test_what_was_measured_never_gives_way_to_a_model(old: ChosenBy, new: ChosenBy, kept: str) -> None:
    first, second = entry(chosen_by=old, latency_us=30.0), entry(chosen_by=new, latency_us=3.0)
    (merged,) = pack.merge([first], [second])
    assert merged == (second if kept == "new" or new == kept else first)


def test_measured_goes_with_a_device_and_nothing_else() -> None:
    with pytest.raises(PackError, match="measured goes with device"):
        dataclasses.replace(entry(chosen_by="measured"), proved_by="interpreter")
    with pytest.raises(PackError, match="measured goes with device"):
        dataclasses.replace(entry(), proved_by="device")


def test_a_failed_write_leaves_the_old_pack_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path, entry())
    before = path.read_bytes()

    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, entry(SCORED))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_pack_of_another_processor_is_not_added_to(tmp_path: Path) -> None:
    publish(tmp_path, entry())
    other = dataclasses.replace(ARCH, num_sms=114)
    with pytest.raises(PackError, match="another processor"):
        publish(tmp_path, entry(SCORED), arch=other)


def test_a_product_that_goes_by_another_name_is_the_same_silicon(tmp_path: Path) -> None:
    path = publish(tmp_path, entry())
    renamed = dataclasses.replace(ARCH, name="h100-80gb-hbm3")
    found = ladder.lookup(VERIFY, SMALL, renamed, [tmp_path])
    assert found is not None
    assert found.rung == "exact"
    plain = json.loads(path.read_text())
    plain["arch"]["name"] = "nvidia-h100"
    path.write_text(pack_file.to_text(plain))
    publish(tmp_path, entry(SCORED))
    assert len(pack.load(path).entries) == 2


# -- versions --------------------------------------------------------------------------------------------------------


def first_schema() -> dict:
    """What version 0.1.0 wrote."""
    plain = json.loads(pack.encode(Pack(arch=silicon(ARCH), heads=HEADS, entries=(entry(),))))
    for name in ("licence", "digest", "coverage", "provenance"):
        del plain[name]
    for one in plain["entries"]:
        del one["space_digest"], one["policy"]
    return plain | {"schema_version": 1}


def test_the_first_schema_is_read_and_written_as_todays(tmp_path: Path) -> None:
    path = pack.pack_path(tmp_path, ARCH, HEADS)
    path.parent.mkdir()
    path.write_text(json.dumps(first_schema(), indent=2, sort_keys=True) + "\n")
    (old,) = pack.load(path).entries
    assert old == dataclasses.replace(entry(), space_digest="")
    publish(tmp_path, entry(SCORED))
    plain = json.loads(path.read_text())
    assert (plain["schema_version"], plain["licence"]) == (2, "Apache-2.0")
    assert set(pack.load(path).entries) == {old, entry(SCORED)}


def test_shipped_packs_keep_their_meaning_when_they_are_written_again(tmp_path: Path) -> None:
    for file in paths.shipped_packs_dir().rglob("*.json"):
        loaded = pack.load(file)
        pack.write(tmp_path / "again.json", loaded)
        assert pack.load(tmp_path / "again.json") == loaded


FUTURE_FIELDS = {
    "pack": (lambda plain: plain.update(signature={"by": ["someone"]}), True),
    "entry": (lambda plain: plain["entries"][0].update(energy_mj=4.5), True),
    "environment": (lambda plain: plain["entries"][0]["environment"].update(driver="570"), True),
    "resources": (lambda plain: plain["entries"][0]["resources"][0].update(barriers=3), True),
    "spec": (lambda plain: plain["entries"][0]["spec"].update(tree_mask=True), False),
    "score": (lambda plain: plain["entries"][0]["spec"]["heads"].update(alibi=True), False),
    "workload": (lambda plain: plain["entries"][0]["workload"].update(draft_len=6), False),
    "heads": (lambda plain: plain["heads"].update(alibi=True), False),
    "a name of ours": (lambda plain: plain["entries"][0].update(unknown="what a later version keeps here"), True),
}


@pytest.mark.parametrize("name", FUTURE_FIELDS)
def test_fields_of_a_later_version_survive_and_change_no_meaning(tmp_path: Path, name: str) -> None:
    """A field that may change what is computed keeps its entry from being used, never from being kept."""
    change, is_usable = FUTURE_FIELDS[name]
    path = publish(tmp_path, entry())
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(pack_file.to_text(plain))
    found = ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path])
    assert (found is not None) == is_usable
    publish(tmp_path, entry(SELECT))
    again = json.loads(path.read_text())
    for derived in ("coverage", "digest", "provenance"):
        del plain[derived], again[derived]
    kept = [one for one in again.pop("entries") if one["spec"]["op"] == "verify_attention"]
    assert kept == plain.pop("entries")
    assert again == plain


def test_an_entry_of_a_later_version_is_not_replaced_by_what_only_looks_alike(tmp_path: Path) -> None:
    path = publish(tmp_path, entry())
    plain = json.loads(path.read_text())
    plain["entries"][0]["spec"]["tree_mask"] = True
    path.write_text(pack_file.to_text(plain))
    publish(tmp_path, entry(latency_us=3.0))
    assert [one.is_understood for one in pack.load(path).entries] == [True, False]


# -- damage ----------------------------------------------------------------------------------------------------------


def spoiled(change: Callable[[dict], object]) -> bytes:
    plain = json.loads(pack.encode(Pack(arch=silicon(ARCH), heads=HEADS, entries=(entry(),))))
    change(plain)
    return pack_file.to_text(plain).encode()


GOOD = spoiled(len)
DAMAGED = {
    "empty": b"",
    "truncated": GOOD[: len(GOOD) // 2],
    "not text": b"\xff\xfe" + GOOD,
    "not an object": b"[]",
    "deep": b"[" * 100_000,
    "deeper than any pack": spoiled(lambda plain: plain.update(more=json.loads("[" * 40 + "]" * 40))),
    "edited by hand": GOOD.replace(b"12.5", b"2.5"),
    "no digest": re.sub(rb'"digest": "[0-9a-f]*",', b"", GOOD),
    "a path for a name": spoiled(lambda plain: plain["arch"].update(name="../../etc")),
    "control characters": spoiled(lambda plain: plain["entries"][0]["environment"].update(device="\x1b[2J")),
    "endless text": spoiled(lambda plain: plain["arch"].update(vendor_note="x" * 5000)),
    "version of no version": spoiled(lambda plain: plain.update(schema_version=-1)),
    "deep inside": GOOD[:-1] + b', "more": ' + b'{"a":' * 100_000,
    "future": spoiled(lambda plain: plain.update(schema_version=3)),
    "boolean version": spoiled(lambda plain: plain.update(schema_version=True)),
    "no version": spoiled(lambda plain: plain.pop("schema_version")),
    "entries not a list": spoiled(lambda plain: plain.update(entries={})),
    "null plan": spoiled(lambda plain: plain["entries"][0].update(plan=None)),
    "wrong type": spoiled(lambda plain: plain["entries"][0]["workload"].update(batch="1")),
    "float size": spoiled(lambda plain: plain["entries"][0]["workload"].update(batch=1.5)),
    "huge size": spoiled(lambda plain: plain["entries"][0]["workload"].update(kv_len=10**400)),
    "huge time": spoiled(lambda plain: plain["entries"][0].update(latency_us=10**400)),
    "huge heads": spoiled(lambda plain: plain["heads"].update(num_q_heads=10**400 + 1)),
    "no time": spoiled(lambda plain: plain["entries"][0].update(latency_us=0)),
    "unproved": spoiled(lambda plain: plain["entries"][0].update(proved_by="none")),
    "unknown label": spoiled(lambda plain: plain["entries"][0].update(chosen_by="simulated")),
    "mixed labels": spoiled(lambda plain: plain["entries"][0].update(chosen_by="measured")),
    "impossible heads": spoiled(lambda plain: plain["entries"][0]["spec"]["heads"].update(num_kv_heads=5)),
    "other heads": spoiled(lambda plain: plain["heads"].update(num_kv_heads=4)),
    "missing field": spoiled(lambda plain: plain["entries"][0].pop("source_digest")),
    "infinity": GOOD.replace(b"12.5", b"1e999"),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_one_line_and_a_miss_with_one_warning(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = pack.pack_path(tmp_path, ARCH, HEADS)
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with pytest.raises(PackError) as caught:
        pack.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="specattn"):
        assert ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None
        assert ladder.lookup(SCORED, LARGE, ARCH, [tmp_path]) is None
    assert len(caplog.records) == 1
    with pytest.raises(PackError):
        publish(tmp_path, entry())
    assert path.read_bytes() == text


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    path = pack.pack_path(tmp_path, ARCH, HEADS)
    path.parent.mkdir()
    os.mkfifo(path)
    assert ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None
    path.unlink()
    with path.open("wb") as file:
        file.truncate(pack_file.LARGEST_FILE + 1)
    with pytest.raises(PackError, match="at most"):
        pack.load(path)


def test_a_folder_where_a_pack_should_be_is_a_miss(tmp_path: Path) -> None:
    pack.pack_path(tmp_path, ARCH, HEADS).mkdir(parents=True)
    assert ladder.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None


def never_raises(path: Path, text: bytes, arch: Arch = ARCH) -> None:
    path.write_bytes(text)
    with contextlib.suppress(PackError):
        pack.load(path)
    found = ladder.lookup(VERIFY, SMALL, arch, [path.parent.parent])
    assert found is None or space.why_invalid(found.plan, VERIFY, arch) is None


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = pack.pack_path(tmp_path_factory.mktemp("packs"), ARCH, HEADS)
    path.parent.mkdir()
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(GOOD)), length=st.integers(0, 40), junk=st.binary(max_size=12))
def test_no_change_of_bytes_crashes_a_reader(victim: Path, start: int, length: int, junk: bytes) -> None:
    never_raises(victim, GOOD[:start] + junk + GOOD[start + length :])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


PLAIN = json.loads(GOOD)
PLACES = [place for place in places(PLAIN) if place]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON_VALUES)
def test_no_value_in_any_place_crashes_a_reader(victim: Path, place: tuple[str | int, ...], value: object) -> None:
    plain = copy.deepcopy(PLAIN)
    parent = plain
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    never_raises(victim, pack_file.to_text(plain).encode())
