"""Which plan serves a call: the ladder's answer, said once where it is not a tuned one. Never tunes."""

from __future__ import annotations

import logging

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder
from specattn_codegen.packs.ladder import Candidate, Found, Ladder
from specattn_codegen.packs.staleness import grade_source
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, Workload

logger = logging.getLogger("specattn")


class Plans:
    """Of one HeadConfig on one processor, from its packs.

    tune_command  what makes the entries that are missing
    strict        a call without one raises SpecError
    """

    def __init__(self, packs: Ladder, tune_command: str, *, strict: bool) -> None:
        self._packs = packs
        self._tune_command = tune_command
        self._strict = strict
        self._warned: set[str] = set()

    def find(self, spec: KernelSpec, workload: Workload) -> Found:
        found = self._packs.tuned(spec, workload)
        if found is not None and found.rung != "sibling":
            return found
        message = (
            f"no tuned entry for {ladder.tuned_as(spec).name} on {self._packs.arch.name} ({self._packs.heads.name}); "
            f"to make one: {self._tune_command}"
        )
        if found is not None and found.candidate is not None:
            self._warn_once("sibling", f"{message}. Using one of a sibling: {found.candidate.path}")
            return found
        if self._strict:
            raise SpecError(message)
        found = self._packs.find(spec, workload)
        taken = "the safe default plan"
        if found.candidate is not None:
            taken = f"the cost model's choice of the plans proved in {found.candidate.path}, untimed at these sizes"
        self._warn_once("untuned", f"{message}. Using {taken}")
        return found

    def warn_if_stale(self, candidate: Candidate, source: Source) -> None:
        if grade_source(candidate.entry, source) == "stale":
            self._warn_once(
                "stale",
                f"{candidate.path} was tuned before today's templates, space or compiler; its plans hold, its "
                f"proofs and times are of earlier kernels; to renew it: {self._tune_command}",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s.", message)


def tune_command(heads: HeadConfig, arch: Arch, dtype: Dtype, kv_dtype: KvDtype | None, page_size: int) -> str:
    """What a user runs to tune these kernels."""
    command = f"specattn-tune {_heads_argument(heads)} --gpu {arch.name} --dtype {dtype} --page-size {page_size}"
    return command + (f" --kv-dtype {kv_dtype}" if kv_dtype else "")


def _heads_argument(heads: HeadConfig) -> str:
    """Softcap, window, scale and sinks have no option of their own: they come with the model's configuration."""
    plain = HeadConfig(
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        v_head_dim=heads.v_head_dim,
    )
    if heads != plain:
        return "--model path/to/config.json"
    value_dim = f",{heads.v_head_dim}" if heads.v_head_dim != heads.head_dim else ""
    return f"--heads {heads.num_q_heads},{heads.num_kv_heads},{heads.head_dim}{value_dim}"
