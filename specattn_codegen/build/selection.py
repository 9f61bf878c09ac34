"""What the `launch` of a rendered select_kv takes of a call, in every language of GPUs."""

from __future__ import annotations

import dataclasses

from specattn_codegen.kernel import Call, SelectCall
from specattn_codegen.policy import policy_numbers


def selection_call(call: Call) -> SelectCall:
    if not isinstance(call, SelectCall):
        raise TypeError("select_kv takes a SelectCall")
    return call


def workspace_arguments(call: SelectCall) -> dict[str, int]:
    """The sizes that a workspace depends on, but for those of the device."""
    layers, batch, score_rows, columns = call.shape
    rows = layers * batch * score_rows
    return {"rows": rows, "columns": columns, "row_width": call.row_width, "united": call.union}


def launch_arguments(call: SelectCall) -> dict[str, object]:
    """Everything but the workspace and what only the device knows; scores and thresholds with a layer axis."""
    layered = call.scores.dim() == 4
    scores, thresholds = call.scores, call.thresholds
    return {
        "scores": scores if layered else scores[None],
        "prefix_lens": call.prefix_lens,
        "thresholds": thresholds if layered or thresholds is None else thresholds[None],
        "histogram": call.histogram,
        "page_table": call.page_table,
        "indices": call.indices,
        "counts": call.counts,
        "slots": call.slots,
        "block": call.block,
        "sink": call.sink,
        "recent": call.recent,
        "slots_per_page": call.slots_per_page,
        "row_width": call.row_width,
        "united": call.union,
        **dataclasses.asdict(policy_numbers(call.policy)),
    }
