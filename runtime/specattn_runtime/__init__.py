"""Online half of specattn-codegen: loads kernels from packs and runs self-speculative decoding on them."""

from specattn_codegen.policy import Threshold, TopK, TopP
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_runtime.agreement import require_agreement
from specattn_runtime.calibration import calibrate_thresholds
from specattn_runtime.dispatch import Kernels, load_kernels

__all__ = [
    "Kernels",
    "Selection",
    "SparseOutput",
    "Threshold",
    "TopK",
    "TopP",
    "VerifyOutput",
    "calibrate_thresholds",
    "load_kernels",
    "require_agreement",
]
