"""One number for what a layer's mixer costs in quality, and how sure that number is.

L layers, C candidates of a layer, R resamples.
"""

import re
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from layerboost.artifacts import Candidate, Damage, Sensitivity
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan

DEFAULT_WEIGHTS = {"text_kl": 0.6, "recall_kl": 0.4}


def _weighs(weights: dict[str, float]) -> dict[str, float]:
    if not sum(weights.values()):
        raise ValueError("at least one metric needs a weight above 0")
    return weights


Weights = Annotated[dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_weighs)]
_RESAMPLES = 1_000
_DIVERGENCE = re.compile("_(kl|nll)(?=@|$)")
# of layers that differ by less than rounding, nothing can be said
_SAME = 1e-6


def check_sensitivity(sensitivity: Sensitivity) -> None:
    """Raises PlanError if the layers do not fit together."""
    model = sensitivity.model
    for name, count in (("layers", len(sensitivity.layers)), ("native_windows", len(model.native_windows))):
        if count != model.num_layers:
            raise PlanError(
                f"sensitivity has {count} {name}, its model has {model.num_layers}; analyze the model again"
            )


def damage_of(candidate: Candidate, metric: str) -> Damage:
    """Raises PlanError if the metric was not measured."""
    if metric not in candidate.damage:
        raise PlanError(f"damage {metric} was not measured; measured are {', '.join(candidate.damage) or 'none'}")
    return candidate.damage[metric]


def candidate_loss(candidate: Candidate, weights: dict[str, float]) -> float:
    """Weighted mean damage; a candidate that seems to do good counts as harmless."""
    return max(0.0, sum(weight * damage_of(candidate, metric).mean for metric, weight in weights.items()))


def weighted(metrics: dict[str, Any], weights: dict[str, float]) -> float:
    """The same for one plan, from per-sequence damages by metric."""
    return float(sum(weight * np.mean(metrics[metric]) for metric, weight in weights.items()))


def predicted_loss(sensitivity: Sensitivity, layers: list[LayerPlan], weights: dict[str, float]) -> float | None:
    """Sum over layers, as if damages added up; None if a layer's mixer was not measured."""
    total = 0.0
    for plan, candidates in zip(layers, sensitivity.layers, strict=True):
        if plan.mixer != "full_attention":
            measured = [c for c in candidates if c.plan.alike(plan)]
            if not measured:
                return None
            total += candidate_loss(measured[0], weights)
    return total


def resampled_losses(
    sensitivity: Sensitivity, weights: dict[str, float], resamples: int = _RESAMPLES
) -> list[np.ndarray]:
    """Per layer `[C, R]`: the weighted loss on resampled sequences, the same ones for every layer and candidate.

    Paired, because layers are compared on the same sequences: what makes one sequence hard for all of them cancels. KL
    and NLL of the same sequences are resampled together; of accuracies, which are of some of them, each by itself.

    Raises:
        PlanError: a metric was not measured, or its sequences were not kept.
    """
    shares = Shares(resamples)
    total = [np.zeros((len(candidates), resamples)) for candidates in sensitivity.layers]
    for metric, weight in weights.items():
        values = [[damage_of(c, metric).per_sequence for c in candidates] for candidates in sensitivity.layers]
        lengths = {len(found) for layer in values for found in layer}
        if len(lengths) > 1 or not min(lengths, default=1):
            raise PlanError(
                f"damage {metric} has no value per sequence that could be resampled; analyze the model again"
            )
        share = shares(metric, max(lengths, default=1))
        for losses, layer in zip(total, values, strict=True):
            if layer:
                # one by one: how a product of several rows is rounded depends on how many there are
                losses += weight * np.array([np.array(row) @ share for row in layer])
    return total


class Shares:
    """What each of a metric's sequences counts for in every resample, the same for metrics of the same sequences."""

    def __init__(self, resamples: int) -> None:
        self.resamples = resamples
        self._rng = np.random.default_rng(0)
        self._known: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, metric: str, count: int) -> np.ndarray:
        """`[count, R]` float64, columns add up to 1."""
        key = _DIVERGENCE.sub("", metric), count
        if key not in self._known:
            self._known[key] = self._rng.multinomial(count, np.full(count, 1 / count), self.resamples).T / count
        return self._known[key]


