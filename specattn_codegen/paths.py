"""Where things lie on disk. The only module that reads the project's environment variables.

SPECATTN_CACHE_DIR   built kernels, records of tuning runs, machine measurements
SPECATTN_CONFIG_DIR  a folder of tuned-config packs that is looked up before the user's, the site's and the shipped ones
SPECATTN_FROZEN      1: a process reads each pack once and never sees a later change
SPECATTN_STRICT      1: a call without a tuned entry raises SpecError wherever kernels are loaded
"""

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent


def _data_folder(name: str) -> Path:
    """Inside the package when installed, at the top of the tree in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def templates_dir() -> Path:
    return _data_folder("templates")


def shipped_packs_dir() -> Path:
    return _data_folder("tuned_configs")


def licence_text() -> str:
    """The licence of this project, from a checkout or an installation."""
    installed = PACKAGE / "LICENSE"
    return (installed if installed.is_file() else PACKAGE.parent / "LICENSE").read_text()


def cache_dir() -> Path:
    chosen = os.environ.get("SPECATTN_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("specattn"))


def user_packs_dir() -> Path:
    return Path(platformdirs.user_config_dir("specattn")) / "tuned_configs"


def user_fits_dir() -> Path:
    """Of what measurements made of the cost model, a file for each processor."""
    return Path(platformdirs.user_config_dir("specattn")) / "fits"


def site_packs_dir() -> Path:
    """For all users of a machine, as its administrator fills it."""
    return Path(platformdirs.site_config_dir("specattn")) / "tuned_configs"


def named_layers(*explicit: Path) -> tuple[tuple[str, Path], ...]:
    """Folders of packs by name, the first that has an entry wins."""
    chosen = os.environ.get("SPECATTN_CONFIG_DIR")
    return (
        *(("explicit", folder) for folder in explicit),
        *((("environment", Path(chosen).expanduser()),) if chosen else ()),
        ("user", user_packs_dir()),
        ("site", site_packs_dir()),
        ("shipped", shipped_packs_dir()),
    )


def pack_layers(*explicit: Path) -> tuple[Path, ...]:
    return tuple(folder for _, folder in named_layers(*explicit))


def is_frozen() -> bool:
    return os.environ.get("SPECATTN_FROZEN", "") not in ("", "0")


def is_strict() -> bool:
    return os.environ.get("SPECATTN_STRICT", "") not in ("", "0")
