"""TileLang: adapts the `launch` of a rendered file to a Kernel. What compiles it is in tilelang_compile."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from specattn_codegen.build import cubin
from specattn_codegen.build.alignment import require_aligned
from specattn_codegen.build.module import import_source
from specattn_codegen.build.selection import launch_arguments, selection_call, workspace_arguments
from specattn_codegen.errors import BuildError
from specattn_codegen.kernel import AttentionCall, Call
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpu_detect
from specattn_codegen.render import Source
from specattn_codegen.spec import KernelSpec

# TileLang is imported where a kernel is compiled, so that nobody else pays for it.
COMPILER = "specattn_codegen.build.tilelang_compile"
Functions = Mapping[str, Callable[..., None]]


def require_installed() -> None:
    """Raises BuildError where TileLang is missing."""
    if importlib.util.find_spec("tilelang") is None:
        raise BuildError("TileLang is not installed; `pip install tilelang==0.1.15`, or use --backend triton")


def require_compilers() -> None:
    """Raises BuildError where TileLang or the nvcc it compiles with is missing."""
    require_installed()
    importlib.import_module(COMPILER).nvcc()


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
        if self.plan.as_dict().get("kv_load") == "descriptor":
            require_aligned(call.k_cache, "k_cache")
            require_aligned(call.v_cache, "v_cache")
        ours = {"functions": self.functions, "workspace": workspace, "num_sms": self.num_sms}
        theirs = {name: getattr(call, name) for name in self.arguments if name not in ours}
        self.module.launch(**theirs, **ours)


def _attention_call(spec: KernelSpec, call: Call) -> AttentionCall:
    if not isinstance(call, AttentionCall):
        raise TypeError(f"{spec.op} takes an AttentionCall")
    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectKernel:
    """select_kv, for rows with or without a layer axis; its fields are those of an AttentionKernel."""

    spec: KernelSpec
    plan: Plan
    module: ModuleType
    functions: Callable[[int], Functions]
    num_sms: int

    def workspace_bytes(self, call: Call) -> int:
        return self.module.workspace_bytes(**workspace_arguments(selection_call(call)), num_sms=self.num_sms)

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        arguments = launch_arguments(selection_call(call))
        self.module.launch(**arguments, functions=self.functions, workspace=workspace, num_sms=self.num_sms)


def adapt(source: Source, functions: Callable[[int], Functions], num_sms: int) -> AttentionKernel | SelectKernel:
    """The kernel that launches some compiled functions as the rendered file says."""
    spec, plan, module = source.spec, source.plan, import_source(source)
    if spec.op == "select_kv":
        return SelectKernel(spec=spec, plan=plan, module=module, functions=functions, num_sms=num_sms)
    return AttentionKernel(
        spec=spec,
        plan=plan,
        module=module,
        arguments=tuple(inspect.signature(module.launch).parameters),
        functions=functions,
        num_sms=num_sms,
    )


def load(source: Source) -> AttentionKernel | SelectKernel:
    """A kernel for the NVIDIA GPU at hand. Raises BuildError where there is none, or no TileLang or nvcc."""
    if not torch.cuda.is_available():
        raise BuildError("TileLang kernels need an NVIDIA GPU and this process sees none; use --backend cpu")
    require_installed()
    functions = functools.cache(functools.partial(_loaded, source))
    return adapt(source, functions, torch.cuda.get_device_properties(0).multi_processor_count)


def _loaded(source: Source, vector: int) -> Functions:
    compiler = importlib.import_module(COMPILER)
    return cubin.load_folder(compiler.compiled_folder(source, gpu_detect.local(), vector))
