"""What do the GPU languages make of one kernel? Verification for absent GPUs: registers, memory and instructions."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from rich import box
from rich.table import Table

from specattn_bench import report
from specattn_codegen import space
from specattn_codegen.build import tilelang
from specattn_codegen.build.disassemble import sass_opcodes
from specattn_codegen.cli.progress import console
from specattn_codegen.digest import to_plain
from specattn_codegen.environment import compiler_version
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Backend
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
SPEC = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16, score=ScoreSpec())
TARGETS = ("a100", "l4", "h100", "b200", "rtx5090")
LANGUAGES: dict[Backend, str] = {
    "triton": "specattn_codegen.build.cross_compile",
    "tilelang": "specattn_codegen.build.tilelang_compile",
}
# Beginnings of NVIDIA's opcodes by what they do; what is in none of them is counted in the total alone.
KINDS: dict[str, tuple[str, ...]] = {
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "OMMA"),
    "async copies": ("LDGSTS", "UTMALDG"),
    "global": ("LDG.", "STG"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "exponentials": ("MUFU",),
    "floats": ("FFMA", "FADD", "FMUL", "FSEL", "FMNMX", "FSETP"),
    "integers": ("IMAD", "IADD", "LEA", "LOP", "SHF", "ISETP", "UIADD", "UIMAD", "ULEA", "USHF", "ULOP"),
    "barriers": ("BAR", "SYNCS", "WARPSYNC"),
    "shuffles": ("SHFL",),
}


@click.command(name="resources", short_help="What Triton and TileLang make of one kernel, by its binaries.")
@click.option("--gpu", "names", multiple=True, type=click.Choice(TARGETS), help="Only this GPU; may be repeated.")
@click.option("--save", is_flag=True, help="Keep the answer in benchmarks/results/cross-compiled.")
def command(names: tuple[str, ...], save: bool) -> None:
    """Compiles verification of Llama 3 8B's heads by both languages' default plans for GPUs that need not be here."""
    tilelang.require_compilers()
    rows = [row for name in names or TARGETS for row in compiled(gpus.find(name))]
    console().print(table(rows))
    if save:
        answer = {
            "question": "resources",
            "label": "cross-compiled",
            "spec": to_plain(SPEC),
            "compilers": {backend: compiler_version(backend) for backend in LANGUAGES},
            "kernels": rows,
        }
        report.write_json(report.BENCHMARKS / "results" / "cross-compiled" / "resources.json", answer)


def compiled(arch: Arch) -> Iterator[dict[str, object]]:
    """A row for every device function of each language's default plan."""
    for backend, module in LANGUAGES.items():
        compiler = importlib.import_module(module)
        plan = space.default_plan(SPEC, arch, backend)
        source = render(SPEC, plan, backend)
        for taken in compiler.cross_compile(source, arch):
            opcodes = _opcodes(compiler.binary_of(source, arch, taken.kernel))
            yield {
                "gpu": arch.name,
                "target": arch.target,
                "backend": backend,
                "plan": plan.as_dict(),
                **dataclasses.asdict(taken),
                "instructions": {"total": sum(opcodes.values()), **by_kind(opcodes)},
            }


def _opcodes(cubin: bytes) -> Counter[str]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.cubin"
        file.write_bytes(cubin)
        return sass_opcodes(file)


def by_kind(opcodes: Counter[str]) -> dict[str, int]:
    return {
        kind: sum(count for opcode, count in opcodes.items() if f"{opcode}.".startswith(beginnings))
        for kind, beginnings in KINDS.items()
    }


def table(rows: list[dict[str, object]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="default plans of verify_attention, cross-compiled")
    for name in ("target", "language", "kernel", "registers", "spills", "shared", "bytes", *KINDS, "total"):
        is_name = name in ("target", "language", "kernel")
        shown.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        counts = row["instructions"]
        assert isinstance(counts, dict)
        fields = ("target", "backend", "kernel", "registers", "spill_bytes", "smem_bytes", "binary_bytes")
        shown.add_row(*(str(row[field]) for field in fields), *(str(counts[kind]) for kind in (*KINDS, "total")))
    return shown
