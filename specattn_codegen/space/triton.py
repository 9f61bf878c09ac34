"""Triton's search space: every axis and every constraint of its templates. Never imports Triton."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from specattn_codegen.errors import SpecError
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec, ScoreSpec

MAX_THREADS_PER_BLOCK = 1024
USABLE_REGISTERS = 160  # of 255 a thread; the rest holds addresses, operands and loop state
REGISTERS_WITH_OPERANDS = 220  # beyond, no binary for sm_80 to sm_120 was seen to do without spills
ROOMY_REGISTERS = 165  # up to here none was seen to spill in its loop
GATHER_BYTES = 16  # of one load through a pointer
BLOCKS_PER_SM = 2  # blocks of the default plan that share a multiprocessor, so that one reads while one computes
SPLIT_KEYS = (512, 2048)  # fixed lengths of a split, whole tiles of every block_n
DESCRIPTOR_ALIGNMENT = 16  # bytes; of a cache's address and strides, for its tensor memory accelerator
EXPECTED_ROWS = 8  # verify rows the default plan is made for: draft lengths of 4 to 7


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    """Tiles, warps and stages, and where a request's keys are split.

    ctas_per_sm   blocks per multiprocessor that the grid of splits aims at
    split_keys    keys of a split, whatever else is in the batch; 0 where the grid decides
    merge         of splits: separate, by a kernel of its own; fused, by the last block of a tile of rows to finish
    float8        how an 8-bit cache is converted: native, as Triton does; bits, by shifting the fields of its bytes
    kv_load       how tiles of keys and values are read: through pointers; or with a tensor descriptor of the cache, by
                  the processor's tensor memory accelerator
    score_method  dump: attend_splits keeps its weights for score_keys; remat: score_keys reads the keys again;
                  fused: attend_splits averages over its rows at once, which needs no log-sum-exp of its own rows
    """
    if spec.op == "select_kv":
        return (
            Axis("block_n", (1024, 2048, 4096, 8192)),
            Axis("num_warps", (4, 8, 16, 32)),
            Axis("radix_bits", (4, 8)),
            Axis("max_splits", (1, 8, 16, 32)),
        )
    attention = (
        Axis("block_m", (16, 32, 64)),
        Axis("block_n", (16, 32, 64, 128)),
        Axis("num_warps", (1, 2, 4, 8) if spec.op == "sparse_attention" else (2, 4, 8)),
        Axis("num_stages", (1, 2, 3, 4)),
        Axis("ctas_per_sm", (1, 2, 4, 8)),
        Axis("split_keys", (0,) if spec.op == "mixed_attention" else (0, *SPLIT_KEYS)),
    )
    if spec.op != "sparse_attention":
        loads = ("pointer", "descriptor") if spec.op == "verify_attention" else ("pointer",)
        attention = (*attention, Axis("kv_load", loads), Axis("merge", ("separate", "fused")))
    if spec.is_float8:
        attention = (*attention, Axis("float8", ("native", "bits")))
    if spec.score is None:
        return attention
    return (*attention, Axis("score_method", score_methods(spec.score)), Axis("score_block_n", (32, 64, 128, 256)))


def score_methods(score: ScoreSpec) -> tuple[str, ...]:
    """How a score may be made, the default first. Weights normalised by their own rows' log-sum-exp are known only once
    a row has seen every key; logits and weights with a given reference at once, so that nothing is worth keeping."""
    if score.normaliser == "reference":
        return ("fused",)
    return ("fused", "remat") if score.value == "logit" else ("remat", "dump")


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:
    """Of a short list from fast to frugal, the first plan of which several blocks fit one SM, or else the last."""
    if spec.op == "select_kv":
        return Plan.of("triton", block_n=2048, num_warps=8, radix_bits=8, max_splits=16)
    plans = [plan for plan in _plans_by_preference(spec, arch) if why_invalid(plan, spec, arch) is None]
    if not plans:
        raise SpecError(f"head_dim={spec.heads.head_dim}: no Triton tile of it fits {arch.name}; use at most 256")
    roomy = (
        plan
        for plan in plans
        if BLOCKS_PER_SM * smem_bytes(plan, spec, arch) <= arch.smem_per_sm
        and accumulator_registers(plan, spec, arch) + operand_registers(plan, spec, arch) <= ROOMY_REGISTERS
    )
    return next(roomy, plans[-1])


def batch_invariant(plan: Plan) -> Plan:
    """The plan with splits of a fixed length: a row's attention then depends on its own keys alone, neither on the rows
    and requests beside it nor on the bounds of the call. select_kv is exact, hence the same under every plan."""
    if "split_keys" not in plan.as_dict():
        return plan
    return reentrant(plan).replace(split_keys=SPLIT_KEYS[-1], ctas_per_sm=1)


def for_mixed(plan: Plan) -> Plan:
    """A plan of verification for a batch in which requests draft as well: keys are gathered one by one, and what is
    read together depends on all requests."""
    adapted = plan.replace(kv_load="pointer", split_keys=0)
    return adapted.replace(ctas_per_sm=BLOCKS_PER_SM) if plan.integer("split_keys") else adapted


def reentrant(plan: Plan) -> Plan:
    """The plan without counters that its launches share, so that several streams may launch its kernel at once. The
    results are the same to the last bit."""
    return plan.replace(merge="separate") if "merge" in plan.as_dict() else plan


def merges_last(plan: Plan) -> bool:
    """Whether the last block of a tile of rows merges its splits, and no kernel of its own."""
    return plan.get("merge") == "fused"


def _plans_by_preference(spec: KernelSpec, arch: Arch) -> Iterator[Plan]:
    tiles = list(itertools.product((64, 32, 16), (3, 2, 1)))
    if arch.vendor == "nvidia":  # a tile that no stage buffers waits in registers: rather a smaller one
        tiles.sort(key=lambda tile: tile[1] == 1)
    # What a program of a mixed batch remembers of its share of the work leaves room for eight warps or none to spare.
    warps = (8, 4) if spec.op == "mixed_attention" and arch.vendor == "nvidia" else (4, 8)
    for block_m, (block_n, num_stages), num_warps in itertools.product(_block_m_choices(spec), tiles, warps):
        plan = Plan.of(
            "triton",
            block_m=block_m,
            block_n=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            ctas_per_sm=1 if spec.op == "mixed_attention" and num_warps == 8 else BLOCKS_PER_SM,
            split_keys=0,
        )
        if spec.op == "verify_attention":
            plan = plan.replace(kv_load="pointer", merge="separate")
        if spec.op == "mixed_attention":  # which is to be one launch
            plan = plan.replace(kv_load="pointer", merge="separate" if arch.vendor == "amd" else "fused")
        if spec.is_float8:
            plan = plan.replace(float8="native" if _converts_float8(arch) else "bits")
        if spec.score is not None:
            plan = plan.replace(score_method=score_methods(spec.score)[0], score_block_n=_score_block_n(spec, block_n))
        yield plan


def _score_block_n(spec: KernelSpec, block_n: int) -> int:
    """As many keys as attend_splits reads at a time, but few where a score_keys of four warps reads wide ones again."""
    return 32 if padded(spec.heads.head_dim) > 128 else max(32, block_n)


def _converts_float8(arch: Arch) -> bool:
    """Whether Triton converts the formats of caches by instructions. sm_89 has some, but on the way to bfloat16 Triton
    3.6 asks for one of sm_90 there; gfx942's own formats have another exponent bias."""
    return arch.vendor == "nvidia" and arch.compute_capability >= 90


