"""specattn-generate: a checkpoint, prompts and a preset in; texts and what they cost out."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.live import Live

from specattn_codegen.cli.console import run
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_runtime import load_kernels
from specattn_runtime.cli.report import identical_line, live_table, run_table
from specattn_runtime.cli.text_stream import TextStream
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.engine import generate, warm_up
from specattn_runtime.decoding.generation import Generation, first_difference
from specattn_runtime.decoding.presets import PRESETS, Preset, preset_named
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.sampling import Sampling
from specattn_runtime.decoding.session import Progress, Session
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.tokens import TokenCodec, codec_of

Watch = Callable[[Session, Sequence[Progress]], None]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

PRESET_LINES = "\n".join(f"  {preset.name:<13} {preset.summary}" for preset in PRESETS.values())
HELP = f"""Decode with a Hugging Face Llama: draft with few keys, verify with all, lose nothing.

Greedy text is that of dense decoding, token for token, but where rounding decides between two tokens: --compare-dense
names the first that differs and its margin. With --temperature above 0 it has dense decoding's distribution.
Prints the texts, then tokens a second, the drafts accepted per round, and the passes over the full KV cache beside the
number of tokens. Without a tokenizer.json a token is a byte, and nothing but --max-new-tokens ends the text.

\b
Examples:
  specattn-generate --model tests/assets/tiny-bytes-llama --prompt "def main():" --max-new-tokens 64 --stream
  specattn-generate --model DIR --prompt-file prompt.txt --preset pillar --draft-len 8 --budget 0.05
  specattn-generate --model DIR --prompt-file a.txt --prompt-file b.txt --temperature 0.6 --top-p 0.95 --stats
  specattn-generate --model DIR --prompt-file prompt.txt --preset vegas --compare-dense
  specattn-generate --model DIR --prompt-file prompt.txt --dtype float64 --compare-dense   # the strict proof

\b
Presets:
{PRESET_LINES}

