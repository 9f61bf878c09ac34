"""From prompt bytes to token ids and back: the checkpoint's tokenizer.json, or plain bytes where it has none."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from specattn_codegen.errors import CheckpointError, SpecError
from specattn_runtime.model.llama_config import LlamaConfig

BYTES = 256


class TokenCodec(Protocol):
    """`stop_tokens` end a text."""

    @property
    def stop_tokens(self) -> frozenset[int]: ...

    def encode(self, prompt: bytes) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteCodec:
    """A token is a byte. No first token is added and none ends a text."""

    stop_tokens: frozenset[int] = frozenset()

    def encode(self, prompt: bytes) -> list[int]:
        return list(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class _Encoding(Protocol):
    ids: list[int]


class _Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`, a package only checkpoints with a tokenizer need."""

    def encode(self, sequence: str) -> _Encoding: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class FileCodec:
    """A tokenizer.json; special tokens are added and left out as the file says."""

    def __init__(self, tokenizer: _Tokenizer, stop_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_tokens = stop_tokens

    def encode(self, prompt: bytes) -> list[int]:
        try:
            text = prompt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"prompt: not UTF-8 text ({error}); save it as UTF-8") from error
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


def codec_of(folder: Path, config: LlamaConfig) -> TokenCodec:
    """The codec of a checkpoint folder. Raises CheckpointError where it can neither be read nor be bytes."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return FileCodec(_read_tokenizer(path), config.stop_tokens)
    if config.vocab_size != BYTES:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and vocab_size={config.vocab_size} is not that of bytes; add the file"
        )
    return ByteCodec()


def _read_tokenizer(path: Path) -> _Tokenizer:
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the tokenizers package; pip install tokenizers") from error
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    return tokenizers.Tokenizer.from_str(text)
