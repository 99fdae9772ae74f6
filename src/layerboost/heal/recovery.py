"""Recovery, measured: a curve over the validation split, the best look kept, alarms, and when to stop.

The held-out split is never looked at: it is for the evaluation of what comes out.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from layerboost.artifacts import CurvePoint, Record
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

_CHANCE = 2.0  # standard errors
_FLAT = 0.99


def looks(steps: int) -> set[int]:
    """Steps after which to look: often at first, where most is won, then at every eighth of the way."""
    return {round(steps * share) for share in (0, 1 / 64, 1 / 32, 1 / 16, *(i / 8 for i in range(1, 9)))}


class Look(Record):
    """A point of the curve, and what it is the mean of.

    Attributes:
        kl: of every validation sequence, under `text` and the name of each probe.
    """

    point: CurvePoint
    kl: dict[str, list[float]]

    def worse_than(self, other: "Look") -> bool:
        """Whether the distance is larger by more than chance: by two standard errors of the difference, sequence by
        sequence. Answers are few and their KL is uneven, so that the least of many looks is often luck."""
        variance = 0.0
        for kind, values in self.kl.items():
            weight = 1.0 if kind == TEXT else 1 / len(PROBES)
            difference = np.subtract(values, other.kl[kind])
            variance += weight**2 * difference.var(ddof=1) / len(difference)
        return self.point.distance - other.point.distance > _CHANCE * math.sqrt(variance)


@dataclass
class Recovery:
    """The curve so far, and what follows from it.

    Attributes:
        patience: looks in a row without a better one, by a hundredth, after which to stop; 0 is never.
        since: step from which looks count for `flat` and the alarm; before, rates rise, or something else is learned.
        nearest: the look of the least distance.
        kept: step of the look whose weights are to be published: the last that is not worse than the nearest.
        losses: training losses since the last look.
    """

    patience: int
    since: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    nearest: Look | None = None
    kept: int = 0
    losses: list[float] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` wrote down."""
        self.curve = [CurvePoint.model_validate(point) for point in state["curve"]]
        self.nearest = None if state["nearest"] is None else Look.model_validate(state["nearest"])
        self.kept, self.losses, self.alarms = state["kept"], state["losses"], state["alarms"]

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        curve = [point.model_dump() for point in self.curve]
        nearest = None if self.nearest is None else self.nearest.model_dump()
        return {
            "curve": curve, "nearest": nearest, "kept": self.kept, "losses": self.losses, "alarms": self.alarms
        }  # fmt: skip

    @property
    def best(self) -> CurvePoint:
        """The look whose weights are to be published."""
        return next(point for point in self.curve if point.step == self.kept)

    @property
    def flat(self) -> bool:
        """Whether the last `patience` looks brought nothing, neither on text nor on answers."""
        counted = [point for point in self.curve if point.step >= self.since]
        before, last = counted[: -self.patience or None], counted[-self.patience :]
        if not self.patience or not before:
            return False
        return all(
            min(getattr(p, part) for p in last) >= _FLAT * min(getattr(p, part) for p in before)
            for part in ("kl", "recall_kl")
        )

    def add(self, look: Look) -> bool:
        """Take a look in; whether its weights are to be kept. Says so when validation gets worse while training gets
        better: the model learns its data by heart."""
        self.losses = []
        point = look.point
        self.curve.append(point)
        if self.nearest is None or not look.worse_than(self.nearest):
            self.kept = point.step
            if self.nearest is None or point.distance < self.nearest.point.distance:
                self.nearest = look
            return True
        earlier = [p.loss for p in self.curve[:-1] if p.loss is not None and p.step >= self.since]
        if earlier and point.loss is not None and point.loss < min(earlier):
            best = self.nearest.point
            self.alarms.append(
                f"overfitting: at {point.tokens:,} tokens the validation distance is {point.distance:.3f}, it was "
                f"{best.distance:.3f} at {best.tokens:,}, while the training loss fell; more or other text, "
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
            base = {name: float(values.mean()) for name, values in self._scores(self.teacher).items()}
        self.base_nll, self.base_recall = base[f"{TEXT}.nll"], _over_probes(base, "hit")

    @torch.no_grad()
    def look(self, step: int, tokens: int, loss: float | None) -> Look:
        """Raises TrainingError if the student computes values that are not finite."""
        with self.healer.student():
            scores = self._scores([self._scored(batch) for _, batch in self.batches])
        found = {name: float(values.mean()) for name, values in scores.items()}
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(f"validation loss is not finite at step {step}; nothing was published")
        point = CurvePoint(
            step=step, tokens=tokens, loss=loss, kl=found[f"{TEXT}.kl"], nll=found[f"{TEXT}.nll"],
            recall=_over_probes(found, "hit"), recall_kl=_over_probes(found, "kl"),
        )  # fmt: skip
        return Look(point=point, kl={kind: scores[f"{kind}.kl"].tolist() for kind in (TEXT, *PROBES)})

    def _scored(self, batch: Sequences) -> Tensor:
        """`[K, E]` final hidden states of whatever is in place."""
        return scored_hidden(final_hidden(self.healer.model, batch.tokens), batch.scored.to(self.healer.model.device))

    def _scores(self, hidden: list[Tensor]) -> dict[str, np.ndarray]:
        """Metrics such as `text.kl`, of every sequence."""
        parts: dict[str, list[np.ndarray]] = {}
        device, head = self.healer.model.device, self.healer.head
        for (kind, batch), own, teacher in zip(self.batches, hidden, self.teacher, strict=True):
            expected = log_probabilities(teacher.to(device), head)
            scores = token_scores(own.to(device), head, expected, scored_targets(batch).to(device))
            for metric, values in scores.per_sequence(batch.scored).items():
                parts.setdefault(f"{kind}.{metric}", []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}


def _over_probes(found: dict[str, float], metric: str) -> float:
    return sum(found[f"{probe}.{metric}"] for probe in PROBES) / len(PROBES)
