"""Runs the decode loop along known text, whatever its keys, and records what each way to score keys selects."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specattn_bench.known_text import KnownText, Passages
from specattn_bench.reference_methods import Method, RowLses, Seen, exact
from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import Policy, TopK
from specattn_codegen.proof.reference import gather_keys
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Llama

# What scores of bfloat16 kernels may be off by: their weights' rounding, and where those underflow.
RELATIVE, FLOOR = 2.0**-8, 2.0**-25


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One method along all passages. [rounds, layers, B, Hkv] each; accepted and matched [rounds, B].

    overlap   share of the exact top k that the method selects too
    mass      exact scores of the selected keys, as a share of the exact top k's
    coming    the next round's exact scores of the selected keys, as a share of all keys' that could be selected
    short     how far the worst reference is below its row's lse, in nats; None where there are none
    error     largest error of a score in tolerances of bfloat16 kernels; None where it is not a rounding error
    accepted  drafts a round that sampling would accept, expected: sums of products of sum(min(p, q))
    matched   leading drafts whose most likely token is the verified one's
    """

    overlap: torch.Tensor
    mass: torch.Tensor
    coming: torch.Tensor
    short: torch.Tensor | None
    error: torch.Tensor | None
    accepted: torch.Tensor
    matched: torch.Tensor


class StudyKernels:
    """Kernels whose scores are a method's. At every selection it looks at what the exact scores would have chosen.

    Every request of a verification has max_q rows, and every draft step runs every request.
    """

    def __init__(self, kernels: AttentionKernels, heads: HeadConfig, layers: int, method: Method) -> None:
        self.overlap: list[torch.Tensor] = []
        self.mass: list[torch.Tensor] = []
        self.coming: list[torch.Tensor] = []
        self.short: list[torch.Tensor] = []
        self.error: list[torch.Tensor] = []
        self.heads = heads
        self._kernels, self._layers, self._method = kernels, layers, method
        self._steps: list[torch.Tensor] = []  # lse of the round's draft steps, all layers of one after the other
        self._exact: list[torch.Tensor] = []  # scores of the pass's layers [B, Hkv, max_kv], 0 past a prefix
        self._off: list[torch.Tensor] = []  # lse minus reference, of the same [B, rows, Hq]
        self._past: list[RowLses] = []  # of the same, in the round before and then in this one
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # what the last round selected, and could

    def forget(self) -> None:
        """Drops what was recorded while the prompt's end was verified, which no draft preceded."""
        for recorded in (self.overlap, self.mass, self.coming, self.short, self.error):
            recorded.clear()
        self._before = None

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        out: VerifyOutput | None = None,  # noqa: ARG002 - the scores may be others than the kernels'
    ) -> VerifyOutput:
        found = self._kernels.verify_attention(
            *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
            max_q=max_q,
            max_kv=max_kv,
            score=score,
            lse_ref=lse_ref,
        )
        batch, layer = len(kv_lens), len(self._exact)
        steps = self._steps[layer :: self._layers]
        now = RowLses(exact=found.lse.unflatten(0, (batch, -1)), drafted=torch.stack(steps, dim=1) if steps else None)
        past = self._past[layer] if len(self._past) > layer else None
        truth = q.new_zeros(batch, self.heads.num_kv_heads, max_kv or 1)
        scores = found.scores if self._method.scores is None else truth.clone()
        for request, rows in enumerate(q.unflatten(0, (batch, -1))):
            keys = gather_keys(k_cache, page_table[request], torch.arange(int(kv_lens[request]) - max_q)).to(q.dtype)
            seen = Seen(
                logits=prefix_logits(rows, keys, self.heads),
                now=now.of(request),
                past=past.of(request) if past else None,
                kv_heads=self.heads.num_kv_heads,
            )
            truth[request, :, : len(keys)] = exact(seen)
            if scores is not None and self._method.scores is not None:
                scores[request, :, : len(keys)] = self._method.scores(seen)
        self._exact.append(truth)
        self._past[layer : layer + 1] = [now]
        if lse_ref is not None:
            self._off.append(now.exact - lse_ref.unflatten(0, (batch, -1)))
        return found._replace(scores=scores)

    def sparse_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        selection: Selection,
        tail_start: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
    ) -> SparseOutput:
        found = self._kernels.sparse_attention(
            *(q, k_cache, v_cache, page_table, kv_lens, cu_q, selection, tail_start), max_q=max_q, max_kv=max_kv
        )
        self._steps.append(found.lse)
        return found

    def select_kv(
        self,
        scores: torch.Tensor,
        prefix_lens: torch.Tensor,
        policy: Policy,
        *,
        sink: int = 0,
        recent: int = 0,
        block: int = 1,
    ) -> Selection:
        """scores of all layers' requests, one after the other, or of one layer for all."""
        chosen = self._kernels.select_kv(scores, prefix_lens, policy, sink=sink, recent=recent, block=block)
        truth = torch.stack(self._exact)  # [layers, B, Hkv, N]
        lengths = prefix_lens[: truth.shape[1]].repeat(self._layers)
        best = self._kernels.select_kv(truth.flatten(0, 1), lengths, policy)
        wanted = chosen_keys(best, truth.shape[3]).view(truth.shape)
        selected = chosen_keys(chosen, truth.shape[3]).unflatten(0, (-1, truth.shape[1])).expand(truth.shape)
        self.overlap.append((wanted & selected).sum(dim=3) / wanted.sum(dim=3))
        self.mass.append((truth * selected).sum(dim=3) / (truth * wanted).sum(dim=3))
        self._look_back(truth)
        if self._off:
            off = torch.stack(self._off).unflatten(3, (self.heads.num_kv_heads, -1))  # [layers, B, rows, Hkv, group]
            self.short.append(off.amax(dim=(2, 4)))
        if self._method.quantises:
            off = (scores.view(truth.shape) - truth).abs() / (RELATIVE * truth + FLOOR)
            self.error.append(off.amax(dim=3))
        self._before = (selected, (torch.arange(truth.shape[3]) < prefix_lens[: truth.shape[1], None])[:, None])
        for ended in (self._steps, self._exact, self._off):
            ended.clear()
        return chosen

    def _look_back(self, truth: torch.Tensor) -> None:
        """How much of this round's attention the selection of the round before covers, of keys it could select."""
        if self._before is not None:
            selected, selectable = self._before
            mass = truth[..., : selected.shape[3]] * selectable
            self.coming.append((mass * selected).sum(dim=3) / mass.sum(dim=3))


