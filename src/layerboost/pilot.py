"""Pilot healing: rankings of plans can change when they are healed, so the best few are healed briefly and compared."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from layerboost import convert, heal, plan
from layerboost.artifacts import Plan, save
from layerboost.layer_plan import LayerPlan
from layerboost.progress import say


def heal_briefly(model: Path, plans: Sequence[list[LayerPlan]], config: plan.Config) -> list[float]:
    """Weighted loss of every plan after the same few tokens of healing, on the validation split.

    The held-out split is never looked at: it is for the evaluation of what comes out. The loss is text KL and what
    recall lacks of the whole, by the sum of the weights of `text_*` metrics and of all others.
    """
    text = sum(weight for metric, weight in config.weights.items() if metric.startswith("text"))
    rest = sum(config.weights.values()) - text
    settings = heal.Config(tokens=config.pilot_tokens, text=config.text, seed=config.seed, device=config.device)
    settings = settings.model_copy(update={"length": min(settings.length, settings.tokens)})
    losses = []
    for number, layers in enumerate(plans, 1):
        say(f"pilot {number} of {len(plans)}")
        with tempfile.TemporaryDirectory() as scratch:
            planned, hybrid = Path(scratch) / "plan.json", Path(scratch) / "hybrid"
            save(Plan(layers=layers), planned)
            convert.run(model, planned, out=hybrid)
            best = heal.run(hybrid, model, settings, out=Path(scratch) / "healed").best
        losses.append(text * best.kl + rest * (1 - best.recall))
    return losses
