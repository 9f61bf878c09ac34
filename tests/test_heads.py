"""HeadConfig and KernelSpec: derived values, names, sharding and refusals."""

from __future__ import annotations

import math

import pytest

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)


def test_left_out_values_are_the_usual_ones() -> None:
    assert LLAMA.group == 4
    assert LLAMA.v_head_dim == 128
    assert math.isclose(LLAMA.scale, 1 / math.sqrt(128))
    assert HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128) == LLAMA


def test_names_tell_configs_apart() -> None:
    odd = HeadConfig(
        num_q_heads=64, num_kv_heads=8, head_dim=64, v_head_dim=32, softcap=50.0, window=128, sinks=True, scale=0.5
    )
    assert LLAMA.name == "q32-kv8-d128"
    assert odd.name == "q64-kv8-d64-dv32-scale0.5-cap50-w128-sinks"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_q_heads": 30}, "multiple"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_dim": -1}, "head_dim=-1"),
        ({"head_dim": 12.5}, "head_dim=12.5"),
        ({"softcap": 0.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"scale": math.inf}, "scale"),
    ],
)
def test_refusals_name_the_value(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes}
    with pytest.raises(SpecError, match=words):
        HeadConfig(**arguments)  # pyright: ignore[reportArgumentType]


def test_tensor_parallel_ranks_share_or_replicate_kv_heads() -> None:
    assert LLAMA.shard(8) == HeadConfig(num_q_heads=4, num_kv_heads=1, head_dim=128)
    assert LLAMA.shard(16) == HeadConfig(num_q_heads=2, num_kv_heads=1, head_dim=128)
    assert HeadConfig.from_model("llama3-8b", tp=2).num_kv_heads == 4
    for ranks in (0, 3, 64):
        with pytest.raises(SpecError, match=f"tp={ranks}"):
            LLAMA.shard(ranks)


def test_a_spec_carries_only_what_its_operation_uses() -> None:
    verify = KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16", page_size=16, score=ScoreSpec())
    assert verify.name == "verify_attention-all-kv_head-bfloat16-p16"
    assert verify.selection_heads == 8
    assert KernelSpec(op="sparse_attention", heads=LLAMA, selection="layer").selection_heads == 1
    with pytest.raises(SpecError, match="selection"):
        KernelSpec(op="verify_attention", heads=LLAMA, selection="layer")
    with pytest.raises(SpecError, match="emits no scores"):
        KernelSpec(op="select_kv", heads=LLAMA, selection="layer", score=ScoreSpec())
    with pytest.raises(SpecError, match="selection=None"):
        KernelSpec(op="sparse_attention", heads=LLAMA)
    with pytest.raises(SpecError, match="float64"):
        KernelSpec(op="verify_attention", heads=LLAMA, dtype="float64")  # pyright: ignore[reportArgumentType]


def test_scores_that_mean_nothing_are_refused_by_name() -> None:
    wrong = {"rows": "middle", "heads": "group", "value": "rank", "normaliser": "none", "granularity": "page"}
    for field, value in wrong.items():
        with pytest.raises(SpecError, match=f"{field}='{value}'"):
            ScoreSpec(**{field: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="logits are not normalised"):
        ScoreSpec(value="logit", normaliser="reference")
    with pytest.raises(SpecError, match="bins are of non-negative scores"):
        ScoreSpec(value="logit", histogram=True)


def test_a_score_is_named_by_what_it_changes() -> None:
    assert ScoreSpec().name == "all-kv_head"
    score = ScoreSpec(rows="ends", heads="layer", normaliser="reference", granularity="page_max", histogram=True)
    assert score.name == "ends-layer-reference-page_max-histogram"
    assert score.columns(100, 16) == 7
    assert ScoreSpec().columns(100, 16) == 100


def test_an_8_bit_cache_is_named_and_any_other_dtype_than_qs_is_refused() -> None:
    spec = KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16", kv_dtype="float8_e4m3", page_size=16)
    assert spec.name == "verify_attention-bfloat16-float8_e4m3-p16"
    assert (spec.cache_dtype, spec.cache_bytes, spec.dtype_bytes) == ("float8_e4m3", 1, 2)
    same = KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16", kv_dtype="bfloat16")
    assert same == KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16")
    with pytest.raises(SpecError, match="kv_dtype='float16'"):
        KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16", kv_dtype="float16")


def test_workloads_have_possible_sizes() -> None:
    assert Workload(batch=2, q_len=1, kv_len=9, budget=3).name == "b2-q1-n9-k3"
    with pytest.raises(SpecError):
        Workload(batch=0, q_len=1, kv_len=9)
    with pytest.raises(SpecError):
        Workload(batch=1, q_len=10, kv_len=9)
