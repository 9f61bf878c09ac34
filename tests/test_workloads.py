"""What is tuned by default."""

from __future__ import annotations

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import TopK
from specattn_codegen.processors import gpus
from specattn_codegen.spec import OPS
from specattn_codegen.workloads import default_workloads, model_specs

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)


def names(heads: HeadConfig) -> list[str]:
    return [spec.name for spec in model_specs(heads, dtype="bfloat16", page_size=16, ops=OPS)]


def test_the_presets_find_their_kernels() -> None:
    assert names(LLAMA) == [
        "verify_attention-bfloat16-p16",
        "verify_attention-all-kv_head-bfloat16-p16",
        "verify_attention-ends-layer-bfloat16-p16",
        "verify_attention-all-kv_head-reference-bfloat16-p16",
        "select_kv-kv_head",
        "select_kv-layer",
        "sparse_attention-kv_head-bfloat16-p16",
        "sparse_attention-layer-bfloat16-p16",
    ]


def test_a_layer_with_a_window_is_only_verified_densely() -> None:
    windowed = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128, window=4096)
    assert names(windowed) == ["verify_attention-bfloat16-p16"]


def test_workloads_fit_their_op() -> None:
    arch = gpus.find("h100")
    for spec in model_specs(LLAMA, dtype="bfloat16", page_size=16, ops=OPS):
        workloads = default_workloads(spec, arch)
        assert len(set(workloads)) == len(workloads)
        for workload in workloads:
            prefix = workload.kv_len - workload.q_len
            wanted = 0 if spec.op == "verify_attention" else TopK(ratio=0.07).budget(prefix)
            assert workload.budget == wanted
            assert spec.op != "sparse_attention" or workload.q_len == 1