def ranking(
    sensitivity: Sensitivity, weights: dict[str, float], confidence: float, resamples: int = _RESAMPLES
) -> dict[str, list[list[int]]]:
    """Per mixer's label, its layers with the largest loss first, in groups: a layer joins the group before it when the
    paired interval of its difference to that group's last layer holds 0."""
    losses = resampled_losses(sensitivity, weights, resamples)
    found: dict[str, list[list[int]]] = {}
    labels = {c.plan.label: None for candidates in sensitivity.layers for c in candidates}
    for label in labels:
        rows = {
            layer: (candidate_loss(c, weights), losses[layer][n])
            for layer, candidates in enumerate(sensitivity.layers)
            for n, c in enumerate(candidates)
            if c.plan.label == label
        }
        groups: list[list[int]] = []
        for layer in sorted(rows, key=lambda layer: (-rows[layer][0], layer)):
            tied = bool(groups) and not differ(rows[groups[-1][-1]][1], rows[layer][1], confidence)
            groups[-1].append(layer) if tied else groups.append([layer])
        found[label] = groups
    return found


def differ(a: np.ndarray, b: np.ndarray, confidence: float) -> bool:
    """Whether two losses on the same resamples `[R]` differ: their difference's interval does not hold 0."""
    low, high = np.quantile(a - b, ((1 - confidence) / 2, (1 + confidence) / 2))
    return bool(low > _SAME or high < -_SAME)


def reason(plan: LayerPlan, candidates: list[Candidate], weights: dict[str, float]) -> str:
    """Why a layer gets what it gets: what that costs, and what the others would."""
    losses = {c.plan.label: candidate_loss(c, weights) for c in candidates}
    others = ", ".join(f"{label} {loss:.3f}" for label, loss in losses.items() if label != plan.label)
    if plan.mixer == "full_attention":
        return f"replacing it would cost: {others} nats" if others else "nothing narrower was measured"
    own = losses.get(plan.label)
    costs = "was not measured" if own is None else f"costs {own:.3f} nats"
    return f"{costs}; {others}" if others else costs


_OTHERS = {"text": "text", "long": "answer", "prompts": "prompts"}  # kinds of sequences, and their metrics


def damages(base: dict[str, np.ndarray], changed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What got worse, per metric and sequence, from per-sequence scores such as `text.kl` of the untouched and of the
    changed model.

    `text_kl`, `text_nll` (growth) over text; `recall_kl`, `recall_nll` over all recall probes' answers, and over those
    of one `@distance` where several were asked for; each probe's accuracy lost under its own name; `answer_*` over
    answers of long prompts; `prompts_*` over a user's own; `generation`, how much earlier a greedy completion leaves
    the original's.
    """
    kinds = list(dict.fromkeys(key.partition(".")[0] for key in base))
    recall = [kind for kind in kinds if kind not in _OTHERS and kind != "generation"]
    groups = {_OTHERS[kind]: [kind] for kind in kinds if kind in _OTHERS} | ({"recall": recall} if recall else {})
    found: dict[str, np.ndarray] = {}
    for name, members in groups.items():
        found |= _divergence(base, changed, name, members)
    for kind, name in _OTHERS.items():
        if name != "text" and kind in kinds:
            found[name] = base[f"{kind}.hit"] - changed[f"{kind}.hit"]
    for probe in dict.fromkeys(kind.partition("@")[0] for kind in recall):
        own = [kind for kind in recall if kind.partition("@")[0] == probe]
        found[probe] = np.concatenate([base[f"{kind}.hit"] - changed[f"{kind}.hit"] for kind in own])
    for distance in dict.fromkeys(kind.partition("@")[2] for kind in recall if "@" in kind):
        found |= _divergence(base, changed, "recall", [k for k in recall if k.endswith(f"@{distance}")], f"@{distance}")
    if "generation" in kinds:
        found["generation"] = base["generation.lead"] - changed["generation.lead"]
    return found


def _divergence(
    base: dict[str, np.ndarray], changed: dict[str, np.ndarray], name: str, kinds: list[str], mark: str = ""
) -> dict[str, np.ndarray]:
    return {
        f"{name}_kl{mark}": np.concatenate([changed[f"{kind}.kl"] for kind in kinds]),
        f"{name}_nll{mark}": np.concatenate([changed[f"{kind}.nll"] - base[f"{kind}.nll"] for kind in kinds]),
    }


def levels(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The untouched model's own values behind the damages: NLL in nats, and accuracies."""
    nothing = {key: np.zeros_like(values) for key, values in base.items()}
    own = damages(nothing, base)
    return {metric: values if "_nll" in metric else -values for metric, values in own.items() if "_kl" not in metric}
