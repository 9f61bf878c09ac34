"""The oracle: every operation in plain torch, float64, written to be read. Slow on purpose, on the CPU by nature.

Same names, arguments and conventions as the kernels. Computes in float64 whatever the inputs' dtype and returns
float64; nothing here is shared with any kernel.
"""

from __future__ import annotations

import math

import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import Policy, Threshold, TopK, TopP, blocks_of
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import HISTOGRAM_BINS, ScoreHeads, ScoreSpec

REFERENCE_CEILING = 64  # binary orders of magnitude by which a weight may pass a reference before it saturates


def gather_keys(
    cache: torch.Tensor, page_table: torch.Tensor, positions: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of a paged cache [num_pages, page_size, Hkv, D] at logical positions [N] -> [N, Hkv, D] float64.

    `scale`, of one element or one per KV head, multiplies what an 8-bit cache holds.
    """
    page_size = cache.shape[1]
    pages = page_table[torch.div(positions, page_size, rounding_mode="floor")].long()
    rows = cache[pages, positions % page_size].double()
    return rows if scale is None else rows * scale.double()[:, None]


def row_logits(q_row: torch.Tensor, keys: torch.Tensor, heads: HeadConfig) -> torch.Tensor:
    """q_row [Hq, D], keys [N, Hkv, D] -> scaled, softcapped logits [Hq, N] (float64)."""
    grouped = q_row.double().view(heads.num_kv_heads, heads.group, heads.head_dim)
    logits = torch.einsum("hgd,nhd->hgn", grouped, keys).reshape(heads.num_q_heads, -1) * heads.scale
    return logits if heads.softcap is None else heads.softcap * torch.tanh(logits / heads.softcap)


def attend(
    logits: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None, heads: HeadConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [Hq, N] with -inf where unseen, values [N, Hkv, Dv] -> out [Hq, Dv], lse [Hq]; (0, -inf) for no key."""
    seen = (logits != -math.inf).any(dim=1)  # a sink alone does not make a row see anything
    with_sink = logits if sinks is None else torch.cat([logits, sinks.double()[:, None]], dim=1)
    lse = torch.full((heads.num_q_heads,), -math.inf, dtype=torch.float64)
    lse[seen] = torch.logsumexp(with_sink[seen], dim=1)
    weights = torch.where(seen[:, None], torch.exp(logits - lse[:, None]), 0.0)
    grouped = weights.view(heads.num_kv_heads, heads.group, -1)
    out = torch.einsum("hgn,nhd->hgd", grouped, values).reshape(heads.num_q_heads, heads.v_head_dim)
    return out, lse


def _outputs(q: torch.Tensor, heads: HeadConfig) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(q.shape[0], heads.num_q_heads, heads.v_head_dim, dtype=torch.float64)
    return out, torch.full((q.shape[0], heads.num_q_heads), -math.inf, dtype=torch.float64)


def first_visible(position: int, heads: HeadConfig) -> int:
    """The oldest key a row at `position` sees."""
    return 0 if heads.window is None else max(0, position - heads.window + 1)


def scored_rows(rows: int, score: ScoreSpec) -> list[int]:
    """Which of a request's verify rows count towards its scores."""
    return {"all": list(range(rows)), "ends": sorted({0, rows - 1}), "last": [rows - 1]}[score.rows]


def row_values(logits: torch.Tensor, lse: torch.Tensor, lse_ref: torch.Tensor | None, score: ScoreSpec) -> torch.Tensor:
    """What one row gives each key: logits [Hq, N], -inf where unseen, and lse [Hq] -> values [Hq, N].

    Weights are 0 and logits NaN where the row does not see the key.
    """
    if score.value == "logit":
        return torch.where(logits > -math.inf, logits, math.nan)
    normaliser = lse if lse_ref is None else lse_ref.double()
    weights = torch.exp((logits - normaliser[:, None]).clamp_max(REFERENCE_CEILING * math.log(2.0)))
    return torch.where(normaliser.isfinite()[:, None] & (logits > -math.inf), weights, 0.0)


def reduce_scores(values: torch.Tensor, score: ScoreSpec, score_rows: int) -> torch.Tensor:
    """values [rows, Hq, N] of the scored rows -> scores [S, N]: a mean over rows and each score row's heads."""
    grouped = values.view(values.shape[0], score_rows, -1, values.shape[-1]).transpose(1, 2).flatten(0, 1)
    if score.value == "weight":
        return grouped.mean(dim=0)
    return grouped.nanmean(dim=0).nan_to_num(nan=-math.inf, neginf=-math.inf)


def pool_pages(scores: torch.Tensor, score: ScoreSpec, page_size: int) -> torch.Tensor:
    """Scores [S, prefix] of keys -> [S, pages], over each page's prefix keys."""
    pages = scores.split(page_size, dim=-1)
    pooled = [page.mean(dim=-1) if score.granularity == "page_mean" else page.amax(dim=-1) for page in pages]
    return torch.stack(pooled, dim=-1)


def count_scores(scores: torch.Tensor) -> torch.Tensor:
    """Float32 scores [..., N], NaN where unwritten -> counts [..., HISTOGRAM_BINS] int32 by their top 11 bits."""
    bins = (scores.contiguous().view(torch.int32) >> 21).long()
    written = ~scores.isnan()
    counts = torch.zeros(*scores.shape[:-1], HISTOGRAM_BINS, dtype=torch.int32)
    return counts.scatter_add_(-1, torch.where(written, bins, 0), written.int())


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    *,
    heads: HeadConfig,
    score: ScoreSpec | None = None,
    max_kv: int | None = None,
    sinks: torch.Tensor | None = None,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> VerifyOutput:
    """Causal attention of each request's rows over its whole paged cache, with the scores of its prefix keys."""
    out, lse = _outputs(q, heads)
    page_size = k_cache.shape[1]
    max_prefix = page_table.shape[1] * page_size if max_kv is None else max_kv
    score_rows = heads.num_kv_heads if score and score.heads == "kv_head" else 1
    columns = score.columns(max_prefix, page_size) if score else 0
    scores = torch.full((len(kv_lens), score_rows, columns), math.nan, dtype=torch.float64) if score else None

    for request, kv_len in enumerate(kv_lens.tolist()):
        start, end = int(cu_q[request]), int(cu_q[request + 1])
        if kv_len <= 0 or end == start:
            continue
        first_row = kv_len - (end - start)  # position of the first row; negative when it lies before every key
        prefix = max(0, first_row)
        keys = gather_keys(k_cache, page_table[request], torch.arange(kv_len), k_scale)
        values = gather_keys(v_cache, page_table[request], torch.arange(kv_len), v_scale)
        given = torch.zeros(end - start, heads.num_q_heads, kv_len, dtype=torch.float64)
        for row in range(start, end):
            position = first_row + row - start
            logits = row_logits(q[row], keys, heads)
            logits[:, : first_visible(position, heads)] = -math.inf
            logits[:, max(0, position + 1) :] = -math.inf
            out[row], lse[row] = attend(logits, values, sinks, heads)
            if score is not None:
                given[row - start] = row_values(logits, lse[row], None if lse_ref is None else lse_ref[row], score)
        if score is not None and scores is not None and prefix > 0:
            found = reduce_scores(given[scored_rows(end - start, score), :, :prefix], score, score_rows)
            found = pool_pages(found, score, page_size) if score.by_page else found
            scores[request, :, : found.shape[-1]] = found
    return VerifyOutput(out, lse, scores)


def rank_keys(scores: torch.Tensor, forced: torch.Tensor, *, newest_first: bool = False) -> torch.Tensor:
    """scores [N], forced [N] bool -> positions [N]: forced keys, then the others from large to small scores.

    Equal scores, -0 and +0 among them, go to the smaller index, or with `newest_first` to the larger; NaN comes last.
    """
    values = scores.double() + 0.0
    order = torch.arange(len(values)).flip(0) if newest_first else torch.arange(len(values))
    for last_first in (values.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf).neg(), values.isnan().int()):
        order = order[last_first[order].sort(stable=True).indices]
    return order[(~forced[order]).int().sort(stable=True).indices]


