"""The paper's rule: rank layers by one score, keep the first, window the next, remove the rest (arXiv 2604.22050)."""

from typing import TYPE_CHECKING

from layerboost.artifacts import Sensitivity
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan, MixerName
from layerboost.plan.losses import damage_of

if TYPE_CHECKING:
    from layerboost.plan import Tiers


def removal_scores(sensitivity: Sensitivity, metric: str) -> list[float]:
    """Per layer, the mean damage of removing its attention.

    Raises:
        PlanError: removal was not measured somewhere, or the metric was not.
    """
    scores = []
    for layer, candidates in enumerate(sensitivity.layers):
        removal = [c for c in candidates if c.mixer == "no_attention"]
        if not removal:
            raise PlanError(f"layer {layer}: removing attention was not measured; analyze the model again")
        scores.append(damage_of(removal[0], metric).mean)
    return scores


def plan_tiers(sensitivity: Sensitivity, config: "Tiers") -> list[LayerPlan]:
    """Three tiers by counts or by thresholds on one score.

    Raises:
        PlanError: neither or both ways of cutting are given, counts exceed the layers, or no window is known.
    """
    scores = removal_scores(sensitivity, config.score)
    by_count = config.full is not None or config.sliding is not None
    by_threshold = config.keep_above is not None or config.remove_below is not None
    if by_count == by_threshold:
        raise PlanError(
            "tiers needs either counts (tiers.full and tiers.sliding) or thresholds (tiers.keep_above and "
            "tiers.remove_below)"
        )
    if by_count:
        names = _by_count(scores, config.full or 0, config.sliding or 0)
    else:
        names = _by_threshold(scores, config.keep_above, config.remove_below)
    measured = [c.window for candidates in sensitivity.layers for c in candidates if c.window is not None]
    window = config.window or max(measured, default=None)
    if window is None and "sliding_attention" in names:
        raise PlanError("tiers.window is missing, and no window was measured that could stand for it")
    layers = []
    for index, (name, score) in enumerate(zip(names, scores, strict=True)):
        native = sensitivity.model.native_windows[index]
        if name == "sliding_attention" and native is not None and window is not None and window >= native:
            name = "full_attention"  # its own window is no wider
        layers.append(
            LayerPlan(
                mixer=name,
                window=window if name == "sliding_attention" else None,
                reason=f"removal costs {score:.4f} ({config.score}), {_place(scores, index)} of {len(scores)}",
            )
        )
    return layers


def _by_count(scores: list[float], full: int, sliding: int) -> list[MixerName]:
    if full + sliding > len(scores):
        raise PlanError(f"tiers.full {full} and tiers.sliding {sliding} are more than the model's {len(scores)} layers")
    names: list[MixerName] = ["no_attention"] * len(scores)
    for place, index in enumerate(_ranked(scores)):
        if place < full + sliding:
            names[index] = "full_attention" if place < full else "sliding_attention"
    return names


def _by_threshold(scores: list[float], keep_above: float | None, remove_below: float | None) -> list[MixerName]:
    if keep_above is None or remove_below is None or remove_below > keep_above:
        raise PlanError(
            "tiers.keep_above and tiers.remove_below are needed both, the first not below the second; found "
            f"{keep_above} and {remove_below}"
        )
    return [
        "full_attention" if score > keep_above else "no_attention" if score < remove_below else "sliding_attention"
        for score in scores
    ]


def _ranked(scores: list[float]) -> list[int]:
    """Layer numbers, most sensitive first; of equals the earlier layer."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def _place(scores: list[float], index: int) -> int:
    return _ranked(scores).index(index) + 1
