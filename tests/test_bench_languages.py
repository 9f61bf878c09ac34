"""Both languages' plans of one search: that the committed answer is whole, and takes nothing that is unproved."""

from __future__ import annotations

import json

from specattn_bench import report
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.workloads import TUNED_OPS, model_specs

COMMITTED = report.BENCHMARKS / "results" / "cross-compiled" / "languages-llama3-8b-h100.json"


def test_the_committed_answer_is_whole() -> None:
    """Every kernel of the model, in both languages; a language that nothing has proved is a rival and no more."""
    answer = json.loads(COMMITTED.read_text())
    heads, arch = HeadConfig.from_model(answer["model"]), gpus.find(answer["gpu"])
    assert arch.is_gpu
    specs = model_specs(heads, dtype="bfloat16", kv_dtype=None, page_size=16, ops=TUNED_OPS)
    assert {entry["kernel"] for entry in answer["entries"]} == {spec.name for spec in specs}
    for entry in answer["entries"]:
        assert entry["backend"] == "triton"
        assert entry["proved_by"].startswith("interpreter")
        assert entry["predicted_us"] > 0
        (rival,) = entry["rivals"]
        assert (rival["backend"], rival["proved_by"]) == ("tilelang", "none")
        assert 0.5 < entry["predicted_us"] / rival["predicted_us"] < 2.0
