"""specattn-export: tuned kernels as code of their own, which needs torch and triton and nothing of this project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from specattn_codegen import paths
from specattn_codegen.cli import console
from specattn_codegen.cli.options import HEADS, KV_DTYPE, MODEL, PACKS, PAGE_SIZE, TP
from specattn_codegen.cli.progress import console as output
from specattn_codegen.cli.tune_request import find_heads
from specattn_codegen.errors import SpecError
from specattn_codegen.export.cubins import Binaries, compiled, cubin_files
from specattn_codegen.export.hugging_face import repository_files
from specattn_codegen.export.package import Export, default_name, folder_files, write
from specattn_codegen.export.tables import tables
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder
from specattn_codegen.packs.pack_file import LICENCE
from specattn_codegen.processors import gpu_detect, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import DTYPES, Dtype, KernelSpec, KvDtype
from specattn_codegen.workloads import TUNED_OPS, mixed_specs, model_specs

LAYOUTS = {"folder": folder_files, "hf-kernels": repository_files}
CUBINS = "cubins"  # TileLang's kernels, compiled
EXAMPLES = """
\b
Examples:
  specattn-export --model llama3-8b --gpu h100 --out ./llama3-kernels
  specattn-export --heads 32,8,128 --gpu mi300x --packs ./packs --name my-kernels
  specattn-export --model llama3-8b --gpu h100 --layout hf-kernels --out ./hub-repository
  specattn-export --model llama3-8b --gpu h100 --layout cubins      TileLang's kernels as CUDA source and binaries

\b
Then, with nothing but torch and triton:
  cd llama3-kernels && python -m specattn_h100_q32_kv8_d128.smoke_test     on a GPU
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@MODEL
@HEADS
@TP
@click.option("--gpu", default="local", show_default=True, metavar="NAME|local", help="The processor to export for.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of q and the cache.")
@KV_DTYPE
@PAGE_SIZE
@PACKS
@click.option(
    "--layout",
    type=click.Choice((*LAYOUTS, CUBINS)),
    default="folder",
    show_default=True,
    help="A package of Triton kernels, the same as a kernel repository, or TileLang's kernels as CUDA binaries.",
)
@click.option("--name", help="Lower-case letters, digits and dashes. [specattn-<gpu>-<heads>]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="An empty or new folder. [./<name>]")
def command(
    model: str | None,
    heads: str | None,
    tp: int,
    gpu: str,
    dtype: Dtype,
    kv_dtype: KvDtype | None,
    page_size: int,
    packs: tuple[Path, ...],
    layout: str,
    name: str | None,
    out: Path | None,
) -> None:
    """Write tuned kernels as a package of their own.

    It holds the rendered kernels, a plain table that says which of them serves which sizes, launch functions, where
    everything comes from, and a smoke test. The table is what lookups find in packs today; where they have nothing,
    a plan that the cost model chose among proved ones or the safe default, and PROVENANCE.json says so. A model whose
    layers differ gives a package each.
    """
    arch = find_gpu(gpu)
    kinds = find_heads(model, heads, tp)
    if name and len(kinds) > 1:
        raise SpecError(
            f"--name {name}: {model} has {len(kinds)} kinds of layers and takes a name for each; leave it out"
        )
    for kind in kinds:
        own_name = name or default_name(arch, kind)
        folder = (out / own_name if len(kinds) > 1 else out) if out else Path(own_name)
        if layout == CUBINS:
            known = ladder.read(arch, kind, paths.pack_layers(*packs))
            kernels = compiled(specs_of(kind, dtype, kv_dtype, page_size), arch, known)
            write(folder, cubin_files(own_name, arch, kind, LICENCE, kernels))
            report_binaries(kernels, arch, folder)
        else:
            export = exported(own_name, arch, kind, dtype, kv_dtype, page_size, packs)
            write(folder, LAYOUTS[layout](export))
            report(export, folder, layout)


def find_gpu(gpu: str) -> Arch:
    if gpu == "cpu":
        raise SpecError("--gpu cpu: only Triton kernels are exported; name a GPU, as in --gpu h100")
    return gpu_detect.local() if gpu == "local" else gpus.find(gpu)


def exported(
    name: str,
    arch: Arch,
    heads: HeadConfig,
    dtype: Dtype,
    kv_dtype: KvDtype | None,
    page_size: int,
    packs: tuple[Path, ...],
) -> Export:
    specs = specs_of(heads, dtype, kv_dtype, page_size)
    found = ladder.read(arch, heads, paths.pack_layers(*packs))
    return Export(name=name, arch=arch, heads=heads, licence=LICENCE, tables=tables(specs, found))


def specs_of(heads: HeadConfig, dtype: Dtype, kv_dtype: KvDtype | None, page_size: int) -> list[KernelSpec]:
    specs = model_specs(heads, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, ops=TUNED_OPS)
    return [*specs, *mixed_specs(heads, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size)]


def report(export: Export, folder: Path, layout: str) -> None:
    screen = output()
    rungs = Counter(row.note for row in export.rows)
    lines = [
        f"{folder}: {len(export.kernels)} kernels for {len(export.rows)} sizes of {len(export.tables)} operations",
        *(f"  {count} {note}" for note, count in sorted(rungs.items())),
    ]
    if any(row.found.candidate is None for row in export.rows):
        lines.append(f"not tuned: {export.heads.name} on {export.arch.name} has no entries for some; see specattn-tune")
    if layout == "folder":
        lines.append(f"next, on {export.arch.name}: cd {folder} && python -m {export.package}.smoke_test")
    else:
        lines.append(f"next: upload {folder} as a kernel repository; kernel-builder takes it as it is")
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)


def report_binaries(kernels: Sequence[Binaries], arch: Arch, folder: Path) -> None:
    screen = output()
    screen.print(f"{folder}: {len(kernels)} kernels as binaries for {arch.name}", markup=False, soft_wrap=True)
    for proof, count in Counter(one.proved_by or "none" for one in kernels).items():
        trust = "; check them on the GPU before trusting one" if proof == "none" else ""
        screen.print(f"  {count} proved by {proof}{trust}", markup=False, soft_wrap=True)


def main() -> None:
    console.run(command)
