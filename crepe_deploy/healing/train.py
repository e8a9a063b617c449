"""The loop: a batch, the dense model's logits, the divergence from them, a step; now and then the held-out windows."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.progress import Progress, Say, going_on
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.writing import Planned

from .batches import Corpus
from .checkpoints import keep_only, load, planned, save
from .config import HealConfig
from .loss import divergence
from .optimizer import Masters
from .student import Student
from .teacher import Teacher
from .zeros import HeldZeros, hold_zeros

LOOKS, LEAST_STEPS = 10, 10  # the held-out windows are looked at so often, and no oftener than after so many steps
STATE = "state"


@dataclass(frozen=True)
class State:
    """Where training is. seconds: of training, those before a stop included. loss: mean since the last look.

    start, best: held-out KL before the first step, and the lowest one; best_step 0: nothing has been better.
    """

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    kl: float = math.inf
    start: float = math.inf
    best: float = math.inf
    best_step: int = 0
    stopped: str | None = None

    @property
    def name(self) -> str:
        """Of the folder that holds it."""
        return f"step-{self.step:06d}"

    @property
    def best_name(self) -> str:
        """Of the folder that holds the best weights."""
        return f"best-{self.best_step:06d}"


def valid_state(value: Any) -> bool:
    """Whether this was read from a journal's line about a state."""
    try:
        return asdict(State(**value)) == value and isinstance(value["step"], int)
    except TypeError:
        return False


