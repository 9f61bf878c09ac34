"""TileLang's search space: every axis and every constraint of its templates. Never imports TileLang."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from specattn_codegen.errors import SpecError
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space.axis import Axis
from specattn_codegen.space.triton import score_methods
from specattn_codegen.spec import KernelSpec

SPLIT_KEYS = (512, 2048)  # fixed lengths of a split, whole tiles of every block_n
BLOCKS_PER_SM = 2  # blocks of the default plan that share a multiprocessor, so that one reads while one computes
EXPECTED_ROWS = 8  # verify rows the default plan is made for: draft lengths of 4 to 7
USABLE_REGISTERS = 112  # of 255 a thread; with more, binaries were seen to spill: addresses and operands take the rest
# Where warp groups take operands from shared memory, by how that is filled: 142 to 181 in all, and no spills.
WARP_GROUP_REGISTERS = {"pointer": 128, "descriptor": 160}
WARP_GROUP_ROWS = 64
WARP_ROWS = 16  # of the smallest product of tensor cores
WARP_KEYS = 8
SCORE_ROWS = 32  # that keys are multiplied with at a time where they are read a second time for their scores
MASS_BINS = 16  # of select_kv's sums by digit, as in the template
HISTOGRAM_BINS = 1024
COUNTERS = 8192  # of digits, but at most 16 a digit
EXCHANGED_WORDS = 11  # of 32 bits and of a thread, by all reductions of select_kv together
SCORES_OF_A_THREAD = 16  # in an iteration of select_kv, each in three registers


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    """Tiles, warps and buffers, and where a request's keys are split: the same words as Triton's.

    num_stages    1 reads a tile of keys when it is needed; 2 refills each buffer as soon as it has been used, which
                  TileLang 0.1.15 cannot order where the positions of keys are computed on the way; more have a ring of
                  num_stages - 1 buffers, which it makes for descriptors alone
    kv_load       how tiles of keys and values are read: through pointers, by every warp; or with a tensor descriptor of
                  the cache by the processor's tensor memory accelerator, which four further warps feed; that is for
                  whole pages, so that in a mixed batch selected keys go through pointers all the same
    float8        how an 8-bit cache is converted: by shifting the fields of its bytes
    score_method  as Triton's
    """
    if spec.op == "select_kv":
        return (
            Axis("block_n", (1024, 2048, 4096)),
            Axis("num_warps", (4, 8)),
            Axis("radix_bits", (8, 11)),
            Axis("max_splits", (1, 8, 16, 32)),
        )
    reads_lists = spec.op == "sparse_attention"
    attention = (
        Axis("block_m", (16, 32, 64)),
        Axis("block_n", (32, 64, 128)),
        Axis("num_warps", (2, 4, 8)),
        Axis("num_stages", (1,) if reads_lists else (1, 2, 3, 4)),
        Axis("ctas_per_sm", (1, 2, 4, 8)),
        Axis("split_keys", (0,) if spec.op == "mixed_attention" else (0, *SPLIT_KEYS)),
    )
    if not reads_lists:
        attention = (*attention, Axis("kv_load", ("pointer", "descriptor")))
    if spec.is_float8:
        attention = (*attention, Axis("float8", ("bits",)))
    if spec.score is None:
        return attention
    return (*attention, Axis("score_method", score_methods(spec.score)), Axis("score_block_n", (64, 128, 256)))


def why_unserved(spec: KernelSpec) -> str | None:
    """What these templates do not serve, with the nearest thing that is."""
    if spec.op == "select_kv":
        return None
    if spec.dtype == "float32":
        return "dtype=float32: TileLang's products of float32 round to TF32; use float16 or bfloat16, or backend triton"
    if spec.heads.head_dim % WARP_ROWS or spec.heads.v_head_dim % WARP_ROWS:
        return (
            f"head_dim={spec.heads.head_dim}, v_head_dim={spec.heads.v_head_dim}: TileLang's products need multiples "
            f"of {WARP_ROWS}; use backend triton"
        )
    return None


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:
    """Of a short list from fast to frugal, the first plan of which several blocks fit one SM, or else the last."""
    if spec.op == "select_kv":
        return Plan.of("tilelang", block_n=2048, num_warps=8, radix_bits=8, max_splits=16)
    reason = why_unserved(spec)
    if reason is not None:
        raise SpecError(reason)
    plans = [
        plan
        for plan in _plans_by_preference(spec)
        if why_invalid(plan, spec, arch) is None and accumulator_registers(plan, spec, arch) <= USABLE_REGISTERS
    ]
    if not plans:
        raise SpecError(
            f"head_dim={spec.heads.head_dim}, v_head_dim={spec.heads.v_head_dim}: no TileLang tile of them fits "
            f"{arch.name}; use backend triton"
        )
    roomy = (plan for plan in plans if BLOCKS_PER_SM * smem_bytes(plan, spec, arch) <= arch.smem_per_sm)
    return next(roomy, plans[-1])


def batch_invariant(plan: Plan) -> Plan:
    """The plan with splits of a fixed length: a row's attention then depends on its own keys alone. select_kv is exact,
    hence the same under every plan."""
    if "split_keys" not in plan.as_dict():
        return plan
    return plan.replace(split_keys=SPLIT_KEYS[-1], ctas_per_sm=1)


def _plans_by_preference(spec: KernelSpec) -> Iterator[Plan]:
    packed = spec.heads.group * (1 if spec.op == "sparse_attention" else EXPECTED_ROWS)
    block_ms = [block_m for block_m in (64, 32, 16) if block_m == WARP_ROWS or block_m // 2 < packed]
    stages = (2, 1) if spec.op == "verify_attention" else (1,)
    for block_m, block_n, num_stages, num_warps in itertools.product(block_ms, (64, 32), stages, (4, 2)):
        plan = Plan.of(
            "tilelang",
            block_m=block_m,
            block_n=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            ctas_per_sm=BLOCKS_PER_SM,
            split_keys=0,
        )
        if spec.op != "sparse_attention":
            plan = plan.replace(kv_load="pointer")
        if spec.is_float8:
            plan = plan.replace(float8="bits")
        if spec.score is not None:
            plan = plan.replace(score_method=score_methods(spec.score)[0], score_block_n=64)
        yield plan


def smem_bytes(plan: Plan, spec: KernelSpec, arch: Arch) -> int:  # noqa: ARG001 - as for Triton
    """Shared memory of the main loop: tiles of keys and values, the queries, and weights that warps share."""
    block_m, block_n = plan.integer("block_m"), plan.integer("block_n")
    dims = spec.heads.head_dim + spec.heads.v_head_dim
    weights = 0 if block_m >= WARP_ROWS * plan.integer("num_warps") else block_m * block_n
    buffers = max(1, plan.integer("num_stages") - 1)
    if spec.op == "mixed_attention" and plan["kv_load"] == "descriptor":
        buffers += 1  # for keys of a selection
    elements = buffers * block_n * dims + block_m * spec.heads.head_dim + weights
    converted = block_n * dims if spec.is_float8 else 0
    needed = spec.dtype_bytes * elements + converted
    if plan.get("score_method") == "remat":
        needed = max(needed, _score_smem_bytes(plan, spec))
    return needed


def _score_smem_bytes(plan: Plan, spec: KernelSpec) -> int:
    """Shared memory of the kernel that reads the keys a second time: a tile of keys and one of queries."""
    keys = plan.integer("score_block_n") * spec.heads.head_dim
    queries = min(plan.integer("block_m"), SCORE_ROWS) * spec.heads.head_dim
    return spec.dtype_bytes * (keys + queries) + (keys if spec.is_float8 else 0)


def selection_smem_bytes(plan: Plan) -> int:
    """Shared memory of select_kv: sums of digits by thread, counters of digits, both histograms, a tile's ranks, and
    what threads exchange to add up."""
    threads, bins = 32 * plan.integer("num_warps"), 2 ** plan.integer("radix_bits")
    counters = min(16, COUNTERS // bins) * bins
    words = counters + bins + HISTOGRAM_BINS + plan.integer("block_n") + EXCHANGED_WORDS * threads
    return 8 * MASS_BINS * threads + 4 * words


def accumulator_registers(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """32-bit registers a thread needs for the output tile, the logits, the weights and what is averaged of them."""
    tiles = 3 if plan.get("score_method") == "fused" else 2
    elements = plan.integer("block_m") * (spec.heads.v_head_dim + tiles * plan.integer("block_n"))
    return elements // (plan.integer("num_warps") * arch.warp_size)


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    """The first rule the plan breaks, as a sentence; None for a plan that may be built."""
    if arch.vendor != "nvidia":
        return f"backend tilelang: its templates are made for NVIDIA, not {arch.name}; use backend triton"
    reason = why_unserved(spec)
    if reason is not None:
        return reason
    if spec.op == "select_kv":
        return _why_selection_invalid(plan, arch)
    if spec.page_size < 1:
        return "page_size=0: a TileLang kernel is specialised to its page size; give at least 1 key"
    if plan.integer("split_keys") and plan.integer("ctas_per_sm") != 1:
        return f"ctas_per_sm={plan['ctas_per_sm']} has no say where split_keys={plan['split_keys']} is fixed; use 1"
    block_m, block_n, num_warps = (plan.integer(name) for name in ("block_m", "block_n", "num_warps"))
    by_rows = block_m >= WARP_ROWS * num_warps
    if not by_rows and (block_n % (WARP_KEYS * num_warps) or spec.heads.v_head_dim % (WARP_KEYS * num_warps)):
        return f"num_warps={num_warps} cannot share {block_n} keys and v_head_dim={spec.heads.v_head_dim}; use fewer"
    if (block_n, num_warps) == (128, 8) and block_m < WARP_GROUP_ROWS:
        return f"TileLang 0.1.15 cannot add up {block_m} rows of {block_n} keys held by {num_warps} warps; use 4 warps"
    if block_m > WARP_ROWS * num_warps:
        return f"num_warps={num_warps} have more than one block of {WARP_ROWS} rows each; use more"
    reason = _why_loads_invalid(plan, spec, arch)
    if reason is not None:
        return reason
    needed = smem_bytes(plan, spec, arch)
    if needed > arch.smem_per_block:
        return f"tiles need about {needed} bytes of shared memory; a block of {arch.name} has {arch.smem_per_block}"
    registers = accumulator_registers(plan, spec, arch)
    if registers > _usable_registers(plan, arch):
        return f"tiles need about {registers} registers a thread for accumulators alone; more warps or smaller tiles"
    return None


def _why_selection_invalid(plan: Plan, arch: Arch) -> str | None:
    scores = plan.integer("block_n") // (32 * plan.integer("num_warps"))
    if scores > SCORES_OF_A_THREAD:
        return (
            f"block_n={plan['block_n']} gives a thread {scores} scores, more than {SCORES_OF_A_THREAD}; use more warps"
        )
    needed = selection_smem_bytes(plan)
    if needed > arch.smem_per_block:
        return f"counts need about {needed} bytes of shared memory; a block of {arch.name} has {arch.smem_per_block}"
    return None


def _usable_registers(plan: Plan, arch: Arch) -> int:
    by_warp_groups = arch.compute_capability == 90 and plan.integer("block_m") >= WARP_GROUP_ROWS
    return WARP_GROUP_REGISTERS[str(plan.as_dict().get("kv_load", "pointer"))] if by_warp_groups else USABLE_REGISTERS


def _why_loads_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    num_stages, block_n = plan.integer("num_stages"), plan.integer("block_n")
    if plan.as_dict().get("kv_load") != "descriptor":
        if num_stages > 1 and spec.op == "mixed_attention":
            return f"num_stages={num_stages}: TileLang reads no selected keys ahead; use 1, or kv_load=descriptor"
        if num_stages > 2:
            return f"num_stages={num_stages}: TileLang has one buffer of what is read through pointers; use 2"
        return None
    if spec.is_float8:
        return "kv_load=descriptor: TileLang converts 8-bit caches on their way through pointers; use kv_load=pointer"
    if arch.compute_capability < 90:
        return f"kv_load=descriptor: {arch.name} has no tensor memory accelerator; use kv_load=pointer"
    if num_stages < 2:
        return "kv_load=descriptor reads ahead of the tile in use; use num_stages=2 or more"
    if spec.page_size % block_n:
        return (
            f"kv_load=descriptor reads a tile within one page: page_size={spec.page_size} is no multiple of "
            f"block_n={block_n}; use a block_n that divides it, or kv_load=pointer"
        )
    return None