def count_by_mass(masses: torch.Tensor, policy: TopP) -> int:
    """How many of a row's masses [N], forced and then largest first, hold the share p of them all."""
    reached = masses.cumsum(0)
    if policy.p == 1.0:
        return int((masses > 0).nonzero().max()) + 1
    return int((reached >= policy.p * reached[-1]).nonzero()[0]) + 1 if policy.p > 0 else 0


def bisected_threshold(free: torch.Tensor, forced_mass: float, policy: TopP, steps: int) -> float:
    """The largest threshold that `steps` halvings of [0, largest free score] show to hold the share p of the mass."""
    target = policy.p * (forced_mass + float(free.sum()))
    low, high = 0.0, float(free.max()) if len(free) else 0.0
    for _ in range(steps):
        middle = float(torch.tensor(0.5 * (low + high), dtype=torch.float32))
        if forced_mass + float(torch.where(free >= middle, free, 0.0).sum()) >= target:
            low = middle
        else:
            high = middle
    return low


def count_selected(
    ranked: torch.Tensor, forced: int, policy: Policy, threshold: float, budgets: tuple[int, int]
) -> int:
    """How many a policy takes of a row's scores [N], ranked, the forced ones first; budgets: (least, most) columns."""
    free, (least, most) = ranked[forced:], budgets
    if isinstance(policy, Threshold):
        return forced + (len(free) if math.isnan(threshold) else int((free >= threshold).sum()))
    if isinstance(policy, TopK):
        return max(most, forced)
    if float(ranked.sum()) == 0.0:
        return max(least, forced)
    if policy.bisection_steps is None:
        taken = count_by_mass(ranked, policy)
    else:
        low = bisected_threshold(free, float(ranked[:forced].sum()), policy, policy.bisection_steps)
        taken = forced + int((free >= low).sum())
    return max(min(max(taken, least), most), forced)


