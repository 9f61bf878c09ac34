"""Claims: which worker is at which piece of work, or on which device, told by a storage that all of them share.

A claim is a running trial of a study of its own, so it stands in every storage that studies stand in. It binds nobody
whose process is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from specattn_codegen.errors import SpecError
from specattn_codegen.tuning.shared_study import WORKER, is_lost

WHAT = "what"  # name of a claim's attribute: what is claimed
SEARCHES, DEVICES = "specattn: who searches what", "specattn: who has which device"
VISIBLE = "CUDA_VISIBLE_DEVICES"  # AMD's runtime reads it as well


@dataclass(slots=True)
class Claims:
    """The claims of one worker: one at a time. study: SEARCHES or DEVICES."""

    storage: BaseStorage
    study: str
    worker: str
    _study: optuna.Study = field(init=False)
    _held: FrozenTrial | None = None

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(storage=self.storage, study_name=self.study, load_if_exists=True)

    def take(self, wanted: Sequence[str]) -> str:
        """One of `wanted`, which nobody else will take while it is held: the first that nobody has and nobody has done
        yet. Where there is none, what fewest others are at, and what is done only after that."""
        while True:
            taken = self._counts(TrialState.RUNNING)
            done = self._counts(TrialState.COMPLETE)
            chosen = min(wanted, key=lambda what: (done[what] > 0, taken[what]))
            if taken[chosen] or self._claim(chosen):
                return chosen

    def take_free(self, wanted: Sequence[str]) -> str | None:
        """The first of `wanted` that nobody has, held from now on; None where all are taken."""
        while True:
            taken = self._counts(TrialState.RUNNING)
            free = next((what for what in wanted if not taken[what]), None)
            if free is None or self._claim(free):
                return free

    def release(self, *, done: bool) -> None:
        """Gives back what is held, if anything is. done: nobody needs to take it any more."""
        held, self._held = self._held, None
        if held is not None:
            state = TrialState.COMPLETE if done else TrialState.FAIL
            self._study.tell(held.number, 0.0 if done else None, state=state, skip_if_finished=True)

    def done(self, what: str) -> bool:
        """Whether somebody has released it as done."""
        return self._counts(TrialState.COMPLETE)[what] > 0

    def _claim(self, what: str) -> bool:
        """False where another was quicker: of those who claim at once the lowest number has it."""
        wish = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: self.worker, WHAT: what})
        study_id = self.storage.get_study_id_from_name(self.study)
        self._held = self.storage.get_trial(self.storage.create_new_trial(study_id, wish))
        number = self._held.number
        if any(claim.number < number and claim.user_attrs[WHAT] == what for claim in self._claims(TrialState.RUNNING)):
            self.release(done=False)
            return False
        return True

    def _claims(self, state: TrialState) -> list[FrozenTrial]:
        found = self._study.get_trials(deepcopy=False, states=(state,))
        own = None if self._held is None else self._held.number
        return [
            claim for claim in found if claim.number != own and not (state == TrialState.RUNNING and is_lost(claim))
        ]

    def _counts(self, state: TrialState) -> Counter[str]:
        return Counter(str(claim.user_attrs[WHAT]) for claim in self._claims(state))


def visible_devices(variable: str | None, count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of the `count` GPUs that this process would see."""
    if variable is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in variable.split(",")][:count]


@contextlib.contextmanager
def own_device(storage: BaseStorage, worker: str, count: int) -> Iterator[str]:
    """Has this process, and all it starts from then on, see one GPU alone: the first of the `count` it would see that
    no other worker of this machine is on. To be entered before anything asks CUDA, which looks only once. Raises
    SpecError where every GPU has its worker."""
    host, claims = socket.gethostname(), Claims(storage, DEVICES, worker)
    names = {f"{host} GPU {name}": name for name in visible_devices(os.environ.get(VISIBLE), count)}
    taken = claims.take_free(list(names))
    if taken is None:
        raise SpecError(
            f"--storage: a worker is on each of the {count} GPUs that this process sees already, and two on one would "
            f"time each other; wait for one to end, or name another GPU in {VISIBLE}"
        )
    os.environ[VISIBLE] = names[taken]
    try:
        yield names[taken]
    finally:
        claims.release(done=False)
