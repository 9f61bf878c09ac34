"""Speculative decoding inside Hugging Face transformers:

from specattn_runtime.hf import speculative

model.generate(**inputs, custom_generate=speculative("vegas"))
"""

from specattn_runtime.hf.generate import Speculative, speculative

__all__ = ["Speculative", "speculative"]
