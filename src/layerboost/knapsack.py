"""One measured candidate per layer, least loss under a cost, as if damages added up: a knapsack, solved exactly."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from layerboost.artifacts import Sensitivity
from layerboost.damage import candidate_loss
from layerboost.layer_plan import KEEP, LayerPlan

DEFAULT_KV_REDUCTION = 0.5  # where no budget is given
_SAME = 1e-9  # what is rounding in a sum of losses or shares
_GONE = LayerPlan("no_attention")


@dataclass(frozen=True)
class Option:
    """What a layer may get, and what that costs.

    Attributes:
        loss: nats.
        kv: share of the base model's KV bytes.
    """

    layer: int
    plan: LayerPlan
    loss: float
    kv: float


def options(
    sensitivity: Sensitivity, context: int, weights: dict[str, float], losses: Sequence[Sequence[float]] | None = None
) -> list[Option]:
    """Everything each layer may get: to stay, or a measured candidate.

    Args:
        losses: per layer and candidate; None is their weighted mean damage.
    """
    model = sensitivity.model
    whole = max(model.kv_bytes([KEEP] * model.num_layers, context), 1)
    found = []
    for layer, candidates in enumerate(sensitivity.layers):
        own = [candidate_loss(c, weights) for c in candidates] if losses is None else losses[layer]
        rest = model.kv_bytes([_GONE if i == layer else KEEP for i in range(model.num_layers)], context)
        for plan, loss in [(KEEP, 0.0), *((c.plan, x) for c, x in zip(candidates, own, strict=True))]:
            with_it = [plan if i == layer else KEEP for i in range(model.num_layers)]
            found.append(Option(layer, plan, loss, (model.kv_bytes(with_it, context) - rest) / whole))
    return found


def solve(
    choices: Sequence[Option],
    num_layers: int,
    *,
    minimise: str,
    at_least: dict[str, int] | None = None,
    most_full: int | None = None,
    **most: float | None,
) -> list[LayerPlan] | None:
    """The best plan, or None if there is none; HiGHS proves it optimal. Of equal ones, the one that costs least
    otherwise.

    Args:
        minimise: `loss` or `kv`.
        at_least: fewest layers of each mixer.
        most_full: most layers that keep their attention.
        most: limits on `loss` and `kv`.
    """
    values = {name: np.array([getattr(option, name) for option in choices]) for name in ("loss", "kv")}
    # what HiGHS lets pass as rounding is the same whatever a row's size, and losses may be as small
    scales = {name: 1 / max(abs(own).max(), 1e-30) for name, own in values.items()}
    values = {name: scales[name] * own for name, own in values.items()}
    columns = np.arange(len(choices))
    one_per_layer = csr_array((np.ones(len(choices)), ([o.layer for o in choices], columns)))
    constraints = [LinearConstraint(one_per_layer, 1, 1)]
    for mixer, fewest in (at_least or {}).items():
        if fewest:
            constraints.append(LinearConstraint(_are(choices, mixer), fewest, np.inf))
    if most_full is not None:
        constraints.append(LinearConstraint(_are(choices, "full_attention"), 0, most_full))
    for name, limit in most.items():
        if limit is not None:
            constraints.append(LinearConstraint(values[name][None], -np.inf, scales[name] * (limit + _SAME)))
    best = _least(values[minimise], constraints)
    if best is None:
        return None
    no_worse = LinearConstraint(values[minimise][None], -np.inf, values[minimise] @ best + _SAME)
    other = _least(values[{"loss": "kv", "kv": "loss"}[minimise]], [*constraints, no_worse])
    chosen = best if other is None else other
    taken = sorted((o for o, x in zip(choices, chosen, strict=True) if x), key=lambda option: option.layer)
    return [option.plan for option in taken]


def _least(costs: np.ndarray, constraints: list[LinearConstraint]) -> np.ndarray | None:
    """Which options to take, `[O]` bool."""
    solved = milp(
        costs, constraints=constraints, integrality=np.ones(len(costs)), bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    return None if solved.x is None else solved.x > 0.5


def _are(choices: Sequence[Option], mixer: str) -> np.ndarray:
    return np.array([[float(option.plan.mixer == mixer) for option in choices]])


def hull(choices: Sequence[Option], num_layers: int) -> list[list[LayerPlan]]:
    """Plans of least loss along all KV costs, from everything kept to the smallest cache: the convex part of the front.

    Each step changes one layer, the one that saves most KV for its loss; every plan is optimal at its own cost.
    """
    current: list[Option] = []
    steps: list[tuple[float, int, Option]] = []
    for layer in range(num_layers):
        corner = _corners([option for option in choices if option.layer == layer])
        current.append(corner[0])
        for before, after in itertools.pairwise(corner):
            steps.append(((after.loss - before.loss) / (before.kv - after.kv), layer, after))
    plans = [[option.plan for option in current]]
    for _, layer, option in sorted(steps, key=lambda step: step[:2]):
        current[layer] = option
        plans.append([option.plan for option in current])
    return plans


def _corners(own: list[Option]) -> list[Option]:
    """A layer's options that are best at some price of KV, from the largest cache down; losses rise ever faster."""
    kept: list[Option] = []
    for option in sorted(own, key=lambda o: (o.kv, o.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue  # a larger cache for nothing
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept[::-1]


def _slope(small: Option, large: Option) -> float:
    """Loss that a larger cache saves, per share of KV."""
    return (small.loss - large.loss) / (large.kv - small.kv)
