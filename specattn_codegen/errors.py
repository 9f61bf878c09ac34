"""Every exception this project raises on purpose. Anything else that escapes is a bug of ours."""


class SpecAttnError(Exception):
    """Root of the project's exceptions; the command line prints one as a single line and exits with code 2."""


class SpecError(SpecAttnError, ValueError):
    """A caller's mistake. The message names the value, the rule it breaks and how to fix it."""


class BuildError(SpecAttnError):
    """A rendered source that no compiler could turn into a kernel, or no compiler at all."""


class PackError(SpecAttnError):
    """A tuned-config pack that cannot be believed: wrong schema, wrong types, wrong digest."""


class CheckpointError(SpecAttnError):
    """A model folder that cannot be read: missing or corrupt files, missing tensors."""
