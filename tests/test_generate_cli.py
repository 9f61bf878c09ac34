"""specattn-generate as a program: what it prints, and how it ends."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from specattn_runtime.cli.generate import command, main
from specattn_runtime.cli.report import live_table
from specattn_runtime.cli.text_stream import TextStream
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.generation import Generation, RequestResult
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.session import open_session
from specattn_runtime.model.tokens import ByteCodec
from tiny_models import TRAINED, one_thread, save_checkpoint, wavy_llama  # noqa: F401 - a fixture that applies by being here

PROMPT = "import os\n\n\ndef size_of(path):\n    return os."


def invoke(*arguments: str) -> str:
    """Runs the command in this process; its standard output."""
    result = CliRunner().invoke(command, ["--model", str(TRAINED), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0
    return result.stdout


def cells(output: str, label: str) -> list[str]:
    """The columns of a row of the printed table."""
    line = next(line for line in output.splitlines() if line.strip("│ ").startswith(label))
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


@pytest.mark.parametrize("preset", ["reference", "quest", "hybrid-pillar", "dense"])
def test_the_strict_proof(preset: str) -> None:
    output = invoke(
        *("--prompt", PROMPT, "--preset", preset, "--dtype", "float64", "--min-budget", "4"),
        *("--max-new-tokens", "20", "--compare-dense"),
    )
    assert output.startswith("path.")
    assert output.rstrip().endswith("identical: yes")
    passes = [int(cell) for cell in cells(output, "full-cache passes")]
    assert passes[-1] == 20
    assert preset == "dense" or passes[0] < 15


def test_every_preset_prints_the_same_text_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.py").write_text(PROMPT)
    options = ("--prompt-file", str(tmp_path / "prompt.py"), "--kernels", "reference", "--max-new-tokens", "12")
    texts = {invoke(*options, "--preset", name).partition("\n\n")[0] for name in ("vegas", "streaming", "dense")}
    assert len(texts) == 1
    (text,) = texts
    assert len(text) == 12


def test_generated_kernels_give_the_dense_text() -> None:
    output = invoke("--prompt", PROMPT * 6, "--max-new-tokens", "40", "--min-budget", "16", "--compare-dense")
    assert "identical: yes" in output
    assert cells(output, "new tokens") == ["40", "40"]
    assert int(cells(output, "full-cache passes")[0]) < 25


def test_no_prompt_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = finish(monkeypatch, capsys, "--model", str(TRAINED))
    assert (code, err) == (2, "error: prompt: give at least one, with --prompt-file or --prompt\n")


def test_a_batch_prints_each_text_and_streams_them_as_they_end() -> None:
    options = ("--kernels", "reference", "--max-new-tokens", "9", "--preset", "streaming")
    alone = [invoke("--prompt", prompt, *options).partition("\n\n")[0] for prompt in (PROMPT, PROMPT[:20])]
    batch = invoke("--prompt", PROMPT, "--prompt", PROMPT[:20], *options, "--compare-dense")
    expected = "".join(f"[{index + 1}] {text}\n" for index, text in enumerate(alone))
    assert batch.startswith(expected)
    assert batch.splitlines()[-2:] == ["prompt 1: identical: yes", "prompt 2: identical: yes"]
    streamed = invoke("--prompt", PROMPT, "--prompt", PROMPT[:20], *options, "--stream")
    assert all(f"[{index + 1}] {text}\n" in streamed for index, text in enumerate(alone))
    assert invoke("--prompt", PROMPT, *options, "--stream").partition("\n\n")[0] == alone[0]


def test_samples_come_from_their_seed() -> None:
    options = ("--prompt", PROMPT, "--kernels", "reference", "--max-new-tokens", "12", "--temperature", "1.2")
    texts = [invoke(*options, "--seed", seed).partition("\n\n")[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    compared = invoke(*options, "--seed", "1", "--compare-dense")
    assert compared.rstrip().endswith("identical: not to be expected of samples, which have the same distribution")
    assert compared.startswith(texts[0])


def test_stats_show_every_request_while_it_runs() -> None:
    spec = DecodeSpec(preset=PRESETS["streaming"], draft_len=3, max_new_tokens=12, page_size=4)
    model = wavy_llama()
    session = open_session(model, ReferenceKernels(model.heads), spec, max_requests=2, num_pages=20)
    for length in (20, 30, 9):
        session.add_request(range(length))
    for _ in range(2):
        session.step()
    console = Console(file=io.StringIO(), width=120)
    console.print(live_table(session, 2.0))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    first, second = session.result(0), session.result(1)
    assert "round 2, " in shown
    assert cells(shown, "1 ") == [
        *(str(len(first.tokens)), f"{len(first.tokens) / 2:.1f}"),
        *(f"{first.accepted[0]:.2f}", f"{first.drafted[0]:.2f}"),
    ]
    assert cells(shown, "2 running, 1 waiting")[0] == str(len(first.tokens) + len(second.tokens))


@settings(deadline=None)
@given(st.text(max_size=12), st.lists(st.integers(0, 9), max_size=12))
def test_a_streamed_text_is_the_text_and_never_half_a_character(text: str, cuts: list[int]) -> None:
    content, stream, shown = text.encode(), TextStream(ByteCodec()), ""
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]):
        shown += stream.take(list(content[start:end]), ended=False)
        assert text.startswith(shown)
    assert shown + stream.take([], ended=True) == text


def test_page_size_sinks_and_recents_do_not_change_the_text() -> None:
    options = ("--prompt", PROMPT, "--dtype", "float64", "--max-new-tokens", "12", "--min-budget", "0")
    plain = invoke(*options).partition("\n\n")[0]
    assert invoke(*options, "--page-size", "1", "--sink", "2", "--recent", "3").partition("\n\n")[0] == plain


BAD_INPUT = [
    (["--preset", "vegs"], "preset='vegs': unknown; did you mean vegas?"),
    (["--preset", "nsa-verify"], "preset='nsa-verify': planned, not available yet"),
    (["--draft-len", "0"], "draft_len=0: must be at least 1; to decode without drafts use preset dense"),
    (["--budget", "0"], "budget=0.0"),
    (["--budget", "1.5"], "budget=1.5"),
    (["--max-new-tokens", "4090"], "exceed the model's 4096 positions"),
    (["--dtype", "int8"], "'int8' is not one of"),
    (["--threads", "0"], "0 is not in the range"),
    (["--page-size", "0"], "page_size=0"),
    (["--kernels", "generated", "--dtype", "float64"], "only the reference kernels compute in it"),
    (["--prompt-file", "absent.txt"], "absent.txt: no such file"),
    (["--temperature", "-1"], "temperature=-1.0: must be 0, for the most likely token, or above"),
    (["--top-k", "0"], "top_k=0: must be at least 1 token"),
    (["--top-p", "1.5"], "top_p=1.5"),
    (["--refresh-interval", "0"], "refresh_interval=0"),
    (["--refresh-interval", "2", "--preset", "quest"], "preset quest chooses its keys anew at every draft step"),
    (["--recent-share", "2"], "recent_share=2.0: must be at least 0 and at most 1"),
    (["--stream", "--stats"], "both write to the terminal while decoding; choose one"),
    (["--model", "absent"], "absent: no such folder"),
    (["--prompt", ""], "--prompt: empty"),
]


def finish(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Runs the program to its end: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["specattn-generate", *arguments])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else -1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", str(TRAINED)]
    prompt = [] if "--prompt" in arguments else ["--prompt", PROMPT]
    code, out, err = finish(monkeypatch, capsys, *model, *prompt, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (b"", "empty")])
def test_prompt_files_that_hold_no_prompt(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    code, _, err = finish(monkeypatch, capsys, "--model", str(TRAINED), "--prompt-file", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}: {message}" in err


def test_a_truncated_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = finish(monkeypatch, capsys, "--model", str(tmp_path), "--prompt", PROMPT)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "corrupt or truncated" in err


def generation_of(tokens: str, margin: float) -> Generation:
    request = RequestResult(
        tokens=tuple(tokens.encode()), margins=(margin,) * len(tokens), accepted=(len(tokens) - 2,), drafted=(4,)
    )
    return Generation(
        requests=(request,), full_passes=2, selected_share=0.5, prefill_seconds=1.0, decode_seconds=1.0, phases={}
    )


@pytest.mark.parametrize(
    ("dense", "margin", "dtype", "code", "line"),
    [
        ("same", 0.5, "float32", 0, "identical: yes"),
        ("sane", 0.5, "float32", 1, "identical: no (token 3, top-2 margin 0.5)"),
        ("sane", 0.0004, "float32", 1, "identical: no (token 3, top-2 margin 0.0004: a tie of rounding)"),
        ("sane", 0.0004, "bfloat16", 1, "identical: no (token 3, top-2 margin 0.0004)"),
    ],
)
def test_a_difference_from_dense_decoding_is_told_and_exits_with_1(
    dense: str,
    margin: float,
    dtype: str,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fake_generate(*arguments: object, **_: object) -> Generation:
        spec = arguments[-1]
        assert isinstance(spec, DecodeSpec)
        return generation_of("same" if spec.preset.drafts else dense, margin)

    monkeypatch.setattr("specattn_runtime.cli.generate.generate", fake_generate)
    arguments = ("--model", str(TRAINED), "--prompt", PROMPT, "--kernels", "reference", "--compare-dense")
    ended, out, _ = finish(
        monkeypatch, capsys, *arguments, "--max-new-tokens", "4", "--draft-len", "1", "--dtype", dtype
    )
    assert ended == code
    assert out.rstrip().splitlines()[-1] == line


def test_bfloat16_from_end_to_end() -> None:
    output = invoke("--prompt", PROMPT * 4, "--dtype", "bfloat16", "--max-new-tokens", "40", "--min-budget", "16")
    float32 = invoke("--prompt", PROMPT * 4, "--max-new-tokens", "40", "--min-budget", "16")
    assert "prompt tokens, bfloat16" in output
    assert int(cells(output, "full-cache passes")[0]) < 25
    assert output[:12] == float32[:12]  # where margins are above what bfloat16 moves a logit by


def test_ctrl_c_is_one_word_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> Generation:
        raise KeyboardInterrupt

    monkeypatch.setattr("specattn_runtime.cli.generate.generate", interrupted)
    arguments = ("--model", str(TRAINED), "--prompt", PROMPT, "--kernels", "reference", "--max-new-tokens", "3")
    code, out, err = finish(monkeypatch, capsys, *arguments)
    assert (code, out) == (130, "")
    assert err.split() == ["interrupted"]


def test_help_teaches_by_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = finish(monkeypatch, capsys, "--help")
    assert code == 0
    assert "--preset vegas --compare-dense" in out
    assert all(name in out for name in PRESETS)
