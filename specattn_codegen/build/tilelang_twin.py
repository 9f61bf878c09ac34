"""The twin of a TileLang kernel: the same rendered text through TileLang's C target, for checking on any CPU.

It shows that indices, masks, merges and scores are right. It says nothing of what only a GPU does: threads, barriers,
tensor cores and copies in flight.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specattn_codegen.build import cpu
from specattn_codegen.build.module import import_source
from specattn_codegen.build.tilelang import AttentionKernel
from specattn_codegen.build.tilelang_lower import Lowered, lower_for_c
from specattn_codegen.cpu_info import instruction_set
from specattn_codegen.errors import BuildError
from specattn_codegen.render import Source

INCLUDE = "#include <tl_templates/cpp/common.h>"
PRELUDE = "#include <cmath>\n#include <cstdint>\nusing std::exp2f;\nusing half = _Float16;"
SCALARS: dict[str, type[Any]] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinFunction:
    """A device function in C; its blocks run one after the other, so the grid is among its arguments."""

    call: Callable[..., int]
    parameters: tuple[tuple[str, str], ...]

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:  # noqa: ARG002
        self.call(*(self._value(kind, arguments[name]) for kind, name in self.parameters))

    @staticmethod
    def _value(kind: str, argument: torch.Tensor | int) -> object:
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return SCALARS[kind](argument)


def load(source: Source, num_sms: int) -> AttentionKernel:
    """The twin of a source, for tensors of the CPU. `num_sms` stands for the device. Raises BuildError."""
    if source.spec.dtype != "float16":
        raise BuildError(f"{source.spec.name}: C has no {source.spec.dtype}; render the plan for float16")
    functions = {lowered.name: _compiled(lowered) for lowered in lower_for_c(source)}

    def for_any_vector(vector: int) -> Mapping[str, Callable[..., None]]:  # noqa: ARG001 - C reads element by element
        return functions

    module = import_source(source)
    return AttentionKernel(
        spec=source.spec,
        plan=source.plan,
        module=module,
        arguments=tuple(inspect.signature(module.launch).parameters),
        functions=for_any_vector,
        num_sms=num_sms,
    )


def _compiled(lowered: Lowered) -> TwinFunction:
    text = lowered.text.replace(INCLUDE, PRELUDE)
    library = cpu.load_library(text, instruction_set(), f"the C twin of {lowered.name}")
    return TwinFunction(call=getattr(library, lowered.symbol), parameters=lowered.parameters)
