"""Pilot healing: rankings of plans can change when they are healed, so the best few are healed briefly and compared."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost import convert, heal, plan
from layerboost.artifacts import Plan, text_digest
from layerboost.layer_plan import LayerPlan


@dataclass(frozen=True)
class Pilots:
    """Heals a plan briefly, as the whole healing would.

    Attributes:
        healing: how the plan that is taken will be healed.
        scratch: folder of the checkpoints in between; not there before and after.
    """

    healing: heal.Config
    scratch: Path

    def __call__(self, model: Path, layers: list[LayerPlan], config: plan.Config, windows: Sequence[int] = ()) -> float:
        """Weighted loss after a few tokens of healing, on the validation split, and on probes beyond all `windows`.

        The held-out split is never looked at: it is for the evaluation of what comes out. The loss is text KL and what
        recall lacks of the whole, by the sum of the weights of `text_*` metrics and of all others.
        """
        text = sum(weight for metric, weight in config.weights.items() if metric.startswith("text"))
        rest = sum(config.weights.values()) - text
        with self._emptied():
            convert.run(model, Plan(layers=layers), out=self.scratch / "hybrid")
            healing = brief(self.healing, config)
            healed = heal.run(
                self.scratch / "hybrid", model, healing, out=self.scratch / "healed", compared_windows=windows
            )
        best = healed.best
        return text * best.kl + rest * (1 - best.recall)

    @contextlib.contextmanager
    def _emptied(self) -> Iterator[None]:
        """Also of what a pilot that was killed has left."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def digest(self, model: Path, config: plan.Config) -> str:
        """Of all that decides how a plan of this model is healed."""
        return text_digest(heal.data_and_settings(model, brief(self.healing, config)))


def brief(healing: heal.Config, config: plan.Config) -> heal.Config:
    """The healing for a pilot's tokens; kept signals are of the whole healing's sequences."""
    tokens = min(config.pilot_tokens, healing.tokens)
    own: dict[str, Any] = {"tokens": tokens, "signals": None, "signals_from": None}
    if tokens < (healing.length or heal.DEFAULT_LENGTH):
        own["length"] = tokens
    return healing.model_copy(update=own)