@dataclass
class Trainer:
    """Everything that training needs. plan: of the tensors that are trained, as they are written.

    dense: told of the held-out windows by their numbers, and of those trained on by numbers behind these.
    """

    accelerator: Any
    student: Student
    dense: Teacher
    corpus: Corpus
    config: HealConfig
    plan: dict[str, Planned]
    work: Path
    journal: Journal | None
    say: Say

    def run(self, step: Progress) -> State:
        """Train to the end of the budget, from the journal's newest state on; the best weights are in `work` then."""
        model = self.accelerator.prepare(self.student.model)
        masters = Masters(self.student.parameters())
        names = [] if self.config.lora is not None else list(self.student.trained.kept)
        with hold_zeros(self.student.model, names) as held:
            state = self._resumed(masters)
            if state is None:
                kl = self.held_out()
                state = State(kl=kl, start=kl, best=kl)
                self._keep(state, masters, held)
            going_on(step, self._done(state)[0])
            began, losses = time.monotonic() - state.seconds, []
            last = state
            while state.stopped is None and (share := self._share(state)) < 1:
                step(*self._done(state))
                losses.append(self._step(model, masters, state.step, share))
                state = replace(state, step=state.step + 1, seconds=self._clock(time.monotonic() - began))
                if not math.isfinite(losses[-1]):
                    return self._stopped(state, f"the loss was {losses[-1]} in step {state.step}")
                if self._is_time(state, last):
                    state = self._look(replace(state, loss=sum(losses) / len(losses)))
                    if state.stopped is None:
                        self._keep(state, masters, held)
                    last, losses = state, []
            step(*self._done(state))
        return state

    @torch.no_grad()
    def held_out(self, model: Any = None, share: tuple[int, int] | None = None) -> float:
        """Mean KL(dense || model) in nats over the held-out windows, of the student unless another is given.

        share: (index, count) of processes that share the windows; as they are unless given.
        """
        index, count = share or (self.accelerator.process_index, self.accelerator.num_processes)
        model = self.student.model if model is None else model
        total = torch.zeros((), dtype=torch.float64)
        for number in range(index, len(self.corpus.held), count):
            window = self.corpus.held[number]
            tokens = window[None].to(self.accelerator.device)
            dense = self.dense.logits(tokens, [number])
            total += divergence(dense, self._logits(model, tokens)).double().sum().cpu()
        if count > 1:
            total = self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu()
        return float(total) / self.corpus.held.numel()

    def _step(self, model: Any, masters: Masters, step: int, share: float) -> float:
        """Mean loss of one step, over all processes."""
        batch = self.corpus.batch(step, self.config.windows)[self.accelerator.process_index :: self._processes]
        size, held = len(batch) // self.config.accumulate, len(self.corpus.held)
        parts = [batch[first : first + size] for first in range(0, len(batch), size)]
        loss = torch.zeros((), device=self.accelerator.device)
        for number, windows in enumerate(parts, start=1):
            sync = number == len(parts)
            tokens = self.corpus.training[windows].to(self.accelerator.device)
            dense = self.dense.logits(tokens, [held + window for window in windows])
            with self.accelerator.no_sync(model) if not sync else torch.enable_grad():
                rows = divergence(dense, self._logits(model, tokens), self.config.top_k)
                del dense
                part = rows.sum() / (len(batch) * self.config.window)
                self.accelerator.backward(part)
            loss += part.detach()
        mean = float(self.accelerator.reduce(loss, "mean"))
        if math.isfinite(mean):
            masters.step(self.config.rate(share))
        return mean

    @staticmethod
    def _logits(model: Any, tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.flatten(0, 1)

    @property
    def _processes(self) -> int:
        return int(self.accelerator.num_processes)

    def _clock(self, seconds: float) -> float:
        """The first process's seconds, so that all end together."""
        if self._processes == 1:
            return seconds
        from accelerate.utils import broadcast_object_list

        return float(broadcast_object_list([seconds])[0])

    def _share(self, state: State) -> float:
        if self.config.minutes is None:
            return state.step / (self.config.budget_steps or 1)
        return state.seconds / (60 * self.config.minutes)

    def _done(self, state: State) -> tuple[int, int]:
        """For a bar: steps, or seconds where minutes are the budget."""
        if self.config.minutes is None:
            return state.step, self.config.budget_steps or 1
        total = max(1, round(60 * self.config.minutes))
        return min(round(state.seconds), total), total

    def _is_time(self, state: State, last: State) -> bool:
        """Whether to look at the held-out windows: each tenth of the budget, if LEAST_STEPS apart, and at its end."""
        if self._share(state) >= 1:
            return True
        if self.config.minutes is None:
            return state.step % max(LEAST_STEPS, math.ceil((self.config.budget_steps or 1) / LOOKS)) == 0
        return state.step - last.step >= LEAST_STEPS and self._share(state) - self._share(last) >= 1 / LOOKS

    def _look(self, state: State) -> State:
        kl = self.held_out()
        if not math.isfinite(kl):
            return self._stopped(state, f"the held-out KL was {kl} behind step {state.step}")
        state = replace(state, kl=kl)
        if kl < state.best:
            state = replace(state, best=kl, best_step=state.step)
        self.say(f"step {state.step}: loss {state.loss:.4f}, held-out KL {kl:.4f} (start {state.start:.4f})")
        return state

    def _stopped(self, state: State, why: str) -> State:
        self.say(f"{why}: stopped; the best so far is step {state.best_step}, held-out KL {state.best:.4f}")
        return replace(state, stopped=why)

    def _keep(self, state: State, masters: Masters, held: HeldZeros) -> None:
        """Write the state, and the weights where they are the best so far; then the line that makes both count."""
        held.prove()
        if self.journal is not None:  # else another process writes
            save(self.work, state.name, masters.state(), planned(masters.state()))
            if state.best_step == state.step:
                save(self.work, state.best_name, self.student.weights(), self.plan)
            self.journal.add(STATE, str(state.step), asdict(state))
            keep_only(self.work, [state.name, state.best_name])
        self.accelerator.wait_for_everyone()

    def _resumed(self, masters: Masters) -> State | None:
        """The newest state of a stopped run, loaded; None where there is none."""
        newest = self.journal.last(STATE, valid_state) if self.journal is not None else None
        if self._processes > 1:
            from accelerate.utils import broadcast_object_list

            newest = broadcast_object_list([newest])[0]
        if newest is None:
            return None
        state = State(**newest[1])
        load(self.work / state.name, masters.state())
        masters.restored(state.step)
        return state
