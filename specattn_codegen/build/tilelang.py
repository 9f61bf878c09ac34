"""TileLang: adapts the `launch` of a rendered file to a Kernel. What compiles it is in tilelang_compile."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from specattn_codegen.errors import BuildError
from specattn_codegen.kernel import AttentionCall, Call
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec

Functions = Mapping[str, Callable[..., None]]


def require_installed() -> None:
    """Raises BuildError where TileLang is missing."""
    if importlib.util.find_spec("tilelang") is None:
        raise BuildError("TileLang is not installed; `pip install tilelang==0.1.15`, or use --backend triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """One rendered file and its compiled device functions.

    arguments  what its launch takes
    functions  the device functions by name, for a width of vector loads
    num_sms    multiprocessors that the grid of splits is made for
    """

    spec: KernelSpec
    plan: Plan
    module: ModuleType
    arguments: tuple[str, ...]
    functions: Callable[[int], Functions]
    num_sms: int

    def workspace_bytes(self, call: Call) -> int:
        call = _attention_call(self.spec, call)
        return self.module.workspace_bytes(
            total_q=call.q.shape[0],
            batch=call.batch,
            max_q=call.max_q,
            max_kv=call.max_kv,
            num_sms=self.num_sms,
        )

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        call = _attention_call(self.spec, call)
        ours = {"functions": self.functions, "workspace": workspace, "num_sms": self.num_sms}
        theirs = {name: getattr(call, name) for name in self.arguments if name not in ours}
        self.module.launch(**theirs, **ours)


def _attention_call(spec: KernelSpec, call: Call) -> AttentionCall:
    if not isinstance(call, AttentionCall):
        raise TypeError(f"{spec.op} takes an AttentionCall")
    return call
