"""The budget planner: one candidate per layer, least loss under a KV budget or least KV under a loss, exactly.

It adds damages up, which is optimistic for removals; see docs/plan.md.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from layerboost.artifacts import Sensitivity
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan
from layerboost.plan.losses import LOSSES, candidate_loss, reason

DEFAULT_KV_REDUCTION = 0.5
# what breaks ties: of two equal plans, the one that saves more, counted far below any measured damage
_TIE = 1e-9


@dataclass(frozen=True)
class Option:
    layer: int
    plan: LayerPlan
    loss: float
    kv: float  # share of the base model's KV bytes


def options(sensitivity: Sensitivity, context: int, weights: dict[LOSSES, float]) -> list[Option]:
    """Everything each layer may get: to stay, or a measured candidate."""
    model = sensitivity.model
    keep, gone = LayerPlan(mixer="full_attention"), LayerPlan(mixer="no_attention")
    whole = model.kv_bytes([keep] * model.num_layers, context)
    found = []
    for layer, candidates in enumerate(sensitivity.layers):
        for plan, loss in [(keep, 0.0), *((c.plan, candidate_loss(c, weights)) for c in candidates)]:
            alone = [plan if i == layer else gone for i in range(model.num_layers)]
            found.append(Option(layer, plan, loss, model.kv_bytes(alone, context) / max(whole, 1)))
    return found


def plan_budget(
    sensitivity: Sensitivity,
    *,
    context: int,
    kv_reduction: float | None,
    max_loss: float | None,
    at_least: dict[str, int],
    weights: dict[LOSSES, float],
) -> list[LayerPlan]:
    """Raises PlanError if no plan meets the budget, with what could be met."""
    if kv_reduction is None and max_loss is None:
        kv_reduction = DEFAULT_KV_REDUCTION
    choices = options(sensitivity, context, weights)
    num_layers = sensitivity.model.num_layers
    if sum(at_least.values()) > num_layers:
        raise PlanError(f"at_least asks for {sum(at_least.values())} layers, the model has {num_layers}")
    if kv_reduction is not None:
        chosen = _solve(choices, num_layers, at_least, minimise="loss", kv=1 - kv_reduction)
        if chosen is None:
            least = _solve(choices, num_layers, at_least, minimise="kv")
            if least is None:
                raise PlanError(f"at_least {at_least} cannot be met with the candidates that were measured")
            raise PlanError(
                f"kv_reduction {kv_reduction} cannot be met: at most {1 - _total(least, 'kv'):.3f} is possible at a "
                f"context of {context} tokens; ask for less, measure narrower windows, or lower at_least"
            )
        loss = _total(chosen, "loss")
        if max_loss is not None and loss > max_loss:
            raise PlanError(
                f"max_loss {max_loss} cannot be met with kv_reduction {kv_reduction}: the least predicted loss is "
                f"{loss:.4f} nats per token; allow more loss or ask for less reduction"
            )
    else:
        chosen = _solve(choices, num_layers, at_least, minimise="kv", loss=max_loss)
        if chosen is None:
            raise PlanError(f"max_loss {max_loss} cannot be met together with at_least {at_least}; allow more loss")
    return [
        LayerPlan(
            mixer=option.plan.mixer,
            window=option.plan.window,
            reason=reason(option.plan, sensitivity.layers[option.layer], weights),
        )
        for option in chosen
    ]


def _total(chosen: list[Option], what: str) -> float:
    return float(sum(getattr(option, what) for option in chosen))


def _solve(
    choices: list[Option], num_layers: int, at_least: dict[str, int], *, minimise: str, **most: float | None
) -> list[Option] | None:
    """The best choice of one option per layer, in layer order; None if there is none.

    A multiple-choice knapsack, solved exactly by HiGHS.
    """
    loss = np.array([option.loss for option in choices])
    kv = np.array([option.kv for option in choices])
    values = {"loss": loss, "kv": kv}
    one_per_layer = np.array(
        [[option.layer == layer for option in choices] for layer in range(num_layers)], dtype=float
    )
    constraints = [LinearConstraint(one_per_layer, 1, 1)]
    for mixer, fewest in at_least.items():
        constraints.append(LinearConstraint([[float(o.plan.mixer == mixer) for o in choices]], fewest, np.inf))
    for name, limit in most.items():
        if limit is not None:
            constraints.append(LinearConstraint(values[name][None], -np.inf, limit + 1e-9))
    other = {"loss": kv, "kv": loss}[minimise]
    solved = milp(
        values[minimise] + _TIE * other,
        constraints=constraints,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return [option for option, taken in zip(choices, solved.x, strict=True) if taken > 0.5]
