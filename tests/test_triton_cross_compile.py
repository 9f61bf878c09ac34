"""Compiling for GPUs that are absent: every operation on every supported architecture, resources from the binaries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compile_matrix
from specattn_codegen import space
from specattn_codegen.build import cross_compile
from specattn_codegen.build.disassemble import amdgcn_usage
from specattn_codegen.errors import BuildError
from specattn_codegen.processors import gpus
from specattn_codegen.render import render
from specattn_codegen.space.triton import merges_last

# sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 and gfx942, for two processes.
BATCHES = (("h100", "a100", "l4", "a10"), ("mi300x", "b200", "rtx5090"))
ARCHS = [name for batch in BATCHES for name in batch]


def _start(archs: tuple[str, ...]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path(compile_matrix.__file__))
    return subprocess.Popen([sys.executable, script, *archs], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for process in [_start(batch) for batch in BATCHES]:
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0
        results |= json.loads(output)
    return results


@pytest.mark.triton_sample
@pytest.mark.parametrize("arch", ARCHS)
def test_default_plans_compile_and_fit(compiled: dict[str, Any], arch: str) -> None:
    limits = gpus.find(arch)
    for name, spec, plan in compile_matrix.matrix(limits):
        kernels = {usage["kernel"]: usage for usage in compiled[f"{arch} {name}"]["resources"]}
        expected = {"select_rows", "unite_rows"} if spec.op == "select_kv" else {"attend_splits", "merge_splits"}
        if spec.op != "select_kv" and merges_last(plan):
            expected = {"attend_splits"}
        assert set(kernels) == expected | ({"score_keys"} if spec.score else set())
        for usage in kernels.values():
            assert usage["spill_bytes"] == 0, (name, usage)
            assert 4 <= usage["registers"] <= (512 if limits.vendor == "amd" else 255), (name, usage)
            assert usage["smem_bytes"] <= limits.smem_per_block, (name, usage)
            assert usage["binary_bytes"] > 1000, (name, usage)
            assert usage["num_warps"] in (4, 8), (name, usage)


@pytest.mark.parametrize("arch", ARCHS)
def test_estimated_shared_memory_is_what_the_compiler_takes(compiled: dict[str, Any], arch: str) -> None:
    for name, spec, _ in compile_matrix.matrix(gpus.find(arch)):
        if spec.op == "select_kv":
            continue
        entry = compiled[f"{arch} {name}"]
        taken = next(usage["smem_bytes"] for usage in entry["resources"] if usage["kernel"] == "attend_splits")
        assert 0.95 * taken <= entry["estimate"] <= 1.3 * taken, (name, taken, entry["estimate"])


def test_a_compiler_error_is_one_line(compiled: dict[str, Any]) -> None:
    message = compiled["broken"]
    assert message.startswith("attend_splits does not compile for h100: ")
    assert "\n" not in message


def test_results_are_kept(compiled: dict[str, Any]) -> None:
    """What another process compiled is read from the cache, even here where the interpreter stands for the compiler."""
    arch = gpus.find("h100")
    name, spec, plan = compile_matrix.matrix(arch)[0]
    resources = cross_compile.cross_compile(render(spec, plan, "triton"), arch)
    assert [usage["registers"] for usage in compiled[f"h100 {name}"]["resources"]] == [r.registers for r in resources]


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="a GPU is here, so nothing is interpreted")
def test_the_interpreter_cannot_cross_compile() -> None:
    arch = gpus.find("h100")
    spec = compile_matrix.verify(compile_matrix.LLAMA, None, page_size=48)
    with pytest.raises(BuildError, match="unset it"):
        cross_compile.cross_compile(render(spec, space.default_plan(spec, arch, "triton"), "triton"), arch)


def test_an_unreadable_listing_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="vgpr_count"):
        amdgcn_usage("; no metadata here")
