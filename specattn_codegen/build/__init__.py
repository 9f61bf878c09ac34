"""Build: a source becomes something callable. One module per backend; what is built is content-addressed on disk."""

from __future__ import annotations

import importlib

from specattn_codegen.kernel import Kernel
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source


def target_for(plan: Plan, arch: Arch) -> str:
    """What a plan's text is rendered for: CPU text depends on the instruction set, Triton's serves every GPU."""
    return arch.target if plan.backend == "cpu" else plan.backend


def load(source: Source) -> Kernel:
    """A callable kernel for the device at hand, built first where the cache has none.

    Raises BuildError. The backend's module is imported here, so that a CPU user never pays for a GPU compiler.
    """
    return importlib.import_module(f"specattn_codegen.build.{source.plan.backend}").load(source)
