"""specattn-generate: a checkpoint, a prompt and a preset in; text and what it cost out."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import click
import torch
from rich.console import Console

from specattn_codegen.cli.console import run
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_runtime import load_kernels
from specattn_runtime.checkpoint import load_llama
from specattn_runtime.cli.report import identical_line, run_table
from specattn_runtime.decode_spec import DecodeSpec
from specattn_runtime.engine import generate, warm_up
from specattn_runtime.generation import first_difference
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.presets import PRESETS, Preset, preset_named
from specattn_runtime.reference_kernels import ReferenceKernels
from specattn_runtime.tokens import codec_of

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

PRESET_LINES = "\n".join(f"  {preset.name:<10} {preset.summary}" for preset in PRESETS.values())
HELP = f"""Decode with a Hugging Face Llama: draft with few keys, verify with all, get the text dense decoding gives.

Prints the text, then tokens a second, the drafts accepted per round, and the passes over the full KV cache beside the
number of tokens. Greedy. Without a tokenizer.json a token is a byte, and nothing but --max-new-tokens ends the text.

\b
Examples:
  specattn-generate --model tests/assets/tiny-bytes-llama --prompt "def main():" --max-new-tokens 64
  specattn-generate --model DIR --prompt-file prompt.txt --preset pillar --draft-len 8 --budget 0.05
  specattn-generate --model DIR --prompt-file prompt.txt --preset vegas --compare-dense
  specattn-generate --model DIR --prompt-file prompt.txt --dtype float64 --compare-dense   # the strict proof

\b
Presets:
{PRESET_LINES}

Exit codes: 0, 1 when --compare-dense finds a difference, 2 for bad input, 130 for Ctrl-C.
"""


@click.command(help=HELP, context_settings={"max_content_width": 120})
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Checkpoint folder.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File whose content is the prompt.")
@click.option("--prompt", help="The prompt itself.")
@click.option("--preset", "preset_name", default="vegas", show_default=True, help="How drafts choose their keys.")
@click.option("--draft-len", default=6, show_default=True, help="Drafts a round, at least 1.")
@click.option("--budget", default=0.07, show_default=True, help="Keys drafts read, as a share of the prefix.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens to generate.")
@click.option("--min-budget", type=click.IntRange(min=0), help="Least keys to select.  [default: the preset's]")
@click.option("--sink", type=click.IntRange(min=0), help="First keys, always selected.  [default: the preset's]")
@click.option("--recent", type=click.IntRange(min=0), help="Last keys, always selected.  [default: the preset's]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of the weights.")
@click.option("--page-size", default=16, show_default=True, help="Keys per page of the KV cache.")
@click.option(
    "--kernels",
    "kernels_name",
    type=click.Choice(["generated", "reference"]),
    help="Generated kernels, or the float64 reference.  [default: generated; reference with --dtype float64]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--compare-dense", is_flag=True, help="Decode densely too, by the same kernels, and compare.")
def command(
    model: Path,
    prompt_file: Path | None,
    prompt: str | None,
    preset_name: str,
    draft_len: int,
    budget: float,
    max_new_tokens: int,
    min_budget: int | None,
    sink: int | None,
    recent: int | None,
    dtype: str,
    page_size: int,
    kernels_name: str | None,
    threads: int | None,
    compare_dense: bool,
) -> None:
    spec = DecodeSpec(
        preset=_customised(preset_named(preset_name), min_budget=min_budget, sink=sink, recent=recent),
        draft_len=draft_len,
        budget=budget,
        max_new_tokens=max_new_tokens,
        page_size=page_size,
    )
    text = _prompt_bytes(prompt_file, prompt)
    if threads is not None:
        torch.set_num_threads(threads)
    llama = load_llama(model, dtype=DTYPES[dtype])
    codec = codec_of(model, llama.config)
    spec = dataclasses.replace(spec, stop_tokens=codec.stop_tokens)
    kernels = _kernels(kernels_name, llama.config.heads, dtype, page_size)
    prompts = [codec.encode(text)]

    if not isinstance(kernels, ReferenceKernels):
        with Console(stderr=True).status("building kernels"):
            warm_up(llama, kernels, prompts, spec)
            if compare_dense:
                warm_up(llama, kernels, prompts, spec.without_drafts())
    with Console(stderr=True).status("decoding"):
        runs = {spec.preset.name: generate(llama, kernels, prompts, spec)}
        dense = generate(llama, kernels, prompts, spec.without_drafts()) if compare_dense else None
    click.echo(codec.decode(runs[spec.preset.name].requests[0].tokens))
    click.echo()
    Console().print(run_table(f"{len(prompts[0])} prompt tokens, {dtype}", runs | ({"dense": dense} if dense else {})))
    if dense is not None:
        difference = first_difference(runs[spec.preset.name].requests[0], dense.requests[0])
        click.echo(identical_line(difference, float32=dtype == "float32"))
        sys.exit(1 if difference else 0)


def _customised(preset: Preset, **overrides: int | None) -> Preset:
    """The preset with the overrides that were given."""
    return dataclasses.replace(preset, **{name: value for name, value in overrides.items() if value is not None})


def _prompt_bytes(prompt_file: Path | None, prompt: str | None) -> bytes:
    if (prompt_file is None) == (prompt is None):
        raise SpecError("prompt: give exactly one of --prompt-file and --prompt")
    if prompt_file is None:
        content, source = os.fsencode(prompt or ""), "--prompt"
    elif prompt_file.is_dir() or not prompt_file.exists():
        raise SpecError(f"{prompt_file}: no such file; give a file with the prompt")
    else:
        content, source = prompt_file.read_bytes(), str(prompt_file)
    if not content:
        raise SpecError(f"{source}: empty; give at least one character to continue from")
    return content


def _kernels(name: str | None, heads: HeadConfig, dtype: str, page_size: int) -> AttentionKernels:
    if name == "generated" and dtype == "float64":
        raise SpecError("dtype=float64: only the reference kernels compute in it; leave --kernels out")
    if name == "reference" or dtype == "float64":
        return ReferenceKernels(heads)
    return load_kernels(heads, device="cpu", dtype=DTYPES[dtype], page_size=page_size)


def main() -> None:
    run(command)
