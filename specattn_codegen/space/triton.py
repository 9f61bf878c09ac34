"""Triton's search space: every axis and every constraint of its templates. Never imports Triton."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from specattn_codegen.arch import Arch
from specattn_codegen.errors import SpecError
from specattn_codegen.plan import Plan
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec

MAX_THREADS_PER_BLOCK = 1024
MAX_TILE_ELEMENTS = 2**20  # Triton refuses larger tensors
USABLE_REGISTERS = 160  # of 255 a thread; the rest holds addresses, operands and loop state
BLOCKS_PER_SM = 2  # blocks of the default plan that share a multiprocessor, so that one reads while one computes
EXPECTED_ROWS = 8  # verify rows the default plan is made for: draft lengths of 4 to 7


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    """Tiles, warps and stages; `ctas_per_sm` sets how many blocks the split-KV grid aims at."""
    if spec.op == "select_kv":
        return (
            Axis("block_n", (1024, 2048, 4096, 8192)),
            Axis("num_warps", (4, 8, 16, 32)),
            Axis("radix_bits", (4, 8)),
        )
    attention = (
        Axis("block_m", (16, 32, 64)),
        Axis("block_n", (16, 32, 64, 128)),
        Axis("num_warps", (2, 4, 8) if spec.op == "verify_attention" else (1, 2, 4, 8)),
        Axis("num_stages", (1, 2, 3, 4)),
        Axis("ctas_per_sm", (1, 2, 4, 8)),
    )
    if spec.score is None:
        return attention
    return (*attention, Axis("score_method", ("dump", "remat")), Axis("score_block_n", (32, 64, 128, 256)))


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:
    """Of a short list from fast to frugal, the first plan of which several blocks fit one SM, or else the last."""
    if spec.op == "select_kv":
        return Plan.of("triton", block_n=4096, num_warps=8, radix_bits=8)
    plans = [plan for plan in _plans_by_preference(spec) if why_invalid(plan, spec, arch) is None]
    if not plans:
        raise SpecError(f"head_dim={spec.heads.head_dim}: no Triton tile of it fits {arch.name}; use at most 256")
    resident = (plan for plan in plans if BLOCKS_PER_SM * smem_bytes(plan, spec, arch) <= arch.smem_per_sm)
    return next(resident, plans[-1])


def _plans_by_preference(spec: KernelSpec) -> Iterator[Plan]:
    for block_m, block_n, num_stages, num_warps in itertools.product(
        _block_m_choices(spec), (64, 32, 16), (3, 2, 1), (4, 8)
    ):
        plan = Plan.of(
            "triton",
            block_m=block_m,
            block_n=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            ctas_per_sm=BLOCKS_PER_SM,
        )
        if spec.score is None:
            yield plan
        else:
            yield plan.replace(score_method="remat", score_block_n=max(32, block_n))


def _block_m_choices(spec: KernelSpec) -> tuple[int, ...]:
    """Tiles that hold the expected rows of one KV head at once, then smaller ones; float32 has registers for few."""
    rows = EXPECTED_ROWS if spec.op == "verify_attention" else 1
    wanted = 16 if spec.dtype == "float32" else min(64, padded(rows * spec.heads.group))
    return tuple(block_m for block_m in (64, 32, 16) if block_m <= wanted)


def padded(extent: int) -> int:
    """The power of two a tile dimension is padded to; tensor cores need at least 16."""
    return max(16, 1 << (extent - 1).bit_length())


def smem_bytes(plan: Plan, spec: KernelSpec, arch: Arch) -> int:
    """Shared memory of the main loop: the K and V tiles in flight, the queries, and the weights on their way to V."""
    dim, v_dim = padded(spec.heads.head_dim), padded(spec.heads.v_head_dim)
    block_m, block_n, num_stages = (plan.integer(name) for name in ("block_m", "block_n", "num_stages"))
    weights = block_m * block_n
    if arch.vendor == "amd":  # queries stay in registers; without stages K and V take turns
        in_flight = block_n * (max(dim, v_dim) if num_stages == 1 else (num_stages - 1) * (dim + v_dim))
        return spec.dtype_bytes * (in_flight + weights)
    # The tile being used keeps its buffer only where tensor cores read shared memory (wgmma, tcgen05).
    reads_shared = arch.compute_capability in (90, 100) and block_m >= 64
    tiles = num_stages if reads_shared else max(1, num_stages - 1)
    return spec.dtype_bytes * (tiles * block_n * (dim + v_dim) + block_m * dim + weights)


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
    return None
