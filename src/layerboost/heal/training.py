"""The steps of a healing: batch = f(seed, step), so that a run that was killed goes on to the same bytes.

Several processes, started by torchrun or `accelerate launch`, share the sequences of every step and add their gradients
up; each holds all that is trained. The first one writes.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerboost.data.sequences import Sequences
from layerboost.errors import EnvironmentTrouble, TrainingError, out_of_memory
from layerboost.heal.checkpoint import load_step, newest, save_step, steps
from layerboost.heal.recovery import Recovery, Validation, looks
from layerboost.heal.signals import NO_SIGNAL
from layerboost.heal.student import Counts, Healer
from layerboost.passes import gather, ranks
from layerboost.progress import progress, say, tell

if TYPE_CHECKING:
    from layerboost.heal.signals import Signal, Signals

# a state is saved when the last is this old, and when saving took less than a twentieth of the time since
_SAVE_SECONDS, _SAVE_SHARE = 15.0, 20


@dataclass(frozen=True)
class Outcome:
    """How a healing went.

    Attributes:
        trained: weights of the look that is to be published.
        tokens, steps, skipped: done, and left out because they were not finite.
    """

    trained: dict[str, Tensor]
    recovery: Recovery
    steps: int
    tokens: int
    skipped: int


@dataclass
class Rows:
    """Training sequences in the order in which they are used.

    Attributes:
        order: `[N]` numbers of the rows.
        signals: what was kept of the teacher, by the rows' numbers.
    """

    rows: Sequences
    order: Tensor
    signals: "Signals | None" = None

    def step(self, step: int, batch: int) -> Tensor:
        return self.order[step * batch : (step + 1) * batch]

    def batch(self, numbers: Tensor) -> tuple[Sequences, "Signal | None"]:
        """These rows; for none, one that is all padding, and counts for nothing."""
        if len(numbers):
            return self.rows[numbers], None if self.signals is None else self.signals[numbers]
        tokens, nothing = self.rows.tokens[:1], self.rows.scored[:1] & False
        return Sequences(tokens, nothing, torch.full_like(tokens, -1)), None if self.signals is None else NO_SIGNAL


def train(healer: Healer, rows: Rows, validation: Validation, steps_folder: Path, inputs: dict[str, str]) -> Outcome:
    """All steps, or those that are left of an earlier run.

    Raises:
        TrainingError: too many steps whose loss or gradient is not finite.
        EnvironmentTrouble: not even one sequence fits into memory, or the disk is full.
        KeyboardInterrupt: asked to stop; the state is saved.
    """
    return _Run(healer, rows, validation, steps_folder, inputs).all()


class _Run:
    def __init__(
        self, healer: Healer, rows: Rows, validation: Validation, folder: Path, inputs: dict[str, str]
    ) -> None:
        self.healer, self.rows, self.validation, self.folder, self.inputs = healer, rows, validation, folder, inputs
        self.config = config = healer.config
        self.rank, self.world = ranks()
        self.steps = math.ceil(len(rows.order) / config.batch) if healer.changes else 0
        self.transfer = round(self.steps * config.transfer_share) if healer.learning else 0
        self.optimizer = make_optimizer(healer)
        warm = int((self.steps - self.transfer) * config.warmup)
        self.recovery = Recovery(config.patience, self.transfer + warm)
        self.done = self.skipped = 0
        self.best: dict[str, Tensor] = {}
        self.limit: int | None = None  # of sequences per pass, once memory ran out
        found = gather(newest(folder, inputs) if self.rank == 0 else None)[0]
        if found is not None:
            state, self.best = load_step(found, healer.parameters, self.optimizer)
            self.done, self.skipped = state["step"], state["skipped"]
            self.limit = state["limit"] if config.micro_batch is None else None  # which is asked for, and tried
            self.recovery.restore(state["recovery"])
            if self.rank == 0:
                say(f"going on from step {self.done} of {self.steps}")
        elif self.rank == 0 and steps(folder):
            say(
                f"{folder} holds states of a healing with other settings or data, at step {steps(folder)[-1][0]}; this "
                "one begins anew, and they go as soon as it saves its first"
            )

    def all(self) -> Outcome:
        saved, cost = time.monotonic(), 0.0
        look_at = looks(self.steps)
        if not self.recovery.curve:
            self._look()
        with _stop_signals() as asked, progress("heal", self.steps, done=self.done) as advance:
            while self.done < self.steps and not self.recovery.flat:
                loss, stop = self._step(asked)
                self.done += 1
                if self.done in look_at:
                    self._look()
                last = self.recovery.curve[-1]
                advance(note=f"loss {loss:.3f}  KL {last.kl:.3f}  recall {100 * last.recall:.1f} %")
                if stop or time.monotonic() - saved > max(_SAVE_SECONDS, _SAVE_SHARE * cost):
                    started = time.monotonic()
                    self._save()
                    saved, cost = time.monotonic(), time.monotonic() - started
                if stop:
                    raise KeyboardInterrupt
            if any(gather(asked())):  # in the last step, or its look
                self._save()
                raise KeyboardInterrupt
        if self.done < self.steps:
            say(f"stopped after {self._tokens():,} tokens: the last {self.config.patience} looks brought nothing")
        self._tell_best()
        return Outcome(self.best, self.recovery, self.done, self._tokens(), self.skipped)

    def _tell_best(self) -> None:
        best = self.recovery.best
        if best.step == self.done:
            return
        told = f"the best look was at {best.tokens:,} tokens, and its weights are published"
        if best.step == 0:
            told = (
                "healing brought nothing: what is published is as it was converted; give more tokens, or a lower rate"
            )
        self.recovery.alarms.append(told)
        say(told)

    @property
    def micro_batch(self) -> int:
        """Sequences per pass."""
        most = min(self.config.batch, len(self.rows.order))
        return min(self.limit or most, self.config.micro_batch or most, -(-most // self.world))

    def _step(self, asked: Callable[[], bool]) -> tuple[float, bool]:
        """One step of the optimiser; returns its loss, and whether any process was asked to stop."""
        config, aligning = self.config, self.done < self.transfer
        if self.done == self.transfer:  # another loss from here on
            self.recovery.losses = []
        done, steps = (
            (self.done, self.transfer) if aligning else (self.done - self.transfer, self.steps - self.transfer)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(done, steps, config.schedule, config.warmup)
        numbers = self.rows.step(self.done, config.batch)
        loss, stop = self._gradients(numbers, aligning, asked)
        norm = torch.nn.utils.clip_grad_norm_(self.healer.parameters.values(), config.clip)
        if math.isfinite(loss) and torch.isfinite(norm):
            self.optimizer.step()
            self.recovery.losses.append(loss)
        else:
            self._skip()
        return loss, stop

    def _skip(self) -> None:
        self.skipped += 1
        say(f"step {self.done + 1}: loss or gradient is not finite; skipped ({self.skipped} so far)")
        if self.skipped > self.config.max_skipped:
            raise TrainingError(
                f"loss or gradient is not finite at step {self.done + 1} of {self.steps}, and {self.skipped - 1} were "
                f"skipped before, which is all that max_skipped allows; nothing was published; lower learning_rate "
                f"(now {self.optimizer.param_groups[0]['peak']:g}), or look at the data"
            )

    def _gradients(self, numbers: Tensor, aligning: bool, asked: Callable[[], bool]) -> tuple[float, bool]:
        """Gradients of a whole step in place, the same in every process, however it is cut into micro-batches."""
        counts = Counts.of(self.rows.rows[numbers])
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                parts = [self._part(part, counts, aligning) for part in self._passes(numbers)]
                break
            except (RuntimeError, MemoryError) as trouble:
                if not out_of_memory(trouble):
                    raise
            self._cut()
        loss = torch.stack(parts).sum().item() if parts else 0.0
        if self.world == 1:
            return loss, asked()
        return _add_up(self.healer.parameters, loss, asked())

    def _passes(self, numbers: Tensor) -> list[Tensor]:
        """Rows of each pass that this process makes of a step."""
        own = [part for part in numbers[self.rank :: self.world].split(self.micro_batch) if len(part)]
        if self.config.shard:  # a pass gathers weights from all processes, so each has to make as many
            most = math.ceil(math.ceil(len(numbers) / self.world) / self.micro_batch)
            own += [numbers[:0]] * (most - len(own))
        return own

    def _part(self, numbers: Tensor, counts: Counts, aligning: bool) -> Tensor:
        batch, kept = self.rows.batch(numbers)
        return self.healer.transfer(batch, counts) if aligning else self.healer.backward(batch, counts, kept)

    def _cut(self) -> None:
        if self.config.shard:
            raise EnvironmentTrouble(
                f"out of memory with {self.micro_batch} sequences at a time, and processes that share weights cannot "
                "try again one by one; set a smaller micro_batch, or gradient_checkpointing=true, and go on"
            )
        if self.micro_batch == 1:
            raise EnvironmentTrouble(
                f"out of memory with one sequence of {self.rows.rows.tokens.shape[1]} tokens; go on with "
                "gradient_checkpointing=true, or with several devices and shard=true; or take a shorter length"
            )
        self.limit = -(-self.micro_batch // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tell(
            f"out of memory: {self.micro_batch} sequences at a time from now on, {self.config.batch} per step as before"
        )

    def _tokens(self) -> int:
        return min(self.done * self.config.batch, len(self.rows.order)) * self.rows.rows.tokens.shape[1]

    def _look(self) -> None:
        losses = self.recovery.losses
        loss = sum(losses) / len(losses) if losses else None
        look = gather(self.validation.look(self.done, self._tokens(), loss))[0]
        if self.recovery.add(look):
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.healer.parameters.items()}

    def _save(self) -> None:
        if self.rank:
            return
        state = {"skipped": self.skipped, "limit": self.limit, "recovery": self.recovery.state()}
        save_step(self.folder, self.done, self.healer.parameters, self.best, self.optimizer, state, self.inputs)


def make_optimizer(healer: Healer) -> torch.optim.Optimizer:
    """AdamW with a peak rate for adapters and weights, one for mixers, and one for sinks."""
    config = healer.config
    peak = config.learning_rate or default_learning_rate(healer.model.config.hidden_size, config.train)
    sinks = [p for name, p in healer.mixing.items() if name.endswith(".sink")]
    others = [p for name, p in healer.mixing.items() if not name.endswith(".sink")]
    own = [*healer.adapter.values(), *healer.weights.values()]
    rates = ((own, peak), (others, config.mixer_rate), (sinks, config.sink_rate))
    groups: list[dict[str, Any]] = [{"params": params, "peak": rate} for params, rate in rates if params]
    if sinks:  # a sink at -10 has gradients of 1e-9, which Adam's usual epsilon would swallow
        groups[-1]["eps"] = 1e-16
    if not groups:  # a plan that changes nothing
        groups = [{"params": [torch.zeros(())], "peak": peak}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)


def default_learning_rate(hidden_size: int, train: str = "lora") -> float:
    """Small models like high rates; one over the width hits what works at 128 and at 4,096. Whole weights take less."""
    return (0.5 if train == "lora" else 0.125) / hidden_size


def schedule(step: int, steps: int, kind: str = "cosine", warmup: float = 0.05) -> float:
    """Share of the peak rate: a linear warm-up, then a cosine or a line down to 5 %, or constant."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    way = (step - warm) / max(1, steps - warm)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * way)), "linear": 1 - way, "constant": 1.0}
    return 0.05 + 0.95 * falling[kind]


@torch.no_grad()
def _add_up(parameters: dict[str, Tensor], loss: float, asked: bool) -> tuple[float, bool]:
    """Sum gradients, losses, and wishes to stop over all processes, in one message.

    What no process has a gradient for keeps none: to the optimiser that is something else than zero.
    """
    own = list(parameters.values())
    there = [float(p.grad is not None) for p in own]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    told = parts[0].new_tensor([loss, float(asked), *there])
    flat = torch.cat([part.flatten() for part in parts] + [told])
    torch.distributed.all_reduce(flat)
    *summed, told = flat.split([part.numel() for part in parts] + [len(told)])
    loss, asked_by, *found_by = told.tolist()
    for parameter, found, count in zip(own, summed, found_by, strict=True):
        parameter.grad = found.view_as(parameter) if count else None
    return loss, asked_by > 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second one acts at once."""
    asked = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
