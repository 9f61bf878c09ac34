"""specattn-codegen: generates, proves and tunes kernels for sparse self-speculative decoding."""

from specattn_codegen.errors import BuildError, PackError, SpecAttnError, SpecError
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.policy import Threshold, TopK, TopP
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

__all__ = [
    "BuildError",
    "HeadConfig",
    "KernelSpec",
    "PackError",
    "ScoreSpec",
    "SpecAttnError",
    "SpecError",
    "Threshold",
    "TopK",
    "TopP",
    "Workload",
    "layer_heads",
]
