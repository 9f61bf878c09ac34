"""Packs: what is written is read, what is damaged is a miss, and labels never mix."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specattn_codegen import gpus, pack, space
from specattn_codegen.arch import Arch
from specattn_codegen.build.resources import Resources
from specattn_codegen.environment import current, silicon
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.pack import ChosenBy, Entry
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

ARCH = gpus.find("h100")
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
SCORED = dataclasses.replace(VERIFY, score=ScoreSpec())
SELECT = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
SMALL = Workload(batch=1, q_len=7, kv_len=4096)
LARGE = Workload(batch=1, q_len=7, kv_len=131072)


def entry(
    spec: KernelSpec = VERIFY,
    workload: Workload = SMALL,
    chosen_by: ChosenBy = "modelled",
    latency_us: float = 12.5,
    **settings: int,
) -> Entry:
    return Entry(
        spec=spec,
        workload=workload,
        plan=space.default_plan(spec, ARCH, "triton").replace(**settings),
        chosen_by=chosen_by,
        proved_by="device" if chosen_by == "measured" else "interpreter-float16-twin",
        latency_us=latency_us,
        noise_us=0.0,
        share_of_ceiling=0.5,
        resources=(
            Resources(
                kernel="attend_splits", registers=96, spill_bytes=0, smem_bytes=40960, num_warps=4, binary_bytes=9
            ),
        ),
        source_digest="0123456789abcdef0123",
        environment=current("triton", None),
    )


def publish(root: Path, *entries: Entry) -> Path:
    return pack.publish(root, ARCH, HEADS, entries)


def test_what_is_published_is_loaded_and_reads_well(tmp_path: Path) -> None:
    entries = (entry(), entry(SCORED, LARGE), entry(SELECT))
    path = publish(tmp_path, *entries)
    assert path == tmp_path / "h100" / "q32-kv8-d128.json"
    loaded = pack.load(path)
    assert set(loaded.entries) == set(entries)
    assert loaded.arch == silicon(ARCH)
    plain = json.loads(path.read_text())
    assert plain["schema_version"] == pack.SCHEMA_VERSION
    assert plain["heads"]["num_q_heads"] == 32
    assert [one["plan"]["settings"] for one in plain["entries"]] == [one.plan.as_dict() for one in loaded.entries]
    assert path.read_text() == json.dumps(plain, indent=2, sort_keys=True) + "\n"
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
        pack.publish(tmp_path, other, HEADS, [entry(SCORED)])
    assert pack.lookup(VERIFY, SMALL, other, [tmp_path]) is None


# -- lookup ----------------------------------------------------------------------------------------------------------


def test_the_own_bucket_then_the_nearest_then_nothing(tmp_path: Path) -> None:
    near, far = entry(block_n=32), entry(workload=LARGE, block_n=64)
    publish(tmp_path, near, far)

    def found(**sizes: int) -> tuple[str, Entry] | None:
        hit = pack.lookup(VERIFY, dataclasses.replace(SMALL, **sizes), ARCH, [tmp_path])
        return hit and (hit.rung, hit.entry)

    assert found() == ("exact", near)
    assert found(q_len=8, kv_len=4500) == ("exact", near)
    assert found(kv_len=16384) == ("nearest", near)  # 2 octaves from 4096, 3 from 131072
    assert found(kv_len=65536) == ("nearest", far)
    assert found(batch=16) == ("nearest", near)
    assert found(batch=64) is None
    assert pack.lookup(SCORED, SMALL, ARCH, [tmp_path]) is None
    assert pack.lookup(dataclasses.replace(VERIFY, dtype="float16"), SMALL, ARCH, [tmp_path]) is None


def test_the_first_layer_that_has_the_bucket_wins(tmp_path: Path) -> None:
    layers = [tmp_path / name for name in ("first", "second", "absent")]
    publish(layers[0], entry(workload=LARGE, latency_us=1.0))
    publish(layers[1], entry(latency_us=2.0), entry(workload=LARGE, latency_us=3.0))
    small, large = (pack.lookup(VERIFY, workload, ARCH, layers) for workload in (SMALL, LARGE))
    assert small is not None
    assert (small.rung, small.entry.latency_us) == ("exact", 2.0)  # exact in a later layer before nearest in an earlier
    assert large is not None
    assert large.entry.latency_us == 1.0


def test_selection_serves_every_cache_dtype_and_page_size(tmp_path: Path) -> None:
    publish(tmp_path, entry(SELECT))
    asked = dataclasses.replace(SELECT, dtype="bfloat16", page_size=16)
    hit = pack.lookup(asked, SMALL, ARCH, [tmp_path])
    assert hit is not None
    assert hit.plan == space.default_plan(SELECT, ARCH, "triton")


@pytest.mark.parametrize("change", [{"block_n": 48}, {"block_n": "64"}, {"novel": 1}, {"block_m": 64, "num_warps": 2}])
def test_a_plan_outside_todays_space_is_not_believed(tmp_path: Path, change: dict[str, object]) -> None:
    path = publish(tmp_path, entry())
    plain = json.loads(path.read_text())
    plain["entries"][0]["plan"]["settings"].update(change)
    path.write_text(json.dumps(plain))
    pack.load(path)
    assert pack.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None


# -- damage ----------------------------------------------------------------------------------------------------------


def spoiled(change: Callable[[dict], object]) -> bytes:
    plain = json.loads(pack.encode(pack.Pack(schema_version=1, arch=silicon(ARCH), heads=HEADS, entries=(entry(),))))
    change(plain)
    return json.dumps(plain).encode()


GOOD = spoiled(len)
DAMAGED = {
    "empty": b"",
    "truncated": GOOD[: len(GOOD) // 2],
    "not text": b"\xff\xfe" + GOOD,
    "not an object": b"[]",
    "deep": b"[" * 100_000,
    "deep inside": GOOD[:-1] + b', "more": ' + b'{"a":' * 100_000,
    "future": spoiled(lambda plain: plain.update(schema_version=2)),
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
        assert pack.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None
        assert pack.lookup(SCORED, LARGE, ARCH, [tmp_path]) is None
    assert len(caplog.records) == 1
    with pytest.raises(PackError):
        publish(tmp_path, entry())
    assert path.read_bytes() == text


def test_a_folder_where_a_pack_should_be_is_a_miss(tmp_path: Path) -> None:
    pack.pack_path(tmp_path, ARCH, HEADS).mkdir(parents=True)
    assert pack.lookup(VERIFY, SMALL, ARCH, [tmp_path]) is None


def never_raises(path: Path, text: bytes, arch: Arch = ARCH) -> None:
    path.write_bytes(text)
    with contextlib.suppress(PackError):
        pack.load(path)
    found = pack.lookup(VERIFY, SMALL, arch, [path.parent.parent])
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
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
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
    never_raises(victim, json.dumps(plain).encode())
