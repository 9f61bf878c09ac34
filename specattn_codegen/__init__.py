"""specattn-codegen: generates, proves and tunes kernels for sparse self-speculative decoding."""

from specattn_codegen.errors import BuildError, PackError, SpecAttnError, SpecError
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.policy import TopK
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

__all__ = [
    "BuildError",
    "HeadConfig",
    "KernelSpec",
    "PackError",
    "ScoreSpec",
    "SpecAttnError",
    "SpecError",
    "TopK",
    "Workload",
    "layer_heads",
]