def prefix_logits(q: torch.Tensor, keys: torch.Tensor, heads: HeadConfig) -> torch.Tensor:
    """q [rows, Hq, D], keys [N, Hkv, D] -> [rows, Hq, N]."""
    grouped = q.unflatten(1, (heads.num_kv_heads, -1))
    return heads.scale * torch.einsum("rhgd,nhd->rhgn", grouped, keys).flatten(1, 2)


def chosen_keys(selection: Selection, keys: int) -> torch.Tensor:
    """Selection of [B, S] rows -> [B, S, keys] bool."""
    indices = selection.indices.long()
    marked = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool)
    return marked.scatter_(2, torch.where(indices < 0, keys, indices), value=True)[..., :keys]


class Study:
    """A model at the end of every passage's prompt. Each run starts there and goes on for as many rounds."""

    def __init__(
        self, model: Llama, kernels: AttentionKernels, passages: Passages, *, draft_len: int, rounds: int
    ) -> None:
        self._kernels, self._draft_len, self._rounds = kernels, draft_len, rounds
        self._heads, self._layers = model.config.heads, model.config.num_layers
        self._text = KnownText(model, kernels, passages, draft_lens=(draft_len,))

    def run(self, method: Method, budget: float) -> Recorded:
        """budget: selected keys as a share of the prefix."""
        kernels = StudyKernels(self._kernels, self._heads, self._layers, method)
        model = self._text.run(
            kernels,
            PRESETS[method.preset],
            [TopK(ratio=budget)],
            draft_len=self._draft_len,
            rounds=self._rounds,
            after_prompt=kernels.forget,
        )
        return Recorded(
            overlap=torch.stack(kernels.overlap),
            mass=torch.stack(kernels.mass),
            coming=torch.stack(kernels.coming),
            short=torch.stack(kernels.short) if kernels.short else None,
            error=torch.stack(kernels.error) if kernels.error else None,
            accepted=torch.stack(model.accepted),
            matched=torch.stack(model.matched),
        )
