"""The joint planner: plans are measured whole, because replacements hurt more together than one by one.

1. Descent: from the untouched model, the change that costs least loss for what it saves, until the budget is met. A
   change is measured again only when its last known cost could still be the least (lazy evaluation: damages mostly grow
   as more is taken away, so an old one is a lower bound).
2. Exchange: all changes of one layer around the best plan are measured together, and pairs of them that stay within the
   budget are tried in the order of what they promise, as long as plans get better.

Where every plan at the budget can be measured within the limit, all of them are. All of it shares the beginnings of
plans (`passes`), and stays within a number of naive passes over the layers, each of 1 + layers x mixers forwards.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerboost.damage import damages, weighted
from layerboost.errors import PlanError
from layerboost.layer_plan import KEEP, LayerPlan, full_plan
from layerboost.passes import PerSequence, Scorer, count_layers
from layerboost.plan.budget import Budget
from layerboost.progress import Advance

Plan = tuple[LayerPlan, ...]
_AT_ONCE = 6  # changes and pairs that are measured together
_BETTER = 1e-6  # nats


@dataclass
class Search:
    """Finds the plan of least measured loss.

    Attributes:
        candidates: per layer, what may take the place of its attention.
        single: per layer and candidate, loss of that change alone, as measured before.
        most_forwards: passes of the data through the whole model that may be spent.
        known: every plan that was measured, and its loss.
    """

    scorer: Scorer
    candidates: list[list[LayerPlan]]
    single: Sequence[Sequence[float]]
    weights: dict[str, float]
    budget: Budget
    most_forwards: float
    advance: Advance = lambda *_, **__: None
    known: dict[Plan, float] = field(default_factory=dict)
    path: list[Plan] = field(default_factory=list)
    _base: PerSequence | None = None
    spent: float = 0.0  # the same in every process, where several share the plans

    @property
    def naive_forwards(self) -> int:
        return 1 + sum(map(len, self.candidates))

    @property
    def start(self) -> Plan:
        return tuple(full_plan(len(self.candidates)))

    def losses(self, plans: Sequence[Plan]) -> list[float]:
        """Measured loss of whole plans, as many as the limit allows; the others count as infinitely bad."""
        if self._base is None:
            self._base = self.scorer([self.start])[0]
            self.known[self.start] = 0.0
            self._spend(1.0)
        unknown = [plan for plan in dict.fromkeys(plans) if plan not in self.known]
        while unknown and self.spent + self.price(unknown) > self.most_forwards:
            unknown.pop()
        if unknown:
            self._spend(self.price(unknown))
            for plan, scores in zip(unknown, self.scorer(unknown), strict=True):
                self.known[plan] = weighted(damages(self._base, scores), self.weights)
        return [self.known.get(plan, math.inf) for plan in plans]

    def price(self, plans: Sequence[Plan]) -> float:
        return count_layers(plans) / len(self.candidates)

    def _spend(self, forwards: float) -> None:
        self.spent += forwards
        self.advance(0, note=f"{self.spent / self.naive_forwards:.1f} naive passes")

    def run(self, starts: Sequence[Plan], max_loss: float | None = None) -> Plan:
        """The best plan that meets the budget; or, where `max_loss` is all there is, the smallest cache within it.

        Args:
            starts: plans of other planners.

        Raises:
            PlanError: no plan was found that meets the limits.
        """
        if max_loss is not None and self.budget.met(list(self.start)):
            return self.save(max_loss, starts)
        best = self._search(starts)
        if best is None:
            raise PlanError(
                f"{self.budget.describe()} cannot be met with the candidates that were measured; ask for less, measure "
                "narrower windows, or lower at_least"
            )
        if max_loss is not None and self.known[best] > max_loss:
            raise PlanError(
                f"{self.budget.describe()} cannot be met together: the least measured loss is {self.known[best]:.4f}; "
                "allow more loss or ask for less"
            )
        return best

    def save(self, max_loss: float, starts: Sequence[Plan]) -> Plan:
        """Down from the untouched model, and from other planners' plans, as far as the measured loss allows."""
        self.losses(starts)
        plan = self.start
        stale = self._stale()
        self.path = [plan]
        while True:
            share = self.budget.kv_share(list(plan))
            saved = {
                place: share - self.budget.kv_share(list(_with(plan, dict([place]))))
                for place in stale
                if not place[1].alike(plan[place[0]])
            }
            chosen = self._cheapest(plan, self.known[plan], stale, {p: s for p, s in saved.items() if s > 0})
            if chosen is None or self.losses([_with(plan, dict([chosen]))])[0] > max_loss:
                break
            plan = _with(plan, dict([chosen]))
            self.path.append(plan)
        within = [found for found, loss in self.known.items() if loss <= max_loss]
        return min(within, key=lambda found: (self.budget.kv_share(list(found)), self.known[found]))

    def _search(self, starts: Sequence[Plan]) -> Plan | None:
        every = self._every_plan()
        if every and self.spent + 1 + self.price(every) <= self.most_forwards:
            self.losses(every)
            return self.best()
        met = [plan for plan in (self.descend(), *starts) if plan is not None and self.budget.met(list(plan))]
        if met and min(self.losses(met)) == math.inf:  # the limit is used up; what comes out is measured all the same
            self.most_forwards = self.spent + self.price(met[-1:])
            self.losses(met[-1:])
        for plan in sorted(met, key=lambda plan: self.known.get(plan, math.inf)):
            self.exchange(plan)
        return self.best()

    def best(self) -> Plan | None:
        met = [plan for plan in self.known if self.budget.met(list(plan))]
        return min(met, key=lambda plan: self.known[plan], default=None)

    def _stale(self) -> dict[tuple[int, LayerPlan], float]:
        return {(i, c): self.single[i][n] for i, own in enumerate(self.candidates) for n, c in enumerate(own)}

    def _every_plan(self, most: int = 3_000) -> list[Plan]:
        choices = [[KEEP, *own] for own in self.candidates]
        if math.prod(map(len, choices)) > most:
            return []
        found = [plan for plan in itertools.product(*choices) if self.budget.met(list(plan))]
        # what only gives up more than another plan does cannot be better but by noise
        return [plan for plan in found if not any(self.budget.met(list(kept)) for kept in _one_kept(plan))]

    def descend(self) -> Plan | None:
        """Step by step down from the untouched model; None if no step leads to the budget."""
        plan, loss = self.start, 0.0
        stale = self._stale()
        self.path = [plan]
        excess = self.budget.excess(list(plan))
        while not self.budget.met(list(plan)):
            saved = {}
            for i, candidate in stale:
                step = _with(plan, {i: candidate})
                gain = excess - self.budget.excess(list(step))
                if gain > 0:
                    saved[i, candidate] = gain
            chosen = self._cheapest(plan, loss, stale, saved)
            if chosen is None:
                return None
            plan = _with(plan, {chosen[0]: chosen[1]})
            loss = self.losses([plan])[0]
            excess = self.budget.excess(list(plan))
            self.path.append(plan)
        return plan

    def _cheapest(
        self,
        plan: Plan,
        loss: float,
        stale: dict[tuple[int, LayerPlan], float],
        saved: dict[tuple[int, LayerPlan], float],
    ) -> tuple[int, LayerPlan] | None:
        """The change that costs least loss for what it saves: measured until none that was not could be cheaper."""
        fresh: set[tuple[int, LayerPlan]] = set()

        def price(place: tuple[int, LayerPlan]) -> float:
            return max(stale[place], _BETTER) / saved[place]

        while saved:
            order = sorted(saved, key=price)
            if order[0] in fresh:
                return order[0]
            asked = [place for place in order if place not in fresh][:_AT_ONCE]
            for place, found in zip(
                asked, self.losses([_with(plan, {place[0]: place[1]}) for place in asked]), strict=True
            ):
                fresh.add(place)
                if math.isfinite(found):  # else the limit is reached, and the old value has to do
                    stale[place] = found - loss
        return None

    def exchange(self, plan: Plan) -> Plan:
        """Change one or two layers at a time while that makes the plan better and stays within the budget."""
        while self.spent < self.most_forwards:
            loss = self.losses([plan])[0]
            around = [(i, c) for i, own in enumerate(self.candidates) for c in (KEEP, *own) if not c.alike(plan[i])]
            found = self.losses([_with(plan, {i: c}) for i, c in around])
            rise = {place: value - loss for place, value in zip(around, found, strict=True) if math.isfinite(value)}
            better = self._improve(plan, loss, rise)
            if better is None:
                break
            plan = better
        return plan

    def _improve(self, plan: Plan, loss: float, rise: dict[tuple[int, LayerPlan], float]) -> Plan | None:
        """The first group of promising changes with a better plan in it."""
        singles = [place for place in rise if rise[place] < -_BETTER and self._met(plan, place)]
        if singles:
            return _with(plan, dict([min(singles, key=lambda place: rise[place])]))
        pairs = sorted(
            ((a, b) for a, b in itertools.combinations(rise, 2) if a[0] != b[0]),
            key=lambda pair: rise[pair[0]] + rise[pair[1]],
        )
        promising = (pair for pair in pairs if self._met(plan, *pair))
        while self.spent < self.most_forwards:
            some = [_with(plan, dict(pair)) for pair in itertools.islice(promising, _AT_ONCE)]
            if not some:
                return None
            found = self.losses(some)
            if min(found) < loss - _BETTER:
                return some[found.index(min(found))]
        return None

    def _met(self, plan: Plan, *changes: tuple[int, LayerPlan]) -> bool:
        return self.budget.met(list(_with(plan, dict(changes))))


def _with(plan: Plan, changes: dict[int, LayerPlan]) -> Plan:
    return tuple(changes.get(i, layer) for i, layer in enumerate(plan))


def _one_kept(plan: Plan) -> list[Plan]:
    return [_with(plan, {i: KEEP}) for i, layer in enumerate(plan) if not layer.alike(KEEP)]
