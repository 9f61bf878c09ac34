"""The resources of both GPU languages: how instructions are counted, and that the committed table is whole."""

from __future__ import annotations

import json
from collections import Counter

from specattn_bench import report, resources
from specattn_codegen.processors import gpus

COMMITTED = report.BENCHMARKS / "results" / "cross-compiled" / "resources.json"


def test_opcodes_are_counted_by_what_they_do() -> None:
    opcodes = Counter({"HMMA.16816.F32.BF16": 3, "LDG.E.128": 2, "LDGSTS.E.BYPASS.128": 5, "BAR.SYNC": 1, "LDS": 4})
    kinds = resources.by_kind(opcodes)
    assert kinds["tensor"] == 3
    assert kinds["global"] == 2  # asynchronous copies are counted apart
    assert kinds["async copies"] == 5
    assert kinds["shared"] == 4
    assert kinds["barriers"] == 1
    assert sum(kinds.values()) == opcodes.total()


def test_the_committed_table_is_whole() -> None:
    kernels = json.loads(COMMITTED.read_text())["kernels"]
    expected = {
        (target, backend, kernel)
        for target in resources.TARGETS
        for backend in resources.LANGUAGES
        for kernel in ("attend_splits", "merge_splits", "score_keys")
    }
    assert {(row["gpu"], row["backend"], row["kernel"]) for row in kernels} == expected
    for row in kernels:
        assert row["spill_bytes"] == 0
        assert row["smem_bytes"] <= gpus.find(row["gpu"]).smem_per_block
        assert row["instructions"]["total"] >= sum(row["instructions"].values()) - row["instructions"]["total"]
    products = [row["instructions"]["tensor"] for row in kernels if row["kernel"] == "attend_splits"]
    assert min(products) > 0
