"""From a user's tensors to a checked call: every shape, dtype, device and stride rule of the shared contract, once."""

from specattn_codegen.calls.attention import AttentionInputs, attention_call
from specattn_codegen.calls.problem import problem_call
from specattn_codegen.calls.selection import select_call

__all__ = ["AttentionInputs", "attention_call", "problem_call", "select_call"]