Exit codes: 0, 1 when --compare-dense finds a difference, 2 for bad input, 130 for Ctrl-C.
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Checkpoint folder.")
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File whose content is a prompt; give several for a batch.",
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt itself; give several for a batch.")
@click.option("--preset", "preset_name", default="vegas", show_default=True, help="How drafts choose their keys.")
@click.option("--draft-len", default=6, show_default=True, help="Drafts a round, at least 1.")
@click.option("--adaptive", is_flag=True, help="Make fewer drafts where that gives more tokens a second.")
@click.option("--budget", default=0.07, show_default=True, help="Keys drafts read, as a share of the prefix.")
@click.option("--refresh-interval", default=1, show_default=True, help="Rounds that drafts read the same keys for.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="Of sampling; 0 takes the most likely token.")
@click.option("--top-k", type=int, help="Sample only from the k most likely tokens.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample only from the most likely tokens of this mass.")
@click.option(
    "--seed", default=0, show_default=True, help="Of sampling; each prompt's is one more than the last one's."
)
@click.option("--min-budget", type=click.IntRange(min=0), help="Least keys to select.  [default: the preset's]")
@click.option("--sink", type=click.IntRange(min=0), help="First keys, always selected.  [default: the preset's]")
@click.option("--recent", type=click.IntRange(min=0), help="Last keys, always selected.  [default: the preset's]")
@click.option("--recent-share", type=float, help="Share of the budget for the last keys.  [default: the preset's]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of the weights.")
@click.option("--page-size", default=16, show_default=True, help="Keys per page of the KV cache.")
@click.option(
    "--kernels",
    "kernels_name",
    type=click.Choice(["generated", "reference"]),
    help="Generated kernels, or the float64 reference.  [default: generated; reference with --dtype float64]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--stream", is_flag=True, help="Print the text as it comes; of several, each text as it ends.")
@click.option("--stats", is_flag=True, help="Show a table of what every request gets, while decoding.")
@click.option("--compare-dense", is_flag=True, help="Decode densely too, by the same kernels, and compare.")
def command(
    model: Path,
    prompt_files: tuple[Path, ...],
    prompts: tuple[str, ...],
    preset_name: str,
    draft_len: int,
    adaptive: bool,
    budget: float,
    refresh_interval: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    min_budget: int | None,
    sink: int | None,
    recent: int | None,
    recent_share: float | None,
    dtype: str,
    page_size: int,
    kernels_name: str | None,
    threads: int | None,
    stream: bool,
    stats: bool,
    compare_dense: bool,
) -> None:
    preset = _customised(
        preset_named(preset_name), min_budget=min_budget, sink=sink, recent=recent, recent_share=recent_share
    )
    spec = DecodeSpec(
        preset=preset,
        draft_len=draft_len,
        adaptive=adaptive,
        budget=budget,
        refresh_interval=refresh_interval,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        max_new_tokens=max_new_tokens,
        page_size=page_size,
    )
    if stream and stats:
        raise SpecError("stream, stats: both write to the terminal while decoding; choose one")
    if kernels_name == "generated" and dtype == "float64":
        raise SpecError("dtype=float64: only the reference kernels compute in it; leave --kernels out")
    texts = _prompt_bytes(prompt_files, prompts)
    if threads is not None:
        torch.set_num_threads(threads)
    llama = load_llama(model, dtype=DTYPES[dtype])
    codec = codec_of(model, llama.config)
    spec = dataclasses.replace(spec, stop_tokens=codec.stop_tokens)
    kernels = _kernels(kernels_name, llama.config.heads, dtype, page_size)
    tokens = [codec.encode(text) for text in texts]

    if not isinstance(kernels, ReferenceKernels):
        with Console(stderr=True).status("building kernels"):
            warm_up(llama, kernels, tokens, spec)
            if compare_dense:
                warm_up(llama, kernels, tokens, spec.without_drafts())
    with _watching(codec, len(tokens), stream=stream, stats=stats) as watch:
        found = generate(llama, kernels, tokens, spec, watch=watch)
    if not stream:
        for index, request in enumerate(found.requests):
            click.echo(_headed(codec.decode(request.tokens), index, len(tokens)))
    click.echo()
    runs = {spec.preset.name: found}
    if compare_dense:
        with Console(stderr=True).status("decoding densely"):
            runs["dense"] = generate(llama, kernels, tokens, spec.without_drafts())
    Console().print(run_table(f"{sum(map(len, tokens))} prompt tokens, {dtype}", runs))
    if compare_dense:
        sys.exit(_compare(found, runs["dense"], sampled=not spec.sampling.greedy, float32=dtype == "float32"))


def _compare(found: Generation, dense: Generation, *, sampled: bool, float32: bool) -> int:
    """Prints whether each text is the dense one; the exit code."""
    if sampled:
        click.echo("identical: not to be expected of samples, which have the same distribution")
        return 0
    differences = [first_difference(*pair) for pair in zip(found.requests, dense.requests, strict=True)]
    for index, difference in enumerate(differences):
        name = f"prompt {index + 1}: " if len(differences) > 1 else ""
        click.echo(name + identical_line(difference, float32=float32))
    return int(any(differences))


@contextmanager
def _watching(codec: TokenCodec, prompts: int, *, stream: bool, stats: bool) -> Iterator[Watch | None]:
    """What to call after every step, for as long as decoding lasts."""
    if stream:
        yield _streaming(codec, prompts)
        click.echo()
    elif stats:
        started = time.perf_counter()
        with Live(console=Console(stderr=True)) as live:
            yield lambda session, _: live.update(live_table(session, time.perf_counter() - started))
    else:
        with Console(stderr=True).status("decoding"):
            yield None


def _streaming(codec: TokenCodec, prompts: int) -> Watch:
    """Prints one text as it comes, or each of several when it ends."""
    streams = [TextStream(codec) for _ in range(prompts)]

    def watch(session: Session, given: Sequence[Progress]) -> None:
        for progress in given:
            if prompts == 1:
                click.echo(streams[0].take(progress.tokens, ended=progress.ended), nl=False)
            elif progress.ended:
                text = codec.decode(session.result(progress.request).tokens)
                click.echo(_headed(text, progress.request, prompts))

    return watch


def _headed(text: str, index: int, prompts: int) -> str:
    return text if prompts == 1 else f"[{index + 1}] {text}"


def _customised(preset: Preset, **overrides: float | None) -> Preset:
    """The preset with the overrides that were given."""
    return dataclasses.replace(preset, **{name: value for name, value in overrides.items() if value is not None})


def _prompt_bytes(prompt_files: Sequence[Path], prompts: Sequence[str]) -> list[bytes]:
    """The prompts of files, then those given in words."""
    if not prompt_files and not prompts:
        raise SpecError("prompt: give at least one, with --prompt-file or --prompt")
    for path in prompt_files:
        if path.is_dir() or not path.exists():
            raise SpecError(f"{path}: no such file; give a file with the prompt")
    named = [(str(path), path.read_bytes()) for path in prompt_files]
    named += [("--prompt", os.fsencode(prompt)) for prompt in prompts]
    for source, content in named:
        if not content:
            raise SpecError(f"{source}: empty; give at least one character to continue from")
    return [content for _, content in named]


def _kernels(name: str | None, heads: HeadConfig, dtype: str, page_size: int) -> AttentionKernels:
    if name == "reference" or dtype == "float64":
        return ReferenceKernels(heads)
    return load_kernels(heads, device="cpu", dtype=DTYPES[dtype], page_size=page_size)


def main() -> None:
    run(command)
