"""Plans that do not look at the model: what layer-aware ones have to beat."""

import numpy as np

from layerboost.artifacts import Sensitivity
from layerboost.errors import PlanError
from layerboost.layer_plan import KEEP, LayerPlan
from layerboost.plan.budget import Budget
from layerboost.plan.tiers import measured_windows


def _wide_first(sensitivity: Sensitivity, mixer: LayerPlan | None) -> list[LayerPlan]:
    """What replaces attention: the mixer asked for, or windows from the widest down, and removal at last."""
    if mixer is not None:
        return [mixer]
    return [LayerPlan("sliding_attention", w) for w in reversed(measured_windows(sensitivity))] + [
        LayerPlan("no_attention")
    ]


def _fits(native: int | None, mixer: LayerPlan) -> LayerPlan:
    """A layer that would see no less keeps its own attention."""
    return mixer if mixer.narrows(native) else KEEP


def plan_uniform(sensitivity: Sensitivity, budget: Budget, mixer: LayerPlan | None) -> list[LayerPlan]:
    """Every layer the same.

    Raises:
        PlanError: none meets the budget.
    """
    natives = sensitivity.model.native_windows
    for tried in _wide_first(sensitivity, mixer):
        layers = [_fits(native, tried) for native in natives]
        if budget.met(layers):
            return layers
    raise PlanError(f"{budget.describe()} cannot be met by the same mixer in every layer")


def plan_periodic(sensitivity: Sensitivity, budget: Budget, mixer: LayerPlan | None) -> list[LayerPlan]:
    """Every n-th layer keeps its attention, as often as the budget allows; between them the widest window that fits.

    Raises:
        PlanError: none meets the budget.
    """
    natives = sensitivity.model.native_windows
    for period in range(2, len(natives) + 1):
        for tried in _wide_first(sensitivity, mixer):
            layers = [KEEP if (i + 1) % period == 0 else _fits(n, tried) for i, n in enumerate(natives)]
            if budget.met(layers):
                return layers
    raise PlanError(f"{budget.describe()} cannot be met by keeping every n-th layer")


def plan_random(sensitivity: Sensitivity, budget: Budget, like: list[LayerPlan], seed: int) -> list[LayerPlan]:
    """Another plan's mixers, dealt to the layers at random.

    Raises:
        PlanError: no deal in a thousand meets the budget and the layers' own windows.
    """
    rng = np.random.default_rng(seed)
    natives = sensitivity.model.native_windows
    for _ in range(1_000):
        layers = [_fits(native, like[i]) for native, i in zip(natives, rng.permutation(len(like)), strict=True)]
        if budget.met(layers):
            return layers
    raise PlanError(f"{budget.describe()} was met by none of 1,000 random plans of the same make-up")
