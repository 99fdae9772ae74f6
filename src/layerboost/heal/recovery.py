"""Recovery, measured: a curve over the validation split, the best look kept, alarms, and when to stop.

The held-out split is never looked at: it is for the evaluation of what comes out.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from layerboost.artifacts import CurvePoint
from layerboost.data.probes import PROBES
from layerboost.data.samples import TEXT
from layerboost.data.sequences import Sequences
from layerboost.errors import TrainingError
from layerboost.progress import say
from layerboost.scoring import (
    batch_rows,
    final_hidden,
    log_probabilities,
    scored_hidden,
    scored_targets,
    token_scores,
)

if TYPE_CHECKING:
    from layerboost.heal.student import Healer

_WORSE = 1.1  # times the best: more than what looks differ by anyway
_FLAT = 0.99


def looks(steps: int) -> set[int]:
    """Steps after which to look: often at first, where most is won, then at every eighth of the way."""
    return {round(steps * share) for share in (0, 1 / 64, 1 / 32, 1 / 16, *(i / 8 for i in range(1, 9)))}


@dataclass
class Recovery:
    """The curve so far, and what follows from it.

    Attributes:
        patience: looks in a row without a better one, by a hundredth, after which to stop; 0 is never.
        since: step from which looks are compared: before it, rates rise, or something else is learned.
        losses: training losses since the last look.
    """

    patience: int
    since: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` wrote down."""
        self.curve = [CurvePoint.model_validate(point) for point in state["curve"]]
        self.losses, self.alarms = state["losses"], state["alarms"]

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        curve = [point.model_dump() for point in self.curve]
        return {"curve": curve, "losses": self.losses, "alarms": self.alarms}

    @property
    def best(self) -> CurvePoint:
        return min(self.curve, key=lambda point: point.distance)

    @property
    def flat(self) -> bool:
        """Whether the last `patience` looks brought nothing."""
        counted = [point for point in self.curve if point.step >= self.since]
        before, last = counted[: -self.patience or None], counted[-self.patience :]
        if not self.patience or not before:
            return False
        return min(p.distance for p in last) > _FLAT * min(p.distance for p in before)

    def add(self, point: CurvePoint) -> bool:
        """Take a look in; whether it is the best so far. Says so when validation gets worse while training gets better:
        the model learns its data by heart."""
        self.losses = []
        last = self.curve[-1] if self.curve else None
        self.curve.append(point)
        if point is self.best:
            return True
        if last is None or last.loss is None or point.loss is None or last.step < self.since:
            return False
        if point.loss < last.loss and point.distance > _WORSE * self.best.distance:
            self.alarms.append(
                f"overfitting: at {point.tokens:,} tokens the validation distance is {point.distance:.3f}, it was "
                f"{self.best.distance:.3f} at {self.best.tokens:,}, while the training loss fell; more or other text, "
                "a lower learning_rate or fewer tokens may do better"
            )
            say(self.alarms[-1])
        return False


class Validation:
    """The validation split, and what the teacher makes of it, which is computed once.

    Args:
        data: sequences of text under `text`, and of every probe under its name.
    """

    def __init__(self, healer: "Healer", data: dict[str, Sequences]) -> None:
        self.healer = healer
        config = healer.model.config
        self.batches = [
            (kind, batch)
            for kind, found in data.items()
            for batch in found.batches(batch_rows(found.tokens.shape[1], config.vocab_size, config.hidden_size, 1))
        ]
        with healer.teacher():
            self.teacher = [self._scored(batch).cpu() for _, batch in self.batches]
            base = self._means(self.teacher)
        self.base_nll, self.base_recall = base[f"{TEXT}.nll"], _over_probes(base, "hit")

    @torch.no_grad()
    def look(self, step: int, tokens: int, loss: float | None) -> CurvePoint:
        """Raises TrainingError if the student computes values that are not finite."""
        with self.healer.student():
            found = self._means([self._scored(batch) for _, batch in self.batches])
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(f"validation loss is not finite at step {step}; nothing was published")
        return CurvePoint(
            step=step, tokens=tokens, loss=loss, kl=found[f"{TEXT}.kl"], nll=found[f"{TEXT}.nll"],
            recall=_over_probes(found, "hit"), recall_kl=_over_probes(found, "kl"),
        )  # fmt: skip

    def _scored(self, batch: Sequences) -> Tensor:
        """`[K, E]` final hidden states of whatever is in place."""
        return scored_hidden(final_hidden(self.healer.model, batch.tokens), batch.scored.to(self.healer.model.device))

    def _means(self, hidden: list[Tensor]) -> dict[str, float]:
        """Metrics such as `text.kl`, mean over sequences."""
        parts: dict[str, list[np.ndarray]] = {}
        device, head = self.healer.model.device, self.healer.head
        for (kind, batch), own, teacher in zip(self.batches, hidden, self.teacher, strict=True):
            expected = log_probabilities(teacher.to(device), head)
            scores = token_scores(own.to(device), head, expected, scored_targets(batch).to(device))
            for metric, values in scores.per_sequence(batch.scored).items():
                parts.setdefault(f"{kind}.{metric}", []).append(values)
        return {name: float(np.concatenate(values).mean()) for name, values in parts.items()}


def _over_probes(found: dict[str, float], metric: str) -> float:
    return sum(found[f"{probe}.{metric}"] for probe in PROBES) / len(PROBES)
