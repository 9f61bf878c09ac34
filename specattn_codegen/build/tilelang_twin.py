"""The twin of a TileLang kernel: the same rendered text through TileLang's C target, for checking on any CPU.

It shows that indices, masks, merges and scores are right. It says nothing of what only a GPU does: threads, barriers,
tensor cores and copies in flight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specattn_codegen.build import cpu
from specattn_codegen.build.tilelang import AttentionKernel, SelectKernel, adapt
from specattn_codegen.build.tilelang_lower import Lowered, lower_for_c
from specattn_codegen.errors import BuildError
from specattn_codegen.processors.cpu_info import instruction_set
from specattn_codegen.render import Source

INCLUDE = "#include <tl_templates/cpp/common.h>"
# Bits of a float are read through a pointer to integers, which C++ allows for types that say so.
PRELUDE = """#include <cmath>
#include <cstdint>
using std::exp2f;
using half = _Float16;
typedef std::int32_t __attribute__((may_alias)) int32_bits;
typedef float __attribute__((may_alias)) float_bits;"""
PUNNED = {"*(int32_t *)": "*(int32_bits *)", "*(float *)": "*(float_bits *)"}
SCALARS: dict[str, type[Any]] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinFunction:
    """A device function in C; its blocks run one after the other, so the grid is among its arguments."""

    call: Callable[..., int]
    parameters: tuple[tuple[str, str], ...]

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:  # noqa: ARG002
        self.call(*(self._value(kind, arguments[name]) for kind, name in self.parameters))

    @staticmethod
    def _value(kind: str, argument: torch.Tensor | float) -> object:
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return SCALARS[kind](argument)


def load(source: Source, num_sms: int) -> AttentionKernel | SelectKernel:
    """The twin of a source, for tensors of the CPU. `num_sms` stands for the device. Raises BuildError."""
    if source.spec.op != "select_kv" and source.spec.dtype != "float16":
        raise BuildError(f"{source.spec.name}: C has no {source.spec.dtype}; render the plan for float16")
    functions = {lowered.name: _compiled(lowered) for lowered in lower_for_c(source)}

    def for_any_vector(vector: int) -> Mapping[str, Callable[..., None]]:  # noqa: ARG001 - C reads element by element
        return functions

    return adapt(source, for_any_vector, num_sms)


def _compiled(lowered: Lowered) -> TwinFunction:
    text = lowered.text.replace(INCLUDE, PRELUDE)
    for written, allowed in PUNNED.items():
        text = text.replace(written, allowed)
    library = cpu.load_library(text, instruction_set(), f"the C twin of {lowered.name}")
    return TwinFunction(call=getattr(library, lowered.symbol), parameters=lowered.parameters)
