"""The paper's rule: rank layers by one score, keep the first, window the next, remove the rest (arXiv 2604.22050)."""

import itertools
import math
from typing import TYPE_CHECKING

from layerboost.artifacts import Sensitivity
from layerboost.damage import candidate_loss, damage_of
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan, MixerName

if TYPE_CHECKING:
    from layerboost.plan import Tiers
    from layerboost.plan.budget import Budget


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


def plan_tiers(
    sensitivity: Sensitivity, config: "Tiers", budget: "Budget", weights: dict[str, float]
) -> list[LayerPlan]:
    """Three tiers on one score: by counts, by thresholds, or, with neither, by the counts that meet the budget with the
    least predicted loss. The paper does not say where it cuts; that is the kindest reading.

    Raises:
        PlanError: both ways of cutting are given, counts exceed the layers, no window is known, or no cut meets the
            budget.
    """
    scores = removal_scores(sensitivity, config.score)
    by_count = config.full is not None or config.sliding is not None
    by_threshold = config.keep_above is not None or config.remove_below is not None
    if by_count and by_threshold:
        raise PlanError(
            "tiers takes either counts (tiers.full and tiers.sliding) or thresholds (tiers.keep_above and "
            "tiers.remove_below)"
        )
    window = config.window or widest_window(sensitivity)
    if by_count:
        return _layers(sensitivity, config, scores, _by_count(scores, config.full or 0, config.sliding or 0), window)
    if by_threshold:
        names = _by_threshold(scores, config.keep_above, config.remove_below)
        return _layers(sensitivity, config, scores, names, window)
    return _best_cut(sensitivity, config, scores, budget, weights)


def _best_cut(
    sensitivity: Sensitivity, config: "Tiers", scores: list[float], budget: "Budget", weights: dict[str, float]
) -> list[LayerPlan]:
    count, order = len(scores), _ranked(scores)
    known = measured_windows(sensitivity)
    if config.window and config.window not in known:
        raise PlanError(
            f"tiers.window {config.window} was not measured, so its loss at this budget is not known; measured: "
            f"{', '.join(map(str, known)) or 'none'}. Take one of them, or analyze with windows=[{config.window}]"
        )
    windows: list[int | None] = [config.window] if config.window else [*known]
    cuts: list[tuple[float, int, int, int]] = []
    for n, window in enumerate(windows or [None]):
        names: list[MixerName] = ["no_attention", "sliding_attention" if window else "no_attention"]
        every = [_layers(sensitivity, config, scores, [name] * count, window) for name in names]
        losses = [_costs(sensitivity, layers, weights) for layers in every]
        removed, windowed = ([own[i] for i in order] for own in losses)
        rest = [*itertools.accumulate(reversed(removed), initial=0.0)][::-1]  # of removing all from a place on
        for full in range(count + 1):
            middle = itertools.accumulate(windowed[full:] if window else (), initial=0.0)
            cuts += [(loss + rest[full + sliding], n, full, sliding) for sliding, loss in enumerate(middle)]
    for loss, n, full, sliding in sorted(cuts):
        window = (windows or [None])[n]
        layers = _layers(sensitivity, config, scores, _by_count(scores, full, sliding), window)
        if math.isfinite(loss) and budget.met(layers):
            return layers
    raise PlanError(f"{budget.describe()} cannot be met by any two cuts of the ranking; ask for less")


def _costs(sensitivity: Sensitivity, layers: list[LayerPlan], weights: dict[str, float]) -> list[float]:
    """Every layer's loss; infinite where its mixer was not measured."""
    costs = []
    for plan, own in zip(layers, sensitivity.layers, strict=True):
        measured = [candidate_loss(c, weights) for c in own if c.plan.alike(plan)]
        costs.append(0.0 if plan.mixer == "full_attention" else measured[0] if measured else math.inf)
    return costs


def measured_windows(sensitivity: Sensitivity) -> list[int]:
    """Of `sliding_attention`, narrowest first."""
    return sorted({c.window for own in sensitivity.layers for c in own if c.mixer == "sliding_attention" and c.window})


def widest_window(sensitivity: Sensitivity) -> int | None:
    return max(measured_windows(sensitivity), default=None)


def _layers(
    sensitivity: Sensitivity, config: "Tiers", scores: list[float], names: list[MixerName], window: int | None
) -> list[LayerPlan]:
    if window is None and "sliding_attention" in names:
        raise PlanError("tiers.window is missing, and no window was measured that could stand for it")
    order = _ranked(scores)
    layers = []
    for index, (name, score) in enumerate(zip(names, scores, strict=True)):
        native = sensitivity.model.native_windows[index]
        if name == "sliding_attention" and native is not None and window is not None and window >= native:
            name = "full_attention"  # its own window is no wider
        layers.append(
            LayerPlan(
                mixer=name,
                window=window if name == "sliding_attention" else None,
                reason=f"removal costs {score:.4f} ({config.score}), {order.index(index) + 1} of {len(scores)}",
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
