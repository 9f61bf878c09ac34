"""Text as it comes, from tokens that may end inside a character. Knows a codec, not who reads."""

from __future__ import annotations

from collections.abc import Sequence

from specattn_runtime.model.tokens import TokenCodec

UNFINISHED = "\ufffd"  # what codecs make of bytes that are no character, or not yet


class TextStream:
    """One text. What it gave, put together, is what decoding all tokens at once gives."""

    def __init__(self, codec: TokenCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []
        self._given = ""

    def take(self, tokens: Sequence[int], *, ended: bool) -> str:
        """The text that these tokens add; of a character that is not complete, nothing before the end."""
        self._tokens += tokens
        text = self._codec.decode(self._tokens)
        if not ended:
            text = text.rstrip(UNFINISHED)
        if not text.startswith(self._given):
            return ""  # a tokenizer that goes back on what it said: wait until it comes round, or for the end
        added = text[len(self._given) :]
        self._given = text
        return added
