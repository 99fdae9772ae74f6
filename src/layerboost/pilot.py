"""Pilot healing: rankings of plans can change when they are healed, so the best few are healed briefly and compared."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from layerboost import convert, heal, plan
from layerboost.artifacts import Plan, save, text_digest
from layerboost.layer_plan import LayerPlan


@dataclass(frozen=True)
class Pilots:
    """Heals a plan briefly, as the whole healing would.

    Attributes:
        healing: how the plan that is taken will be healed.
    """

    healing: heal.Config

    def __call__(self, model: Path, layers: list[LayerPlan], config: plan.Config) -> float:
        """Weighted loss after a few tokens of healing, on the validation split.

        The held-out split is never looked at: it is for the evaluation of what comes out. The loss is text KL and what
        recall lacks of the whole, by the sum of the weights of `text_*` metrics and of all others.
        """
        text = sum(weight for metric, weight in config.weights.items() if metric.startswith("text"))
        rest = sum(config.weights.values()) - text
        with tempfile.TemporaryDirectory() as scratch:
            planned, hybrid = Path(scratch) / "plan.json", Path(scratch) / "hybrid"
            save(Plan(layers=layers), planned)
            convert.run(model, planned, out=hybrid)
            best = heal.run(hybrid, model, self.settings(config), out=Path(scratch) / "healed").best
        return text * best.kl + rest * (1 - best.recall)

    def settings(self, config: plan.Config) -> heal.Config:
        """Those of the healing, for a pilot's tokens; kept signals are of the whole healing's sequences."""
        tokens = min(config.pilot_tokens, self.healing.tokens)
        own = {"tokens": tokens, "length": min(self.healing.length, tokens), "signals": None, "signals_from": None}
        return self.healing.model_copy(update=own)

    def digest(self, model: Path, config: plan.Config) -> str:
        """Of all that decides how a plan of this model is healed."""
        return text_digest(heal.data_and_settings(model, self.settings(config)))
