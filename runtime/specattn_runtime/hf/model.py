"""A transformers model as a session drives it: rows of any requests in, logits as `generate` would see them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from specattn_codegen.heads import HeadConfig
from specattn_runtime.cache.rows import Rows
from specattn_runtime.decoding.phases import Draft, Prefill, Verify
from specattn_runtime.hf.texts import Texts
from specattn_runtime.model.llama import Attention


class HfModel:
    """Runs the model's own layers. Logits have gone through the processors, each row's with the text up to it.

    recorded  (request, position) -> raw and processed logits [V] of the latest verified row there, where `records`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Sequence[HeadConfig],
        texts: Texts,
        processors: LogitsProcessorList,
        *,
        records: bool = False,
    ) -> None:
        self.heads = heads[0]
        self.num_layers = len(heads)
        self.vocab_size: int = model.config.vocab_size
        self.max_positions: int = model.config.max_position_embeddings
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.recorded: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._texts, self._processors, self._records = texts, processors, records
        self._rows: Rows | None = None
        self._verifies = False

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """tokens, positions [N] int64 -> hidden states [N, hidden]."""
        assert isinstance(attention, (Prefill, Verify, Draft))
        self._rows, self._verifies = attention.rows, isinstance(attention, Verify)
        self._texts.write(attention.rows.requests, positions, tokens)
        found = self._decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, specattn=attention)
        return found.last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] of the rows that went forward last -> next-token logits [N, vocab] float32."""
        raw = self._head(hidden).to(torch.float32)  # pyright: ignore[reportOptionalCall]
        if self._cap is not None:
            raw = self._cap * torch.tanh(raw / self._cap)
        rows = self._rows
        assert rows is not None
        if not self._processors and not self._records:
            return raw
        places = list(zip(rows.requests.tolist(), rows.positions.tolist(), strict=True))
        processed = [
            self._processors(self._texts.upto(*place)[None], row[None].clone())[0]  # pyright: ignore[reportArgumentType]
            for place, row in zip(places, raw, strict=True)
        ]
        if self._records and self._verifies:
            self.recorded.update(zip(places, zip(raw, processed, strict=True), strict=True))
        return torch.stack(processed)
