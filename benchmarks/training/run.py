"""The loop of training: steps until the time is over, kept often enough that a killed run goes on where it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.training import evaluation, model, schedule
from benchmarks.training.batches import Batch, batch
from benchmarks.training.schedule import STAGES, Stage
from specattn_bench.corpus import Corpus
from specattn_runtime.model.llama_config import LlamaConfig, parse_config

STATE, LOG = "state.pt", "training.jsonl"
LARGEST_GRADIENT = 1.0
EVALUATED = 512  # bytes of an ordinary text; answers lie in texts eight times as long


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """fields: of config.json; weights: to start with; rate: the highest; seconds: of the whole run, what earlier parts
    of it took included; keep_seconds: between two states on disk; clock: seconds from anywhere."""

    folder: Path
    fields: dict[str, object]
    weights: model.Weights
    rate: float
    seconds: float
    keep_seconds: float
    seed: int
    clock: Callable[[], float]
    stages: tuple[Stage, ...] = STAGES
    evaluated: int = EVALUATED


@dataclass(slots=True)
class Run:
    """elapsed: seconds that earlier parts of the run took; started: what the clock said when this one began."""

    asked: Asked
    weights: model.Weights
    optimisers: list[torch.optim.Optimizer]
    started: float
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    log: list[dict[str, object]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.elapsed + self.asked.clock() - self.started


def train(asked: Asked, learnt: Corpus, held_out: Corpus) -> Run:
    """Trains until the time is over, from the folder's state where it has one. Writes state, log and checkpoint."""
    run, config = _resumed(asked), parse_config(asked.fields)
    sets = {
        "plain_bits": evaluation.plain(held_out, seed=asked.seed, passages=8, length=asked.evaluated),
        "answer_bits": evaluation.answers(held_out, seed=asked.seed, passages=3, length=8 * asked.evaluated),
    }
    kept, recent = run.seconds, list[float]()
    while (seconds := run.seconds) < asked.seconds:
        stage = schedule.stage_at(seconds / asked.seconds, asked.stages)
        read = batch(
            learnt,
            seed=asked.seed,
            step=run.step,
            sequences=stage.sequences,
            length=stage.length,
            max_positions=config.max_positions,
        )
        recent.append(step(run, config, read, schedule.learning_rate(seconds / asked.seconds, asked.rate)))
        run.step, run.tokens = run.step + 1, run.tokens + read.inputs.numel()
        if run.seconds - kept >= asked.keep_seconds or run.seconds >= asked.seconds:
            kept = run.seconds
            bits = {"train_bits": sum(recent) / len(recent)}
            bits |= {name: evaluation.bits(config, run.weights, some) for name, some in sets.items()}
            head: dict[str, object] = {
                "step": run.step,
                "seconds": round(kept, 1),
                "bytes": run.tokens,
                "length": stage.length,
            }
            run.log.append(head | {name: round(found, 4) for name, found in bits.items()})
            recent.clear()
            _keep(run)
    return run


def step(run: Run, config: LlamaConfig, read: Batch, rate: float) -> float:
    """One step down. Bits a byte before it."""
    found = model.logits(config, run.weights, read.inputs, read.positions)
    loss = functional.cross_entropy(found.flatten(0, 1), read.targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.weights.values(), LARGEST_GRADIENT)
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    return loss.item() / math.log(2)


def optimisers_of(weights: model.Weights) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms; rates of one scale."""
    matrices = [weight for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in weights.items() if weight.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _resumed(asked: Asked) -> Run:
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in asked.weights.items()}
    run = Run(asked=asked, weights=weights, optimisers=optimisers_of(weights), started=asked.clock())
    state = asked.folder / STATE
    if state.is_file():
        found = torch.load(state, weights_only=True)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found["weights"][name])
        for optimiser, one in zip(run.optimisers, found["optimisers"], strict=True):
            optimiser.load_state_dict(one)
        run.step, run.tokens, run.elapsed, run.log = (found[name] for name in ("step", "tokens", "elapsed", "log"))
    return run


def _keep(run: Run) -> None:
    """Log, checkpoint and state; the state last and in one move, so that a kill leaves the one before."""
    folder = run.asked.folder
    model.save(folder, run.asked.fields, run.weights)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in run.log))
    state = {
        "weights": run.weights,
        "optimisers": [optimiser.state_dict() for optimiser in run.optimisers],
        "step": run.step,
        "tokens": run.tokens,
        "elapsed": run.seconds,
        "log": run.log,
    }
    torch.save(state, folder / f"{STATE}.new")
    os.replace(folder / f"{STATE}.new", folder / STATE)
