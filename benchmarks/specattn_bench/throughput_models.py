"""What throughput is measured with: a checkpoint or drawn weights, and prompts that are cached beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specattn_codegen.proof.problems import TORCH_DTYPES
from specattn_codegen.spec import Dtype
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.round import Decoder
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.checkpoint import build_llama, expected_shapes, load_llama
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.llama_config import read_config

PAGE_SIZE = 16
SEED = 0
DRAWN_PROMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model: the checkpoint of a folder, or, where `drawn`, the folder's config.json with weights from a seed."""

    folder: Path
    drawn: bool

    @property
    def name(self) -> str:
        return f"{self.folder.name}, drawn weights" if self.drawn else self.folder.name

    def llama(self, dtype: Dtype) -> Llama:
        if not self.drawn:
            return load_llama(self.folder, dtype=TORCH_DTYPES[dtype])
        config, generator = read_config(self.folder), torch.Generator().manual_seed(SEED)
        tensors = {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            for name, shape in expected_shapes(config).items()
        }
        return build_llama(config, {name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts of equally many tokens, what kind of text each is, and its keys and values [layers, tokens, Hkv, D]."""

    kinds: Sequence[str]
    tokens: Sequence[Sequence[int]]
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]


@torch.inference_mode()
def prefilled(llama: Llama, kernels: AttentionKernels, texts: Sequence[Sequence[int]], kinds: Sequence[str]) -> Prompts:
    """Texts of equally many tokens, through the model."""
    length = len(texts[0])
    pages = -(-length // PAGE_SIZE)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for text in texts:
        cache = PagedCache(
            llama.heads, layers=llama.num_layers, num_pages=pages, page_size=PAGE_SIZE, batch=1, dtype=llama.dtype
        )
        each_layer = (kernels,) * llama.num_layers
        decoder = Decoder(model=llama, kernels=each_layer, cache=cache, preset=PRESETS["dense"], stopwatch=Stopwatch())
        decoder.prefill(0, text)
        order = cache.page_table[0].long()
        keys, values = (pool[:, order].flatten(1, 2)[:, :length] for pool in (cache.keys, cache.values))
        found.append((keys, values))
    keys, values = ([pair[part] for pair in found] for part in (0, 1))
    return Prompts(kinds=kinds, tokens=texts, keys=keys, values=values)


def drawn_prompts(llama: Llama, length: int) -> Prompts:
    """Tokens, keys and values drawn from a seed: what a round costs does not depend on them."""
    generator = torch.Generator().manual_seed(SEED)
    heads = llama.heads

    def drawn(head_dim: int) -> list[torch.Tensor]:
        shape = (llama.num_layers, length, heads.num_kv_heads, head_dim)
        return [torch.randn(shape, generator=generator).to(llama.dtype) for _ in range(DRAWN_PROMPTS)]

    tokens = torch.randint(llama.vocab_size, (DRAWN_PROMPTS, length), generator=generator).tolist()
    kinds = ["drawn"] * DRAWN_PROMPTS
    return Prompts(kinds=kinds, tokens=tokens, keys=drawn(heads.head_dim), values=drawn(heads.v_head_dim))
