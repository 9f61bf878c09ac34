"""How many drafts hold: along known text, where no loop can flatter, and in what the engine generates."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from specattn_bench.acceptance_texts import Passage
from specattn_bench.known_text import PAGE_SIZE, KnownText, Passages
from specattn_codegen.digest import digest
from specattn_codegen.policy import TopK
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.presets import PRESETS, Preset
from specattn_runtime.decoding.sampling import Sampling
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Llama

# Every key selected: what drafts lose to rounding alone.
EVERYTHING = "everything"
SERIES = (*(preset.name for preset in PRESETS.values() if preset.drafts), EVERYTHING)
FORCED = "forced"
GENERATED = {"greedy": Sampling(), "sampled": Sampling(temperature=0.6)}
MODES = (FORCED, *GENERATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """budget: selected keys as a share of the prefix, the same for every series but `everything`."""

    series: str
    budget: float
    draft_len: int

    @property
    def preset(self) -> Preset:
        return dataclasses.replace(PRESETS["vegas" if self.series == EVERYTHING else self.series], min_budget=0)

    @property
    def share(self) -> float:
        return 1.0 if self.series == EVERYTHING else self.budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Tokens a round of one passage, a mean over its rounds. mode: one of MODES; agreeing: forced, as
    many as greedy decoding would keep; holding: forced, the chances that drafts hold, each alone, by PLACES."""

    mode: str
    case: Case
    passage: int
    tokens: float
    agreeing: float | None = None
    holding: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What shares a batch: cases of one series and draft length, along text or else in what is generated."""

    context: int
    modes: Sequence[str]
    cases: Sequence[Case]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a run observed, in the file it is kept in. key: see Study.key."""

    key: str
    observed: Sequence[Observed]


class Study:
    """A model at the end of passages' prompts, which the first run prefills; each run starts there and goes on for as
    many rounds with all their drafts."""

    def __init__(
        self,
        model: Llama,
        kernels: AttentionKernels,
        passages: Sequence[Passage],
        cases: Sequence[Case],
        *,
        rounds: int,
    ) -> None:
        """cases: of any run to come."""
        self._model, self._kernels, self._passages = model, kernels, passages
        self._cases, self._rounds = cases, rounds

    @cached_property
    def _text(self) -> KnownText:
        return KnownText(
            self._model,
            self._kernels,
            padded(self._passages),
            draft_lens=[case.draft_len for case in self._cases],
            copies=max(len(group) for _, group in grouped(self._cases)) * len(GENERATED),
            page_bounds=any(case.preset.uses_page_bounds for case in self._cases),
        )

    def run(self, run: Run) -> list[Observed]:
        return self._along_text(run.cases) if FORCED in run.modes else self._generated(run)

    def key(self, run: Run) -> str:
        """The same for runs that observe the same, given the same weights."""
        return digest(run, [passage.digest for passage in self._passages], self._rounds)

    def _along_text(self, cases: Sequence[Case]) -> list[Observed]:
        """Expected tokens a round: 1 and, for every draft, the chance that it and those before it hold."""
        passages, first = self._passages, cases[0]
        policies = [TopK(ratio=case.share) for case in cases]
        found = self._text.run(self._kernels, first.preset, policies, draft_len=first.draft_len, rounds=self._rounds)
        accepted = torch.stack(found.accepted).double().mean(dim=0).tolist()
        matched = torch.stack(found.matched).double().mean(dim=0).tolist()
        holding = torch.stack(found.holding, dim=1)  # [B, rounds, drafts]
        return [
            Observed(
                mode=FORCED,
                case=case,
                passage=number,
                tokens=1 + accepted[request],
                agreeing=1 + matched[request],
                holding=by_place(holding[request], passages[number].places),
            )
            for request, (case, number) in enumerate(itertools.product(cases, range(len(passages))))
        ]

    def _generated(self, run: Run) -> list[Observed]:
        """Tokens a round in what the model makes of the prompts."""
        asked = list(itertools.product(run.modes, run.cases, range(len(self._passages))))
        specs = [
            DecodeSpec(
                preset=case.preset,
                draft_len=case.draft_len,
                budget=case.share,
                sampling=dataclasses.replace(GENERATED[mode], seed=number),
                max_new_tokens=self._rounds * (case.draft_len + 1) + 1,
                page_size=PAGE_SIZE,
            )
            for mode, case, number in asked
        ]
        requests = self._text.generate(self._kernels, specs, rounds=self._rounds)
        return [
            Observed(mode=mode, case=case, passage=number, tokens=1 + statistics.fmean(request.accepted))
            for (mode, case, number), request in zip(asked, requests, strict=True)
        ]


def by_place(holding: torch.Tensor, places: Sequence[str]) -> dict[str, list[float]]:
    """holding [rounds, drafts] along a passage: a round's drafts are the tokens after its newest one."""
    found: dict[str, list[float]] = {}
    rows = holding.shape[1] + 1
    for start, chances in enumerate(holding.tolist() if places else []):
        for place, chance in zip(places[start * rows + 1 :], chances, strict=False):
            found.setdefault(place, []).append(chance)
    return found


def grouped(cases: Sequence[Case]) -> list[tuple[tuple[str, int], list[Case]]]:
    """Cases that one run can serve, by series and draft length."""
    kinds = dict.fromkeys((case.series, case.draft_len) for case in cases)
    return [(kind, [case for case in cases if (case.series, case.draft_len) == kind]) for kind in kinds]


def padded(passages: Sequence[Passage]) -> Passages:
    texts = [passage.prompt + passage.following for passage in passages]
    width = max(len(text) for text in texts)
    return Passages(
        texts=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        contexts=tuple(len(passage.prompt) for passage in passages),
    )
