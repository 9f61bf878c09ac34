"""Ranks that share a model must choose the same kernels: a plan that differs rounds differently, and tokens diverge."""

from __future__ import annotations

import torch.distributed as dist

from specattn_codegen.errors import SpecError
from specattn_runtime.dispatch import Kernels


def require_agreement(kernels: Kernels, group: dist.ProcessGroup | None = None) -> None:
    """Every rank of `group` calls it once its kernels are loaded; a second of setup, nothing later.

    Raises SpecError on every rank alike where their packs, processors or versions would give some call another plan.
    """
    digests = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, kernels.digest, group=group)
    if len(set(digests)) > 1:
        ranks = {digest: [rank for rank, its in enumerate(digests) if its == digest] for digest in digests}
        shown = "; ".join(f"{digest}: ranks {', '.join(map(str, same))}" for digest, same in ranks.items())
        raise SpecError(
            f"ranks would not choose the same kernels ({shown}); give all the same packs, GPUs and version of "
            "specattn-codegen, and compare them with `specattn-pack explain`"
        )
