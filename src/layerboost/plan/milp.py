"""The additive planner: least summed damage under the budget, exactly.

Where a plan's cost is a sum over its layers, HiGHS solves the multiple-choice knapsack. On vLLM it is not: layers that
keep equally much form groups which are padded to one size, so what counts is how many layers keep how much. There the
least loss of every such make-up is found at once, and the engine's own arithmetic picks among them.

L layers, K kinds of cache in a plan.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerboost.artifacts import Sensitivity
from layerboost.errors import PlanError
from layerboost.knapsack import hull, options, solve
from layerboost.layer_plan import KEEP, LayerPlan
from layerboost.plan.budget import Budget

Losses = Sequence[Sequence[float]]
Kind = tuple[str, int | None]  # mixer, and the window that the layer then has
_NEVER = np.inf


def plan_milp(
    sensitivity: Sensitivity, budget: Budget, weights: dict[str, float], losses: Losses | None = None
) -> tuple[list[LayerPlan], list[list[LayerPlan]]]:
    """The best plan at the budget, and plans along the front of loss and KV.

    Args:
        losses: per layer and candidate, in place of the weighted mean damages.

    Raises:
        PlanError: no plan meets the budget, with what could be met.
    """
    if budget.on_vllm:
        return _by_make_up(sensitivity, budget, weights, losses)
    count, config = sensitivity.model.num_layers, budget.config
    choices = options(sensitivity, budget.context, weights, losses)
    find = functools.partial(solve, choices, count, at_least=budget.at_least, most_full=budget.most_full)
    front = thinned(hull(choices, count))
    if budget.saves:
        chosen = find(minimise="kv", loss=config.max_loss)
        if chosen is None:
            raise PlanError(f"{budget.describe()} cannot be met together; allow more loss")
        return chosen, front
    chosen = find(minimise="loss", kv=budget.kv_limit)
    if chosen is None:
        least = find(minimise="kv")
        if least is None:
            raise PlanError(budget.unmet())
        raise PlanError(
            f"{budget.describe()} cannot be met: the smallest cache is {budget.kv_share(least):.3f} of the base's at a "
            f"context of {budget.context} tokens; ask for less, measure narrower windows, or lower at_least"
        )
    if config.max_loss is not None and (loss := _loss(sensitivity, chosen, weights, losses)) > config.max_loss + 1e-9:
        raise PlanError(
            f"{budget.describe()} cannot be met together: the least predicted loss is {loss:.4f}; allow more loss or "
            "save less"
        )
    return chosen, front


def thinned(front: list[Any], most: int = 24) -> list[Any]:
    """At most so many of them, both ends included."""
    places = np.linspace(0, len(front) - 1, min(most, len(front))).round().astype(int)
    return [front[n] for n in places]


def _loss(sensitivity: Sensitivity, layers: list[LayerPlan], weights: dict[str, float], losses: Losses | None) -> float:
    table = loss_table(sensitivity, weights, losses)
    return sum(next(x for p, x in own if p.alike(plan)) for own, plan in zip(table, layers, strict=True))


def loss_table(
    sensitivity: Sensitivity, weights: dict[str, float], losses: Losses | None = None
) -> list[list[tuple[LayerPlan, float]]]:
    """Per layer, everything it may get and its loss; keeping comes first."""
    table: list[list[tuple[LayerPlan, float]]] = [[] for _ in sensitivity.layers]
    for option in options(sensitivity, 2, weights, losses):
        table[option.layer].append((option.plan, option.loss))
    return table


@dataclass(frozen=True)
class MakeUp:
    """How many layers have which mixer and keep how much, and the plan of least loss that is made up so.

    Attributes:
        kinds: layers by mixer and window; None keeps everything.
        kv: share of the base model's cache in the engine.
    """

    kinds: dict[Kind, int]
    loss: float
    kv: float
    table: "Table"
    place: tuple[int, ...]

    @property
    def windows(self) -> Counter[int | None]:
        """How many layers keep how much, whatever their mixer."""
        found: Counter[int | None] = Counter()
        for (_, window), count in self.kinds.items():
            found[window] += count
        return found

    @property
    def layers(self) -> list[LayerPlan]:
        return self.table.plan(self.place)


class Table:
    """Least loss of every make-up, over layers that may keep what they have, get one window, or lose attention.

    Dynamic programming over layers: a state is how many layers have each kind of cache so far.

    Args:
        rows: per layer, (kind or -1 for none, plan, loss).
        kinds: what the kinds stand for. A layer's own window is another kind than a window in its place, however wide:
            budgets may count mixers.
    """

    def __init__(self, rows: list[list[tuple[int, LayerPlan, float]]], kinds: list[Kind]) -> None:
        self.rows, self.kinds = rows, kinds
        most = [sum(any(kind == k for kind, _, _ in row) for row in rows) for k in range(len(kinds))]
        best = np.full([n + 1 for n in most], _NEVER)
        best[(0,) * len(kinds)] = 0.0
        self.taken = []
        for row in rows:
            after = np.stack([_shifted(best, kind) + loss for kind, _, loss in row])
            self.taken.append(after.argmin(0).astype(np.int8))
            best = after.min(0)
        self.best = best

    def make_ups(self, budget: Budget) -> Iterator[MakeUp]:
        """All that can be made and that keep something; an engine without any cache is of no use."""
        places = np.argwhere(np.isfinite(self.best))
        places = places[places.sum(1) > 0]
        losses = self.best[tuple(places.T)]
        windows = list(dict.fromkeys(window for _, window in self.kinds))
        same = np.array([[window == other for other in windows] for _, window in self.kinds], dtype=int)
        shares = budget.made_up_bytes(places @ same, windows) / max(budget.base_bytes, 1)
        for place, loss, share in zip(places.tolist(), losses.tolist(), shares.tolist(), strict=True):
            yield MakeUp(dict(zip(self.kinds, place, strict=True)), loss, share, self, tuple(place))

    def plan(self, place: tuple[int, ...]) -> list[LayerPlan]:
        layers = []
        for row, taken in zip(reversed(self.rows), reversed(self.taken), strict=True):
            kind, plan, _ = row[taken[place]]
            layers.append(plan)
            place = tuple(n - (k == kind) for k, n in enumerate(place))
        return layers[::-1]


def _shifted(best: np.ndarray, kind: int) -> np.ndarray:
    """`best` with one more layer of this kind."""
    if kind < 0:
        return best
    moved = np.roll(best, 1, axis=kind)
    moved[(slice(None),) * kind + (0,)] = _NEVER
    return moved


def tables(sensitivity: Sensitivity, weights: dict[str, float], losses: Losses | None = None) -> list[Table]:
    """One per window that was measured: on vLLM every further window is a further kind of group, with padding."""
    table = loss_table(sensitivity, weights, losses)
    windows = sorted({p.window for own in table for p, _ in own if p.mixer == "sliding_attention" and p.window})
    found = []
    choices: list[int | None] = [*windows] or [None]
    for window in choices:
        rows: list[list[tuple[int, LayerPlan, float]]] = []
        kinds: list[Kind] = []
        for native, own in zip(sensitivity.model.native_windows, table, strict=True):
            best: dict[int, tuple[int, LayerPlan, float]] = {}
            for plan, loss in own:
                if plan.mixer == "linear_attention" or plan.window not in (None, window):
                    continue
                keeps: Kind = (plan.mixer, native if plan.alike(KEEP) else plan.window)
                if plan.mixer != "no_attention" and keeps not in kinds:
                    kinds.append(keeps)
                kind = -1 if plan.mixer == "no_attention" else kinds.index(keeps)
                if kind not in best or loss < best[kind][2]:
                    best[kind] = (kind, plan, loss)
            rows.append(list(best.values()))
        found.append(Table(rows, kinds))
    return found


def _by_make_up(
    sensitivity: Sensitivity, budget: Budget, weights: dict[str, float], losses: Losses | None
) -> tuple[list[LayerPlan], list[list[LayerPlan]]]:
    every = [m for table in tables(sensitivity, weights, losses) for m in table.make_ups(budget)]
    every.sort(key=lambda m: (m.loss, m.kv))
    max_loss = budget.config.max_loss
    front = [m.layers for m in thinned(_envelope(every))]
    if max_loss is not None and budget.saves:
        met = [m for m in every if m.loss <= max_loss + 1e-9 and budget.met(m.layers)]
        if not met:
            raise PlanError(f"{budget.describe()} cannot be met together; allow more loss")
        return min(met, key=lambda m: (m.kv, m.loss)).layers, front
    chosen = _first_met(every, budget)
    if chosen is None:
        raise PlanError(budget.unmet())
    if max_loss is not None and chosen.loss > max_loss + 1e-9:
        raise PlanError(
            f"{budget.describe()} cannot be met together: the least predicted loss is {chosen.loss:.4f}; allow more "
            "loss or ask for less"
        )
    return chosen.layers, front


def _first_met(every: list[MakeUp], budget: Budget) -> MakeUp | None:
    """The make-up of least loss that meets the budget. Playing an engine through takes time: what keeps at least as
    much of everything as one that was too slow, padding included, is too slow as well."""
    slow: list[Counter[tuple[str, int | None]]] = []
    for m in every:
        if budget.kv_limit is not None and m.kv > budget.kv_limit + 1e-9:
            continue
        kept = _kept(m, budget) if slow else Counter()
        if any(all(kept[key] >= count for key, count in other.items()) for other in slow):
            continue
        layers = m.layers
        if budget.met(layers):
            return m
        if budget.throughput is not None and budget.speedup(layers) < budget.throughput:
            slow.append(_kept(m, budget))
    return None


def _kept(m: MakeUp, budget: Budget) -> Counter[tuple[str, int | None]]:
    """Layers that work, and bytes that a token takes in padded groups, by window."""
    found: Counter[tuple[str, int | None]] = Counter()
    for window, count in m.windows.items():
        found["layers", window] += count
    layout = budget.layout(m.windows)
    for window in layout.windows:
        found["bytes", window] += layout.block_bytes
    return found


def _envelope(every: list[MakeUp]) -> list[MakeUp]:
    """Those that no other beats in both loss and cache, from the largest cache down."""
    found: list[MakeUp] = []
    for m in every:
        if not found or m.kv < found[-1].kv:
            found.append(m)
    return found
