"""The joint planner: plans are measured whole, because replacements hurt more together than one by one.

1. Descent: from the untouched model, the change that costs least loss for what it saves, until the budget is met. A
   change is measured again only when its last known cost could still be the least (lazy evaluation: damages mostly grow
   as more is taken away, so an old one is a lower bound).
2. Exchange: all changes of one layer around the best plan are measured together, and pairs of them that stay within the
   budget are tried in the order of what they promise; then around the next best, until that does not help any more.

Where every plan at the budget can be measured within the limit, all of them are. All of it shares the beginnings of
plans (`passes`), and stays within a number of naive passes over the layers, each of 1 + layers x mixers forwards.
"""

import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from layerboost.damage import damages, weighted
from layerboost.errors import PlanError
from layerboost.layer_plan import KEEP, LayerPlan, full_plan
from layerboost.passes import PerSequence, Scorer, count_layers
from layerboost.plan.budget import Budget
from layerboost.progress import Advance, unheard

Plan = tuple[LayerPlan, ...]
Place = tuple[int, LayerPlan]  # a change of one layer
_AT_ONCE = 6  # changes and pairs that are measured together
_PAIRS = 36  # most that are measured around one plan
_PATIENCE = 3  # plans that are looked around in vain before the search ends
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
    advance: Advance = unheard
    known: dict[Plan, float] = field(default_factory=dict)
    path: list[Plan] = field(default_factory=list)
    _base: PerSequence | None = None
    spent: float = 0.0  # the same in every process, where several share the plans
    told: int = 0  # of that, what `advance` has heard of

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
        self.advance(int(self.spent) - self.told, note=f"{self.spent / self.naive_forwards:.1f} naive passes")
        self.told = int(self.spent)

    def run(self, starts: Sequence[Plan], max_loss: float | None = None) -> Plan:
        """The best plan that meets the budget; or, where `max_loss` is all there is, the smallest cache within it.

        Args:
            starts: plans of other planners.

        Raises:
            PlanError: no plan was found that meets the limits; of `max_loss` beside others, `check` says.
        """
        if max_loss is not None and self.budget.saves:
            return self._save(max_loss, starts)
        best = self._search(starts)
        if best is None:
            raise PlanError(self.budget.unmet())
        return best

    def check(self, best: Plan, max_loss: float | None) -> None:
        """Raises PlanError if the best plan loses more than is allowed."""
        if max_loss is not None and self.known[best] > max_loss:
            raise PlanError(
                f"{self.budget.describe()} cannot be met together: the least measured loss is {self.known[best]:.4f}; "
                "allow more loss or ask for less"
            )

    def _save(self, max_loss: float, starts: Sequence[Plan]) -> Plan:
        """Down as far as the measured loss allows, from the first plan that meets the other limits."""
        self.losses(starts)
        plan = self.descend()
        stale = self._stale()
        while plan is not None and self.losses([plan])[0] <= max_loss:
            share = self.budget.kv_share(list(plan))
            saved = {place: share - self.budget.kv_share(list(_with(plan, dict([place])))) for place in stale}
            saved = {place: gain for place, gain in saved.items() if gain > 0 and self._met(plan, place)}
            chosen = self._cheapest(plan, self.known[plan], stale, saved)
            if chosen is None:
                break
            plan = self._step(plan, chosen, stale)
        within = [found for found, loss in self.known.items() if loss <= max_loss and self.budget.met(list(found))]
        if not within:
            raise PlanError(f"{self.budget.describe()} cannot be met together; allow more loss")
        return min(within, key=lambda found: (self.budget.kv_share(list(found)), self.known[found]))

    def _search(self, starts: Sequence[Plan]) -> Plan | None:
        every = self._every_plan()
        if every and self.spent + 1 + self.price(every) <= self.most_forwards:
            self.losses(every)
            return self.best()
        self.losses(starts)  # first, while there is something left to spend
        met = [plan for plan in (self.descend(), *starts) if plan is not None and self.budget.met(list(plan))]
        if met and min(self.losses(met)) == math.inf:  # the limit is used up; what comes out is measured all the same
            self.most_forwards = self.spent + self.price(met[-1:])
            self.losses(met[-1:])
        best, looked_around, in_vain = self.best(), set[Plan](), 0
        while best is not None and in_vain <= _PATIENCE:
            plan = self.best(without=looked_around)
            if plan is None or not self._look_around(plan):
                break
            looked_around.add(plan)
            before, best = best, self.best()
            in_vain = in_vain + 1 if best == before else 0
        return best

    def best(self, without: Container[Plan] = ()) -> Plan | None:
        """Of the plans that were measured and meet the budget."""
        met = [plan for plan in self.known if plan not in without and self.budget.met(list(plan))]
        return min(met, key=lambda plan: self.known[plan], default=None)

    def _stale(self) -> dict[Place, float]:
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
            plan = self._step(plan, chosen, stale)
            loss = self.losses([plan])[0]
            excess = self.budget.excess(list(plan))
        return plan

    def _step(self, plan: Plan, chosen: Place, stale: dict[Place, float]) -> Plan:
        """One layer changed; what its other candidates would cost on top is less by what it cost."""
        layer, rise = chosen[0], stale[chosen]
        for place in stale:
            if place[0] == layer:
                stale[place] -= rise
        self.path.append(_with(plan, dict([chosen])))
        return self.path[-1]

    def _cheapest(
        self,
        plan: Plan,
        loss: float,
        stale: dict[Place, float],
        saved: dict[Place, float],
    ) -> Place | None:
        """The change that costs least loss for what it saves: measured until none that was not could be cheaper."""
        fresh: set[Place] = set()

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

    def _look_around(self, plan: Plan) -> bool:
        """Measure all changes of one layer around a plan, and the pairs of them that promise most within the budget,
        until one of those is better than the plan; False where the limit does not allow any of it."""
        loss = self.known[plan]
        around = [(i, c) for i, own in enumerate(self.candidates) for c in (KEEP, *own) if not c.alike(plan[i])]
        found = self.losses([_with(plan, dict([place])) for place in around])
        rise = {place: value - loss for place, value in zip(around, found, strict=True) if math.isfinite(value)}
        pairs = sorted(
            ((a, b) for a, b in itertools.combinations(rise, 2) if a[0] != b[0]),
            key=lambda pair: rise[pair[0]] + rise[pair[1]],
        )
        promising = (pair for pair in pairs if self._met(plan, *pair))
        for _ in range(_PAIRS // _AT_ONCE):
            some = [_with(plan, dict(pair)) for pair in itertools.islice(promising, _AT_ONCE)]
            if not some or min(self.losses(some)) < loss - _BETTER or self.known.keys().isdisjoint(some):
                break
        return bool(rise)

    def _met(self, plan: Plan, *changes: tuple[int, LayerPlan]) -> bool:
        return self.budget.met(list(_with(plan, dict(changes))))


def _with(plan: Plan, changes: dict[int, LayerPlan]) -> Plan:
    return tuple(changes.get(i, layer) for i, layer in enumerate(plan))


def _one_kept(plan: Plan) -> list[Plan]:
    return [_with(plan, {i: KEEP}) for i, layer in enumerate(plan) if not layer.alike(KEEP)]
