"""One number for what a layer's mixer costs in quality."""

from typing import Literal, get_args

from layerboost.artifacts import Candidate, Damage, Sensitivity
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan

LOSSES = Literal["text_kl", "text_nll", "recall_kl", "recall_nll", "copy", "key_value", "needle"]


def candidate_loss(candidate: Candidate, weights: dict[LOSSES, float]) -> float:
    """Weighted mean damage; a candidate that seems to do good counts as harmless."""
    return max(0.0, sum(weight * damage_of(candidate, metric).mean for metric, weight in weights.items()))


def damage_of(candidate: Candidate, metric: str) -> Damage:
    """Raises PlanError if the metric was not measured."""
    if metric not in candidate.damage:
        raise PlanError(
            f"damage {metric} was not measured; measured are {', '.join(candidate.damage) or 'none'} "
            f"(metrics known to layerboost: {', '.join(get_args(LOSSES))})"
        )
    return candidate.damage[metric]


def predicted_loss(sensitivity: Sensitivity, layers: list[LayerPlan], weights: dict[LOSSES, float]) -> float | None:
    """Sum over layers, as if damages added up; None if a layer's mixer was not measured."""
    total = 0.0
    for plan, candidates in zip(layers, sensitivity.layers, strict=True):
        if plan.mixer != "full_attention":
            measured = [c for c in candidates if c.plan.alike(plan)]
            if not measured:
                return None
            total += candidate_loss(measured[0], weights)
    return total


def reason(plan: LayerPlan, candidates: list[Candidate], weights: dict[LOSSES, float]) -> str:
    """Why a layer gets what it gets: what that costs, and what the others would."""
    losses = {c.plan.label: candidate_loss(c, weights) for c in candidates}
    others = ", ".join(f"{label} {loss:.3f}" for label, loss in losses.items() if label != plan.label)
    if plan.mixer == "full_attention":
        return f"replacing it would cost: {others} nats" if others else "nothing narrower was measured"
    own = losses.get(plan.label)
    costs = "was not measured" if own is None else f"costs {own:.3f} nats"
    return f"{costs}; {others}" if others else costs
