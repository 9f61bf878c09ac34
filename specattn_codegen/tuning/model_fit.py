"""Fits: what measurements on one processor made of the cost model's terms, as a file. Fits nothing itself.

A fit is taken from the path a user names, which must hold one, or else from the user's own folder, where one that is
damaged, of another processor or of an earlier cost model is as none, with one warning.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specattn_codegen import cost_model, paths
from specattn_codegen.cost_model.calibration import FACTORS, Agreement
from specattn_codegen.digest import digest, to_plain
from specattn_codegen.environment import Silicon, silicon
from specattn_codegen.errors import PackError
from specattn_codegen.packs import pack_file
from specattn_codegen.packs.pack_file import Plain
from specattn_codegen.processors.arch import Arch
from specattn_codegen.processors.silicon import same

SCHEMA_VERSION = 1
REMEDY = "fit it again with specattn-tune --calibrate RECORDS"

logger = logging.getLogger("specattn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFit:
    """factors: by limit, what its terms take times what the model says; model: digest of the model they are for;
    as_it_is, fitted: how well the model agrees with the measurements without them and with them."""

    arch: Silicon
    model: str
    factors: dict[str, float]
    as_it_is: Agreement
    fitted: Agreement

    def __post_init__(self) -> None:
        least, most = FACTORS
        for limit, factor in self.factors.items():
            if not least <= factor <= most:
                raise PackError(f"factors.{limit}={factor!r}: must be from {least:g} to {most:g}")


@functools.cache
def model_digest() -> str:
    """Of the cost model's sources: a fit to one model says nothing about another."""
    folder = Path(cost_model.__file__).parent
    return digest([(file.name, file.read_text()) for file in sorted(folder.glob("*.py"))])


def user_path(arch: Arch) -> Path:
    return paths.user_fits_dir() / f"{arch.name}.json"


def write(path: Path, fit: ModelFit) -> None:
    """All or nothing; the folder is made where there is none. Raises OSError."""
    fields = {field.name: to_plain(getattr(fit, field.name)) for field in dataclasses.fields(fit)}
    pack_file.write_whole(path, pack_file.to_text({"schema_version": SCHEMA_VERSION, **fields}))


def load(path: Path, arch: Arch) -> ModelFit:
    """Raises PackError, in one line that says what to do, for anything but a fit of today's model to this processor;
    OSError where the file cannot be read."""
    raw = pack_file.read_checked(path, "fit of the cost model", _checked)
    try:
        fit = msgspec.convert(raw, ModelFit, strict=True)
    except (ValueError, PackError) as error:
        raise PackError(f"{path}: {pack_file.one_line(error)}; {REMEDY}") from error
    if not same(fit.arch, silicon(arch)):
        raise PackError(f"{path}: fitted to {fit.arch.name}, another processor than this {arch.name}; {REMEDY}")
    if fit.model != model_digest():
        raise PackError(f"{path}: fitted to another version of the cost model; {REMEDY}")
    return fit


def _checked(raw: Plain) -> Plain:
    if raw.get("schema_version") != SCHEMA_VERSION:
        version = str(raw.get("schema_version"))[:20]
        raise PackError(f"schema_version {version} where this version reads {SCHEMA_VERSION}; {REMEDY}")
    pack_file.require_own_digest(raw, REMEDY)
    return raw


def fitted(arch: Arch, explicit: Path | None = None) -> Arch:
    """The processor with its fit, if there is one: `explicit` and nothing else where that is given.

    Raises PackError for an explicit one that cannot be used, FileNotFoundError for one that is not there.
    """
    if explicit is not None:
        return _with(arch, load(explicit, arch))
    try:
        return _with(arch, load(user_path(arch), arch))
    except FileNotFoundError:
        return arch
    except (PackError, OSError) as error:
        _warn_once(pack_file.one_line(error))
        return arch


def _with(arch: Arch, fit: ModelFit) -> Arch:
    return dataclasses.replace(arch, fit=tuple(sorted(fit.factors.items())))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s; the cost model is used as it is", message)