def _block_m_choices(spec: KernelSpec) -> tuple[int, ...]:
    """Tiles that hold the expected rows of one KV head at once, then smaller ones; float32 has registers for few."""
    rows = 1 if spec.op == "sparse_attention" else EXPECTED_ROWS
    wanted = 16 if spec.dtype == "float32" else min(64, padded(rows * spec.heads.group))
    return tuple(block_m for block_m in (64, 32, 16) if block_m <= wanted)


def padded(extent: int) -> int:
    """The power of two a tile dimension is padded to; tensor cores need at least 16."""
    return max(16, 1 << (extent - 1).bit_length())


def smem_bytes(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """Shared memory of the main loop: the K and V tiles in flight, the queries, and the weights on their way to V."""
    dim, v_dim = padded(spec.heads.head_dim), padded(spec.heads.v_head_dim)
    block_m, block_n, num_stages = (plan.integer(name) for name in ("block_m", "block_n", "num_stages"))
    queries, weights = spec.dtype_bytes * block_m * dim, spec.dtype_bytes * block_m * block_n
    tile = spec.cache_bytes * block_n * (dim + v_dim)
    if arch.vendor == "amd":
        if num_stages == 1:  # everything takes turns
            return max(spec.cache_bytes * block_n * max(dim, v_dim), queries, weights)
        return (num_stages - 1) * tile + weights  # queries stay in registers
    converted = converted_bytes(plan, spec, arch)
    if converted:
        return (num_stages - 1) * tile + converted + queries
    # The tile being used keeps its buffer only where tensor cores read shared memory.
    tiles = num_stages if _reads_shared(plan, arch) else max(1, num_stages - 1)
    return tiles * tile + queries + weights


def converted_bytes(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """Shared memory of the tile in use after its 8-bit floats are converted, where tensor cores read it there."""
    if not (spec.is_float8 and _reads_shared(plan, arch)):
        return 0
    return spec.dtype_bytes * plan.integer("block_n") * (padded(spec.heads.head_dim) + padded(spec.heads.v_head_dim))


def _reads_shared(plan: Plan, arch: Arch) -> bool:
    """Whether the tensor cores take keys and values from shared memory (wgmma, tcgen05), not from registers."""
    return arch.compute_capability in (90, 100) and plan.integer("block_m") >= 64


def score_smem_bytes(plan: Plan, spec: KernelSpec) -> int:
    """Shared memory of the kernel that reads the keys a second time: a tile of keys and one of queries."""
    rows = plan.integer("score_block_n") + plan.integer("block_m")
    return spec.dtype_bytes * rows * padded(spec.heads.head_dim)


def _has_scalar_products(spec: KernelSpec, arch: Arch) -> bool:
    """NVIDIA's tensor cores round float32 to TF32, so exact products go through scalar FMAs, unrolled over head_dim."""
    return spec.dtype == "float32" and arch.vendor == "nvidia"


def accumulator_registers(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """32-bit registers a thread needs for the output tile, the logits and the weights."""
    elements = plan.integer("block_m") * (padded(spec.heads.v_head_dim) + 2 * plan.integer("block_n"))
    return elements // (plan.integer("num_warps") * arch.warp_size)


def operand_registers(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """32-bit registers a thread needs beside its accumulators: addresses of gathered keys and values, the tile itself
    where no stages buffer it, 8-bit floats next to what they become, and weights that scores take a second look at.

    Not counted on AMD, which has 512 of them.
    """
    if arch.vendor == "amd":
        return 0
    tile = plan.integer("block_n") * (padded(spec.heads.head_dim) + padded(spec.heads.v_head_dim))
    words = 0.0
    if plan.get("kv_load") != "descriptor":
        words += tile * spec.cache_bytes / GATHER_BYTES * 2
    if plan["num_stages"] == 1:
        words += tile * spec.cache_bytes / 4
    if spec.is_float8:
        words += tile * spec.dtype_bytes / 4
    if spec.score is not None and plan["score_method"] in ("dump", "fused"):
        words += plan.integer("block_m") * plan.integer("block_n")
    return round(words / (plan.integer("num_warps") * arch.warp_size))


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    """The first rule the plan breaks, as a sentence; None for a plan that may be built."""
    threads = plan.integer("num_warps") * arch.warp_size
    if threads > MAX_THREADS_PER_BLOCK:
        return f"num_warps={plan['num_warps']} of {arch.warp_size} threads exceed {MAX_THREADS_PER_BLOCK} in a block"
    if spec.op == "select_kv":
        return None
    if spec.page_size < 1:
        return "page_size=0: a Triton kernel is specialised to its page size; give at least 1 key"
    return _why_tiles_invalid(plan, spec, arch)


def _why_tiles_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    block_m, block_n, num_warps = (plan.integer(name) for name in ("block_m", "block_n", "num_warps"))
    if plan.integer("split_keys") and plan.integer("ctas_per_sm") != 1:
        return f"ctas_per_sm={plan['ctas_per_sm']} has no say where split_keys={plan['split_keys']} is fixed; use 1"
    reason = _why_descriptors_invalid(plan, spec, arch) or _why_merge_invalid(plan, arch)
    if reason is not None:
        return reason
    if spec.kv_dtype == "float8_e4m3" and plan["float8"] == "native" and not _converts_float8(arch):
        return f"float8=native: {arch.name} has no instructions that every Triton uses here; use float8=bits"
    if _has_scalar_products(spec, arch):
        per_thread = block_m * block_n / (num_warps * arch.warp_size)
        if per_thread > 2:
            return f"float32 products of {block_m} rows and {block_n} keys spill with num_warps={num_warps}; use more"
        if per_thread < 1:
            return f"num_warps={num_warps} cannot share the float32 products of {block_m} rows and {block_n} keys"
    elif block_m * block_n < 128 * num_warps:  # one m16n8 product is a warp's smallest piece of work
        return f"num_warps={num_warps} cannot share a tile of {block_m} rows and {block_n} keys"
    needed = smem_bytes(plan, spec, arch)
    if spec.score is not None and plan["score_method"] == "remat":
        needed = max(needed, score_smem_bytes(plan, spec))
    if needed > arch.smem_per_block:
        return f"tiles need about {needed} bytes of shared memory; a block of {arch.name} has {arch.smem_per_block}"
    registers = accumulator_registers(plan, spec, arch)
    if registers > USABLE_REGISTERS:
        return f"tiles need about {registers} registers a thread for accumulators alone; more warps or smaller tiles"
    registers += operand_registers(plan, spec, arch)
    if registers > REGISTERS_WITH_OPERANDS:
        return f"tiles need about {registers} registers a thread with their operands; more warps or smaller tiles"
    return None


def _why_merge_invalid(plan: Plan, arch: Arch) -> str | None:
    if not merges_last(plan):
        return None
    if arch.vendor == "amd":
        # Triton 3.7 compiles tl.debug_barrier for gfx942 to an s_barrier that no s_waitcnt precedes.
        return (
            f"merge=fused: on {arch.name} Triton's barrier does not wait for stores, so that a block could be counted "
            "before its result is there; use merge=separate"
        )
    if plan.integer("split_keys"):
        return (
            f"merge=fused counts the blocks of every tile, of which split_keys={plan['split_keys']} sets no bound; "
            "use merge=separate, or split_keys=0"
        )
    return None


def _why_descriptors_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    if spec.op != "verify_attention" or plan["kv_load"] != "descriptor":
        return None
    if arch.vendor != "nvidia" or arch.compute_capability < 90:
        return f"kv_load=descriptor: {arch.name} has no tensor memory accelerator; use kv_load=pointer"
    if spec.page_size % plan.integer("block_n"):
        return (
            f"kv_load=descriptor reads a tile within one page: page_size={spec.page_size} is no multiple of "
            f"block_n={plan['block_n']}; use a block_n that divides it, or kv_load=pointer"
        )
    for name, dim in (("head_dim", spec.heads.head_dim), ("v_head_dim", spec.heads.v_head_dim)):
        if dim * spec.cache_bytes % DESCRIPTOR_ALIGNMENT:
            return (
                f"kv_load=descriptor: rows of {name}={dim} {spec.cache_dtype} values are no multiple of "
                f"{DESCRIPTOR_ALIGNMENT} bytes; use kv_load=pointer"
            )
    return None
