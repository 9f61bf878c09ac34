"""What is asked of the GPU, as data, and the small sizes at which a CPU rehearses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.spec import Dtype, ScoreSpec, Workload
from specattn_codegen.workloads import BUDGET, DRAFT_LEN, PILLAR_SCORES, REFERENCE_SCORES, VEGAS_SCORES

PAGE_SIZE = 16
MODELS = ("llama3-8b", "gpt-oss-20b", "llama2-7b", "qwen3-8b")  # the last has the first one's heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A Llama's shape. Its weights are drawn: time does not depend on them."""

    heads: HeadConfig
    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """read_bytes     of the buffer that bandwidth is measured on
    matrix_extent     of a square matrix product
    launches          whose cost is measured
    sanitizers        tools that watch a sample
    heads             checked and tuned, by name
    dtypes            of the kernels that are checked
    plans_checked     of each kernel
    plans_timed       of each search
    tuned             sizes of verification (the draft's rows, or one row) that are tuned, by priority
    peers             verification beside its peers
    scores            presets whose scores rounds are run with
    selections        batch and keys of a selection of all layers
    layers            of such a selection
    sparse            batch and keys of sparse attention
    model             that the rounds run
    graph_round       batch, keys and layers of the round whose graph is checked
    rounds            batch and keys of the rounds that are timed
    seconds           of timing for one series
    """

    read_bytes: int
    matrix_extent: int
    launches: int
    sanitizers: tuple[str, ...]
    heads: Mapping[str, HeadConfig]
    dtypes: tuple[Dtype, ...]
    plans_checked: int
    plans_timed: int
    tuned: tuple[tuple[int, int], ...]
    peers: tuple[Workload, ...]
    scores: Mapping[str, ScoreSpec]
    selections: tuple[tuple[int, int], ...]
    layers: int
    sparse: tuple[tuple[int, int], ...]
    model: ModelSize
    graph_round: tuple[int, int, int]
    rounds: tuple[tuple[int, int], ...]
    seconds: float


def _distinct_heads() -> dict[str, HeadConfig]:
    """One name for each HeadConfig of MODELS, as in `llama3-8b, qwen3-8b`."""
    names: dict[HeadConfig, list[str]] = {}
    for model in MODELS:
        kinds = layer_heads(model)
        for kind, heads in kinds.items():
            names.setdefault(heads, []).append(model if len(kinds) == 1 else f"{model} {kind}")
    return {", ".join(same): heads for heads, same in names.items()}


def budget(kv_len: int) -> int:
    """Keys selected out of a context, as the papers have it."""
    return max(1, BUDGET.budget(kv_len - DRAFT_LEN - 1))


def on_gpu() -> Sizes:
    batches, rows = (4, 16), (1, 2, 4, 8)
    lengths = (32768, 131072)
    return Sizes(
        read_bytes=8 << 30,
        matrix_extent=8192,
        launches=64,
        sanitizers=("memcheck", "racecheck"),
        heads=_distinct_heads(),
        dtypes=("bfloat16", "float16", "float32"),
        plans_checked=4,
        plans_timed=14,
        tuned=((4, 32768), (16, 131072), (1, 32768), (16, 8192)),
        peers=tuple(Workload(batch=b, q_len=q, kv_len=n) for n in lengths for b in batches for q in rows),
        scores={"reference": REFERENCE_SCORES, "pillar": PILLAR_SCORES, "vegas": VEGAS_SCORES},
        selections=tuple((batch, kv_len) for batch in (1, *batches) for kv_len in lengths),
        layers=32,
        sparse=tuple((batch, kv_len) for batch in batches for kv_len in lengths),
        model=ModelSize(
            heads=HeadConfig.from_model("llama3-8b"),
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            vocab_size=128256,
        ),
        graph_round=(4, 8192, 8),
        # The papers' length first: if time runs out, the one number that is compared with theirs stands.
        rounds=((1, 102400), *((b, n) for n in (32768, 8192, 131072) for b in (16, 1, 4, 64))),
        seconds=0.2,
    )


def rehearsed() -> Sizes:
    heads = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=16)
    return Sizes(
        read_bytes=1 << 18,
        matrix_extent=64,
        launches=1,
        sanitizers=("memcheck",),
        heads={"tiny": heads},
        dtypes=("bfloat16",),
        plans_checked=1,
        plans_timed=2,
        tuned=((2, 160),),
        peers=(Workload(batch=2, q_len=3, kv_len=130),),
        scores={"reference": REFERENCE_SCORES},
        selections=((2, 200),),
        layers=2,
        sparse=((2, 160),),
        model=ModelSize(heads=heads, hidden_size=32, intermediate_size=48, num_layers=2, vocab_size=61),
        graph_round=(2, 96, 2),
        rounds=((2, 90),),
        seconds=0.01,
    )
