"""How far is CPU verification attention from the memory it must read, and from torch, in one and the same run?

    specattn-bench verify --out verify.json

One request, a paged cache of shuffled pages of 16 keys. Peers are torch's scaled_dot_product_attention over a
contiguous cache, in the best of the layouts tried: query heads of a group as rows of one head, or enable_gqa. All of
one case is timed in turns. The ceiling is the best of several read patterns, measured before and after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from specattn_codegen import build, cpu_info, space
from specattn_codegen.arch import Arch
from specattn_codegen.calls import problem_call
from specattn_codegen.heads import HeadConfig
from specattn_codegen.measure import host_timer, rotated, rotating, time_interleaved
from specattn_codegen.models import parse_heads
from specattn_codegen.problems import TORCH_DTYPES, AttentionProblem
from specattn_codegen.render import render
from specattn_codegen.spec import DTYPE_BYTES, Dtype, KernelSpec, ScoreSpec

SCORES = {
    "none": None,
    "ends, layer": ScoreSpec(rows="ends", heads="layer"),
    "all, KV head": ScoreSpec(rows="all", heads="kv_head"),
}
PAGE_SIZE = 16
Launch = Callable[[], object]


def random_problem(heads: HeadConfig, dtype: Dtype, rows: int, keys: int) -> AttentionProblem:
    """One request whose pages lie in random order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(TORCH_DTYPES[dtype])

    pages = -(-keys // PAGE_SIZE)
    return AttentionProblem(
        q=normal(rows, heads.num_q_heads, heads.head_dim),
        k_cache=normal(pages, PAGE_SIZE, heads.num_kv_heads, heads.head_dim),
        v_cache=normal(pages, PAGE_SIZE, heads.num_kv_heads, heads.v_head_dim),
        page_table=torch.randperm(pages, generator=generator).int()[None],
        kv_lens=torch.tensor([keys], dtype=torch.int32),
        cu_q=torch.tensor([0, rows], dtype=torch.int32),
        max_q=rows,
        max_kv=keys,
        sinks=None,
        indices=None,
        counts=None,
        tail_start=torch.tensor([keys - rows], dtype=torch.int32),
    )


def torch_peers(heads: HeadConfig, problem: AttentionProblem) -> dict[str, Launch]:
    """Calls over contiguous [1, Hkv, N, D] copies, made outside the timing."""
    keys, rows = int(problem.kv_lens[0]), problem.q.shape[0]
    pages = problem.page_table[0].long()
    k, v = (
        cache[pages].flatten(0, 1)[None, :keys].transpose(1, 2).contiguous()
        for cache in (problem.k_cache, problem.v_cache)
    )
    packed = problem.q.view(rows, heads.num_kv_heads, heads.group, heads.head_dim).permute(1, 2, 0, 3)
    packed = packed.reshape(1, heads.num_kv_heads, heads.group * rows, heads.head_dim).contiguous()
    plain = problem.q.transpose(0, 1)[None].contiguous()
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if rows > 1 else None
    seen_packed = None if seen is None else seen.repeat(heads.group, 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        "SDPA, group as rows": lambda: attention(packed, k, v, attn_mask=seen_packed),
        "SDPA, enable_gqa": lambda: attention(plain, k, v, attn_mask=seen, enable_gqa=True),
    }


def run_case(
    heads: HeadConfig, arch: Arch, dtype: Dtype, rows: int, keys: int, seconds: float
) -> list[dict[str, object]]:
    problem = random_problem(heads, dtype, rows, keys)
    launches: dict[str, Launch] = {}
    for name, score in SCORES.items():
        spec = KernelSpec(op="verify_attention", heads=heads, dtype=dtype, score=score)
        plan = space.default_plan(spec, arch, "cpu")
        kernel = build.load(render(spec, plan, build.target_for(plan, arch)))
        calls = [problem_call(spec, turn) for turn in rotated(problem, 2)]  # a call's data is cold at its next turn
        launches[f"ours, scores {name}"] = rotating(kernel, calls, "cpu")
    launches |= torch_peers(heads, problem)
    with torch.inference_mode():
        timings = time_interleaved(tuple(launches.values()), seconds=seconds, timer=host_timer)  # pyright: ignore[reportArgumentType]
    read = keys * heads.num_kv_heads * (heads.head_dim + heads.v_head_dim) * DTYPE_BYTES[dtype]
    return [
        {
            "dtype": dtype,
            "rows": rows,
            "keys": keys,
            "what": name,
            "median_us": round(timing.median_us, 1),
            "p20_us": round(timing.p20_us, 1),
            "p80_us": round(timing.p80_us, 1),
            "n": timing.n,
            "cache_gbs": round(read / timing.median_us / 1e3, 2),
        }
        for name, timing in zip(launches, timings, strict=True)
    ]


def show(results: list[dict[str, object]], bandwidth: float, console: Console) -> None:
    table = Table(title=f"read ceiling of this run: {bandwidth:.1f} GB/s", title_justify="left")
    for column in ("dtype", "rows", "what", "median", "cache GB/s", "of ceiling", "times torch"):
        table.add_column(column)
    for result in results:
        same = [r for r in results if (r["dtype"], r["rows"]) == (result["dtype"], result["rows"])]
        torch_best = min(float(str(r["median_us"])) for r in same if str(r["what"]).startswith("SDPA"))
        median, rate = float(str(result["median_us"])), float(str(result["cache_gbs"]))
        table.add_row(
            str(result["dtype"]),
            str(result["rows"]),
            str(result["what"]),
            f"{median / 1e3:.2f} ms",
            f"{rate:.1f}",
            f"{rate / bandwidth:.0%}",
            f"{torch_best / median:.2f}",
        )
    console.print(table)


@click.command("verify")
@click.option("--heads", default="32,8,128", show_default=True, help="Query heads, KV heads, head dim.")
@click.option("--keys", default=32768, show_default=True, help="Keys of the request.")
@click.option("--seconds", default=6.0, show_default=True, help="Timing per case.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the results here as JSON.")
def command(heads: str, keys: int, seconds: float, out: Path | None) -> None:
    """Times verification attention on this CPU beside torch and the memory's own speed."""
    config, arch = HeadConfig(**parse_heads(heads)), cpu_info.detect(measure=False)
    threads = torch.get_num_threads()
    before = cpu_info.measure_rates(arch.target, threads, arch.l2_bytes)
    results: list[dict[str, object]] = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        for rows in (1, 5, 8):
            results += run_case(config, arch, dtype, rows, keys, seconds)
    after = cpu_info.measure_rates(arch.target, threads, arch.l2_bytes)
    bandwidth = max(before["bandwidth_gbs"], after["bandwidth_gbs"])
    show(results, bandwidth, Console(width=120))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "heads": config.name,
            "processor": arch.source,
            "target": arch.target,
            "threads": threads,
            "bandwidth_gbs": bandwidth,
            "torch": torch.__version__,
            "results": results,
        }
        out.write_text(json.dumps(report, indent=2) + "\n")
