"""Every exception this project raises on purpose. Anything else that escapes is a bug of ours."""

import errno
import os

# A full disk, a folder that is read-only or somebody else's: no bug, and nothing about a kernel.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class SpecAttnError(Exception):
    """Root of the project's exceptions; the command line prints one as a single line and exits with code 2."""


class SpecError(SpecAttnError, ValueError):
    """A caller's mistake. The message names the value, the rule it breaks and how to fix it."""


class BuildError(SpecAttnError):
    """A rendered source that no compiler could turn into a kernel, or no compiler at all."""


class CacheError(BuildError):
    """The disk took no more of a kernel that may well be right, so that nothing is learnt about it."""


class UnsavedError(SpecAttnError):
    """What was found and no disk took; the message names all of it."""


class SharingError(SpecAttnError):
    """The storage that tuners share failed: full, gone or out of reach."""


class PackError(SpecAttnError):
    """A pack, or a fit of the cost model, that cannot be believed: wrong schema, wrong types, wrong digest."""


class CheckpointError(SpecAttnError):
    """A model folder that cannot be read: missing or corrupt files, missing tensors."""


def is_of_the_disk(error: Exception) -> bool:
    """Whether a disk refused to be written, as the system says it or a compiler passes it on."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    return isinstance(error, CacheError) or os.strerror(errno.ENOSPC) in str(error)