def select_row(
    scores: torch.Tensor, prefix: int, policy: Policy, threshold: float, *, sink: int, recent: int, block: int
) -> list[int]:
    """scores [N] of one row, of which the blocks of the first `prefix` keys count -> ascending positions."""
    row = scores[: blocks_of(prefix, block)].double()
    first_keys = torch.arange(len(row)) * block
    forced = (first_keys < sink) | ((first_keys + block > prefix - recent) & (recent > 0))
    least = 0 if isinstance(policy, Threshold) else blocks_of(min(policy.min, prefix), block)
    budgets = (least, blocks_of(policy.most_keys(prefix), block))
    order = rank_keys(row, forced, newest_first=isinstance(policy, TopP) and float(row.sum()) == 0.0)
    return sorted(order[: count_selected(row[order], int(forced.sum()), policy, threshold, budgets)].tolist())


def select_kv(
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    policy: Policy,
    *,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    page_table: torch.Tensor | None = None,
    page_size: int = 1,
    union: int = 1,
) -> Selection:
    """Forced first and recent keys, then the best scored others as far as the policy goes; smaller index on ties.

    scores [B, S, N] or [L, B, S, N], each of `block` keys; with a page_table [B, max_pages] also physical slots. What
    `union` neighbouring score rows select is merged into one row.
    """
    *leading, score_rows, columns = scores.shape
    value = policy.value if isinstance(policy, Threshold) else 0.0
    thresholds = torch.as_tensor(value, dtype=torch.float64).expand(scores.shape[:-1]).flatten().tolist()
    rows = scores.flatten(0, -2)
    requests = torch.arange(leading[-1]).repeat_interleave(score_rows).repeat(math.prod(leading[:-1])).tolist()
    prefixes = [max(0, min(length, columns * block)) for length in prefix_lens.tolist()]
    chosen = [
        select_row(row, prefixes[request], policy, threshold, sink=sink, recent=recent, block=block)
        for row, request, threshold in zip(rows, requests, thresholds, strict=True)
    ]
    chosen = [sorted(set().union(*chosen[first : first + union])) for first in range(0, len(chosen), union)]
    width = max((len(keys) for keys in chosen), default=0)
    indices = torch.tensor([keys + [-1] * (width - len(keys)) for keys in chosen], dtype=torch.int32)
    counts = torch.tensor([len(keys) for keys in chosen], dtype=torch.int32).view(*leading, score_rows // union)
    indices = indices.view(*leading, score_rows // union, width)
    slots = None if page_table is None else physical_slots(indices, page_table, page_size // block)
    return Selection(indices, counts, block, slots)


def physical_slots(indices: torch.Tensor, page_table: torch.Tensor, per_page: int) -> torch.Tensor:
    """indices [.., B, S, K] -> slots int64 of the same shape, `per_page` of them to a page of page_table [B, pages].

    -1 for padding, for an index past the table and for one whose entry is negative.
    """
    pages = torch.div(indices, per_page, rounding_mode="floor").long()
    inside = (indices >= 0) & (pages < page_table.shape[1])
    entries = page_table.long()[:, None].expand(*indices.shape[:-1], -1)
    entry = entries.gather(-1, torch.where(inside, pages, 0)) if page_table.shape[1] else torch.full_like(pages, -1)
    return torch.where(inside & (entry >= 0), entry * per_page + indices % per_page, -1)


def sparse_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    selection: Selection,
    tail_start: torch.Tensor,
    *,
    heads: HeadConfig,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> SparseOutput:
    """A row at position p sees {selected j < tail_start} and {tail_start <= j <= p}, inside its window."""
    out, lse = _outputs(q, heads)
    kinds: ScoreHeads = "layer" if selection.indices.shape[1] == 1 else "kv_head"
    for request, kv_len in enumerate(kv_lens.tolist()):
        start, end = int(cu_q[request]), int(cu_q[request + 1])
        if kv_len <= 0 or end == start:
            continue
        keys = gather_keys(k_cache, page_table[request], torch.arange(kv_len), k_scale)
        values = gather_keys(v_cache, page_table[request], torch.arange(kv_len), v_scale)
        visible = torch.zeros(heads.num_kv_heads, kv_len, dtype=torch.bool)
        for kv_head in range(heads.num_kv_heads):
            row = 0 if kinds == "layer" else kv_head
            count = int(selection.counts[request, row])
            blocks = selection.indices[request, row, :count].long() * selection.block
            picked = (blocks[:, None] + torch.arange(selection.block)).flatten()
            visible[kv_head, picked[picked < min(int(tail_start[request]), kv_len)]] = True
        visible[:, max(0, int(tail_start[request])) :] = True
        visible = visible.repeat_interleave(heads.group, dim=0)  # [Hq, kv_len]
        for row in range(start, end):
            position = kv_len - end + row
            logits = row_logits(q[row], keys, heads).masked_fill(~visible, -math.inf)
            logits[:, : first_visible(position, heads)] = -math.inf
            logits[:, max(0, position + 1) :] = -math.inf
            out[row], lse[row] = attend(logits, values, sinks, heads)
    return SparseOutput(out, lse)


def mixed_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    selection: Selection,
    tail_start: torch.Tensor,
    mode: torch.Tensor,
    *,
    heads: HeadConfig,
    score: ScoreSpec | None = None,
    max_kv: int | None = None,
    sinks: torch.Tensor | None = None,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> VerifyOutput:
    """Each request by its mode: 0 as verify_attention, 1 as sparse_attention, which emits no scores."""
    inputs = (q, k_cache, v_cache, page_table, kv_lens, cu_q)
    common = {"heads": heads, "sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    verified = verify_attention(*inputs, score=score, max_kv=max_kv, lse_ref=lse_ref, **common)
    drafted = sparse_attention(*inputs, selection, tail_start, **common)
    drafts = mode != 0
    rows = drafts.repeat_interleave(cu_q.diff())
    out = torch.where(rows[:, None, None], drafted.out, verified.out)
    lse = torch.where(rows[:, None], drafted.lse, verified.lse)
    scores = verified.scores
    return VerifyOutput(out, lse, None if scores is None else torch.where(drafts[:, None, None], math.nan, scores))
