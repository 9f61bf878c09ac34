"""Exported binaries: what a folder holds, and that it runs where this project and TileLang cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specattn_codegen.build import tilelang
from specattn_codegen.cli import export as cli
from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.export.cubins import compiled
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang import env

needs_nvcc = pytest.mark.skipif(not env.CUDA_HOME, reason="nvcc is not installed, and TileLang compiles with it")

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS, dtype="float16", page_size=16)

# A process that cannot import this project, TileLang or a compiler, whatever is installed.
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("specattn_codegen", "specattn_runtime", "tilelang", "tvm_ffi", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch
import my_kernels as kernels
(operation,) = kernels.KERNELS
"""
WITHOUT_A_GPU = """
text = kernels.module_of(operation)
assert text.workspace_bytes(total_q=2, batch=2, max_q=1, max_kv=64, num_sms=4) > 0
try:
    kernels._functions(operation, 8)
except (kernels.cubin.CudaError, AssertionError, RuntimeError) as error:
    print("refused:", type(error).__name__)
"""
# Eight equal keys: whatever the weights, a row's result is their one value.
ON_A_GPU = """
q = torch.randn(2, 4, 32, dtype=torch.float16, device="cuda")
k_cache = torch.randn(3, 16, 2, 32, dtype=torch.float16, device="cuda")
v_cache = torch.ones(3, 16, 2, 32, dtype=torch.float16, device="cuda")
numbers = lambda *values: torch.tensor(values, dtype=torch.int32, device="cuda")
out, lse = torch.empty_like(q), torch.empty(2, 4, device="cuda")
sizes = dict(max_q=1, max_kv=32)
scratch = kernels.workspace_bytes(operation, total_q=2, batch=2, **sizes)
workspace = torch.empty(scratch, dtype=torch.uint8, device="cuda")
kernels.launch(
    operation, q=q, k_cache=k_cache, v_cache=v_cache, page_table=numbers(2, 0, 1, 1).view(2, 2),
    kv_lens=numbers(20, 5), cu_q=numbers(0, 1, 2), out=out, lse=lse, workspace=workspace, **sizes,
)
torch.cuda.synchronize()
torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-3, atol=2e-3)
keys = torch.cat([k_cache[2], k_cache[0][:4]]).float()
logits = torch.einsum("hd,nhd->hn", q[0].float(), keys.repeat_interleave(2, 1)) * 32**-0.5
torch.testing.assert_close(lse[0], logits.logsumexp(1), rtol=2e-3, atol=2e-3)
print("as expected")
"""


def exported(folder: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the command writes, of one kernel."""
    wanted = ("--heads", "4,2,32", "--gpu", gpu, "--layout", "cubins", "--name", "my-kernels", "--out", str(folder))
    monkeypatch.setattr(sys, "argv", ["specattn-export", *wanted])
    monkeypatch.setattr(cli, "specs_of", lambda *_: [VERIFY])
    cli.main()
    return folder


def run(folder: Path, code: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@needs_nvcc
def test_a_folder_holds_source_machine_code_and_all_that_launches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "out", "h100", monkeypatch)
    assert "1 proved by none; check them on the GPU" in capsys.readouterr().out
    package = folder / "my_kernels"
    (kernel,) = json.loads((package / "PROVENANCE.json").read_text())["kernels"]
    assert kernel["proved_by"] is None
    assert "proved by nothing" in (folder / "README.md").read_text()
    for vector in (8, 1):
        binaries = package / "binaries" / kernel["kernel"] / f"vector{vector}"
        functions = {one["name"]: one for one in json.loads((binaries / "kernels.json").read_text())}
        assert set(functions) == {"attend_splits", "merge_splits"}
        for name, function in functions.items():
            assert (binaries / f"{name}.cubin").read_bytes()[:4] == b"\x7fELF"
            text = (binaries / f"{name}.cu").read_text()
            assert f"{function['symbol']}(" in text
            assert all(parameter in text for _, parameter in function["parameters"])
    assert not any(len(line) > 120 for line in (package / "__init__.py").read_text().splitlines())
    if not torch.cuda.is_available():
        assert run(folder, WITHOUT_A_GPU).startswith("refused:")


@pytest.mark.gpu
@needs_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_binaries_run_where_nothing_could_compile_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(exported(tmp_path / "out", "local", monkeypatch), ON_A_GPU) == "as expected\n"


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ladder.read(gpus.find("mi300x"), HEADS, ())
    with pytest.raises(SpecError, match="binaries are for NVIDIA"):
        compiled([VERIFY], gpus.find("mi300x"), known)
    monkeypatch.setattr(tilelang.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BuildError, match="pip install tilelang"):
        compiled([VERIFY], gpus.find("h100"), known)
