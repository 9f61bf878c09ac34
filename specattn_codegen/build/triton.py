"""Triton: imports a rendered file and adapts its `launch` to a Kernel. cross_compile serves GPUs that are absent."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
import triton
from triton import knobs

from specattn_codegen.build.alignment import require_aligned
from specattn_codegen.build.module import import_source
from specattn_codegen.build.selection import launch_arguments, selection_call, workspace_arguments
from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.kernel import AttentionCall, Call
from specattn_codegen.plan import Plan
from specattn_codegen.render import Source
from specattn_codegen.space.triton import merges_last
from specattn_codegen.spec import KernelSpec

INTERPRETER_SMS = 4  # what the interpreter stands for: enough that small problems are split


def is_interpreted() -> bool:
    """Whether functions imported from now on run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return knobs.runtime.interpret


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device that the grid of splits is made for."""
    if device.type == "cpu":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """verify_attention or sparse_attention; `arguments` are the fields of a call that its launch takes.

    arrivals  counters of a kernel whose last block merges, by device: 0 between launches, hence one launch at a time.
              They are not in the workspace, whose contents are arbitrary.
    """

    spec: KernelSpec
    plan: Plan
    module: ModuleType
    arguments: tuple[str, ...]
    arrivals: dict[torch.device, torch.Tensor] = field(default_factory=dict[torch.device, torch.Tensor])

    def workspace_bytes(self, call: Call) -> int:
        if not isinstance(call, AttentionCall):
            raise TypeError(f"{self.spec.op} takes an AttentionCall")
        return self.module.workspace_bytes(
            total_q=call.q.shape[0],
            batch=call.batch,
            max_q=call.max_q,
            max_kv=call.max_kv,
            num_sms=num_sms(call.q.device),
        )

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        if not isinstance(call, AttentionCall):
            raise TypeError(f"{self.spec.op} takes an AttentionCall")
        if self.plan.as_dict().get("kv_load") == "descriptor":
            require_aligned(call.k_cache, "k_cache")
            require_aligned(call.v_cache, "v_cache")
        arguments = {name: getattr(call, name) for name in self.arguments}
        if merges_last(self.plan):
            arguments["arrivals"] = self._arrivals_on(call.q.device)
        self.module.launch(**arguments, workspace=workspace, num_sms=num_sms(call.q.device))

    def _arrivals_on(self, device: torch.device) -> torch.Tensor:
        if device not in self.arrivals:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise SpecError(f"{self.spec.name} was never launched on {device}; launch it once before a capture")
            count = self.module.num_arrivals(num_sms(device))
            self.arrivals[device] = torch.zeros(count, dtype=torch.int32, device=device)
        return self.arrivals[device]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectKernel:
    """select_kv, for rows with or without a layer axis."""

    spec: KernelSpec
    plan: Plan
    module: ModuleType

    def workspace_bytes(self, call: Call) -> int:
        call = selection_call(call)
        return self.module.workspace_bytes(**workspace_arguments(call), num_sms=num_sms(call.device))

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        call = selection_call(call)
        self.module.launch(**launch_arguments(call), workspace=workspace, num_sms=num_sms(call.device))


def load(source: Source) -> AttentionKernel | SelectKernel:
    """A kernel for the GPU at hand, or for Triton's interpreter. Raises BuildError where there is neither."""
    if not torch.cuda.is_available() and not is_interpreted():
        raise BuildError(
            "Triton kernels need an NVIDIA or AMD GPU and this process sees none; use --backend cpu, "
            "or set TRITON_INTERPRET=1 before Python starts to run them slowly on the CPU"
        )
    if is_interpreted() and _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4):
        raise BuildError(
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}; "
            "install numpy<2.4 or Triton 3.7"
        )
    module = import_source(source)
    if source.spec.op == "select_kv":
        return SelectKernel(spec=source.spec, plan=source.plan, module=module)
    arguments = tuple(
        name for name in inspect.signature(module.launch).parameters if name not in {"workspace", "arrivals", "num_sms"}
    )
    return AttentionKernel(spec=source.spec, plan=source.plan, module=module, arguments=arguments)
