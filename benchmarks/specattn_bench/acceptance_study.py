"""How many drafts hold: along known text, where no loop can flatter, and in what the engine generates."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from specattn_bench.acceptance_texts import Passage
from specattn_bench.known_text import PAGE_SIZE, KnownText, Passages
from specattn_codegen.policy import TopK
from specattn_runtime.decode_spec import DecodeSpec
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.llama import Llama
from specattn_runtime.presets import PRESETS, Preset
from specattn_runtime.sampling import Sampling
from specattn_runtime.session import open_session

# Every key selected: what drafts lose to rounding alone.
EVERYTHING = "everything"
SERIES = (*(preset.name for preset in PRESETS.values() if preset.drafts), EVERYTHING)
FORCED = "forced"
GENERATED = {"greedy": Sampling(), "sampled": Sampling(temperature=0.6)}


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
    """Tokens a round of one passage, a mean over its rounds. mode: forced, greedy or sampled; agreeing: forced, as
    many as greedy decoding would keep; holding: forced, the chances that drafts hold, each alone, by PLACES."""

    mode: str
    case: Case
    passage: int
    tokens: float
    agreeing: float | None = None
    holding: Mapping[str, Sequence[float]] = field(default_factory=dict)


Say = Callable[[str], None]


def along_text(
    model: Llama,
    kernels: AttentionKernels,
    passages: Sequence[Passage],
    cases: Sequence[Case],
    *,
    rounds: int,
    say: Say,
) -> list[Observed]:
    """Expected tokens a round along the passages: 1 and, for every draft, the chance that it and those before it hold.
    Budgets of a series share a batch."""
    known = KnownText(
        model,
        kernels,
        padded(passages),
        draft_lens=[case.draft_len for case in cases],
        copies=max(len(group) for _, group in grouped(cases)),
        page_bounds=any(case.preset.uses_page_bounds for case in cases),
    )
    observed: list[Observed] = []
    for (series, draft_len), group in grouped(cases):
        say(f"{series}, {draft_len} drafts")
        policies = [TopK(ratio=case.share) for case in group for _ in passages]
        found = known.run(kernels, group[0].preset, policies, draft_len=draft_len, rounds=rounds)
        accepted = torch.stack(found.accepted).double().mean(dim=0).tolist()
        matched = torch.stack(found.matched).double().mean(dim=0).tolist()
        holding = torch.stack(found.holding, dim=1)  # [B, rounds, drafts]
        places = itertools.product(range(len(group)), range(len(passages)))
        observed += [
            Observed(
                mode=FORCED,
                case=group[copy],
                passage=number,
                tokens=1 + accepted[copy * len(passages) + number],
                agreeing=1 + matched[copy * len(passages) + number],
                holding=by_place(holding[copy * len(passages) + number], passages[number].places),
            )
            for copy, number in places
        ]
    return observed


def generated(
    model: Llama,
    kernels: AttentionKernels,
    passages: Sequence[Passage],
    cases: Sequence[Case],
    *,
    new_tokens: int,
    say: Say,
) -> list[Observed]:
    """Tokens a round in what the engine makes of the prompts, greedy and sampled, over rounds with all their drafts."""
    observed: list[Observed] = []
    for series in dict.fromkeys(case.series for case in cases):
        say(f"{series}, generated")
        mine = [case for case in cases if case.series == series]
        asked = list(itertools.product(range(len(passages)), mine, GENERATED))
        spec = DecodeSpec(preset=mine[0].preset, max_new_tokens=new_tokens, page_size=PAGE_SIZE)
        longest = max(len(passage.prompt) for passage in passages) + new_tokens
        session = open_session(
            model,
            kernels,
            spec,
            max_requests=len(asked),
            num_pages=len(asked) * (-(-longest // PAGE_SIZE) + 1),
            share_prefixes=True,
        )
        for number, case, mode in asked:
            sampling = dataclasses.replace(GENERATED[mode], seed=number)
            own = dataclasses.replace(spec, budget=case.share, draft_len=case.draft_len, sampling=sampling)
            session.add_request(passages[number].prompt, own)
        while session.has_work:
            session.step()
        for request, (number, case, mode) in enumerate(asked):
            result = session.result(request)
            rounds = zip(result.accepted, result.drafted, strict=True)
            full = [accepted for accepted, drafted in rounds if drafted == case.draft_len]
            tokens = 1 + statistics.fmean(full)
            observed.append(Observed(mode=mode, case=case, passage=number, tokens=tokens))
    return observed


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
