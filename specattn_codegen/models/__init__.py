"""Finds a model's attention heads: a registered name, a Hugging Face config.json, a checkpoint folder, or numbers."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from specattn_codegen.errors import SpecError
from specattn_codegen.models import model_refusals
from specattn_codegen.models.model_config import read_config
from specattn_codegen.models.model_heads import HeadFields, ModelHeads
from specattn_codegen.models.model_registry import ROWS

# Parts of a repository's name that say how a model was trained, not what its heads are.
_TRAINING = {"base", "chat", "hf", "instruct", "it", "meta"}


def canonical(name: str) -> str:
    """One spelling for `llama3-8b`, `Llama-3-8B`, `llama_3_8b` and `meta-llama/Meta-Llama-3-8B-Instruct`."""
    last = name.strip().rstrip("/").rsplit("/", 1)[-1].lower()
    parts = [part for part in re.split(r"[-_ ]+", last) if part and part not in _TRAINING]
    # A dash between a letter and a digit is a matter of taste: qwen-2.5 and qwen2.5.
    return re.sub(r"(?<=[a-z])-(?=\d)", "", "-".join(parts))


_BY_CANONICAL = {canonical(row.name): row for row in ROWS}
_REFUSED = {canonical(name): (name, reason) for name, reason in model_refusals.NAMES.items()}


def names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(row.name for row in ROWS))


def resolve(model: str) -> ModelHeads:
    """The heads of `model`: a config.json, a folder that holds one, or a registered name in any usual spelling.

    What is on disk wins over the registry. Raises SpecError with the nearest names where nothing fits, and with the
    reason where the model is known but cannot be served.
    """
    if not model.strip():
        raise SpecError(f"model={model!r}: give a name such as llama3-8b, a config.json, or a checkpoint folder")
    key, path = canonical(model), Path(model).expanduser()
    if path.is_file():
        return read_config(path)
    if path.is_dir() and ((path / "config.json").exists() or key not in _BY_CANONICAL):
        return read_config(path / "config.json")
    if key in _BY_CANONICAL:
        return _BY_CANONICAL[key]
    if key in _REFUSED:
        name, reason = _REFUSED[key]
        raise SpecError(f"model={model!r}: {name} cannot be served: {reason}")
    if model.endswith(".json") or model.startswith((".", "/", "~")):
        raise SpecError(f"{model}: no such file or folder; give a config.json, or a checkpoint folder that holds one")
    raise SpecError(
        f"model={model!r}: unknown; {_nearest(key)} "
        "Any other is read from --model path/to/config.json or --heads 32,8,128"
    )


def _nearest(key: str) -> str:
    near = [_BY_CANONICAL[match].name for match in difflib.get_close_matches(key, _BY_CANONICAL, n=3, cutoff=0.5)]
    return f"did you mean {', '.join(near)}?" if near else f"`specattn-tune --list-models` shows all {len(names())}."


def parse_heads(text: str) -> HeadFields:
    """`32,8,128` -> 32 query heads, 8 KV heads, head dim 128; a fourth number is the dim of the values.

    Raises SpecError where that is not what the text says. What the numbers mean together is for HeadConfig to judge.
    """
    parts = text.split(",")
    if len(parts) not in (3, 4):
        raise SpecError(f"heads={text!r}: give query heads, KV heads and head dim, as in 32,8,128")
    if not all(re.fullmatch(r"\s*\d{1,5}\s*", part, flags=re.ASCII) and int(part) for part in parts):
        raise SpecError(f"heads={text!r}: every part must be a whole number of at least 1, as in 32,8,128")
    num_q_heads, num_kv_heads, head_dim = map(int, parts[:3])
    fields: HeadFields = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if len(parts) == 4:
        fields["v_head_dim"] = int(parts[3])
    return fields
