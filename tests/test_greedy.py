"""The joint planner: against trying everything on tables with interactions, its limit, and whole plans as measured."""

import itertools
import math

import numpy as np
import pytest

from layerboost import analyze, plan
from layerboost.artifacts import KVShape, ModelRecord
from layerboost.damage import candidate_loss, damages, weighted
from layerboost.errors import PlanError
from layerboost.layer_plan import KEEP
from layerboost.passes import Scorer, count_layers
from layerboost.plan import _MORE_DATA, _data, _model, _more_data
from layerboost.plan.budget import Budget
from layerboost.plan.greedy import Search
from tests.tiny import NONE, window

TRIED = [NONE, window(4)]
WEIGHTS = {"text_kl": 1.0}
FEW = plan.Measuring(texts=2, answers=2, length=64)


class MadeUp:
    """A model whose loss is a sum over layers, and more for every two neighbours that are both changed."""

    def __init__(self, layers, seed, together=1.0):
        rng = np.random.default_rng(seed)
        self.single = np.sort(rng.gamma(1.0, 0.3, (layers, 2)))[:, ::-1]
        self.pairs = rng.gamma(0.5, 0.3, (layers, layers)) * together
        self.measured, self.forwards, self.calls = [], 0.0, 0

    def loss(self, layers):
        changed = [i for i, layer in enumerate(layers) if not layer.alike(KEEP)]
        alone = sum(self.single[i, TRIED.index(layers[i])] for i in changed)
        return alone + sum(self.pairs[i, j] for i, j in itertools.combinations(changed, 2))

    def __call__(self, plans):
        self.calls += 1
        self.measured += plans
        self.forwards += count_layers(plans) / len(plans[0])
        zero = np.zeros(2)
        return [{"text.kl": np.full(2, self.loss(p)), "text.nll": zero, "text.hit": zero} for p in plans]

    def search(self, budget, naive_passes=5.0):
        count = len(self.single)
        return Search(self, [TRIED] * count, self.single.tolist(), WEIGHTS, budget, naive_passes * (1 + 2 * count))


def budget(layers, **config):
    model = ModelRecord(
        name="made up", digest="0" * 64, num_layers=layers, native_windows=[None] * layers, context=128,
        kv_shape=KVShape(num_key_value_heads=2, head_dim=8, bytes_per_value=2),
    )  # fmt: skip
    return Budget(model, plan.Config(**{"context": 128} | config))


def optimum(model, limits):
    every = itertools.product([KEEP, *TRIED], repeat=len(model.single))
    return min(model.loss(layers) for layers in every if limits.met(list(layers)))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("reduction", [0.3, 0.5, 0.8])
def test_the_best_plan_is_found(seed, reduction):
    model, limits = MadeUp(5, seed), budget(5, kv_reduction=reduction)
    search = model.search(limits)
    found = search.run([])
    assert limits.met(list(found))
    assert search.known[found] == pytest.approx(model.loss(found))
    assert model.loss(found) == pytest.approx(optimum(model, limits))
    assert model.forwards == pytest.approx(search.spent)
    assert search.spent <= search.most_forwards


def test_the_best_plan_is_mostly_found_where_not_all_can_be_measured():
    worse = []
    for seed in range(8):
        model, limits = MadeUp(7, seed), budget(7, kv_reduction=0.5)
        search = model.search(limits)
        search._every_plan = list
        found = search.run([])
        assert limits.met(list(found))
        assert search.spent <= search.most_forwards
        assert len(model.measured) < 3**7 / 10
        worse.append(model.loss(found) / optimum(model, limits) - 1)
    assert sum(gap < 1e-6 for gap in worse) >= 5
    assert max(worse) < 0.2


@pytest.mark.parametrize("naive_passes", [0.01, 0.1, 0.5, 1.0, 3.0])
def test_no_more_than_the_limit_is_spent(naive_passes):
    limits = budget(8, kv_reduction=0.5)
    for seed in range(4):
        model = MadeUp(8, seed)
        search = model.search(limits, naive_passes)
        found = search.run([])
        assert limits.met(list(found))
        assert search.known[found] == pytest.approx(model.loss(found))
        assert model.forwards == pytest.approx(search.spent)
        assert model.forwards <= naive_passes * 17 + 2  # the untouched model, and the plan that comes out
        assert len(set(model.measured)) == len(model.measured)


def test_lazy_descent_takes_the_steps_of_an_eager_one_and_measures_less():
    limits = budget(10, kv_reduction=0.6)
    for seed in range(4):
        model = MadeUp(10, seed, together=0.2)
        search = Search(model, [[NONE]] * 10, model.single[:, :1].tolist(), WEIGHTS, limits, 1_000.0)
        found = search.descend()
        now, eager = search.start, 0
        while not limits.met(list(now)):
            steps = [(*now[:i], NONE, *now[i + 1 :]) for i, layer in enumerate(now) if layer.alike(KEEP)]
            eager += len(steps)
            now = min(steps, key=model.loss)
        assert found == now
        assert len(model.measured) < eager


def test_lazy_descent_narrows_a_layer_in_steps_as_an_eager_one_does():
    """What a layer's window cost already is no part of what its removal costs on top."""
    limits = budget(8, kv_reduction=0.8, context=8)  # of which a window keeps a good part
    for seed in range(8):
        model = MadeUp(8, seed, together=0.2)
        search = Search(model, [TRIED] * 8, model.single.tolist(), WEIGHTS, limits, 1_000.0)
        now = search.start
        path = [now]
        while not limits.met(list(now)):
            saved = {}
            for i, candidate in itertools.product(range(8), TRIED):
                step = (*now[:i], candidate, *now[i + 1 :])
                gain = limits.excess(list(now)) - limits.excess(list(step))
                if gain > 0:
                    saved[step] = gain
            losses = {step: max(model.loss(step) - model.loss(now), 1e-6) / gain for step, gain in saved.items()}
            now = min(losses, key=losses.get)
            path.append(now)
        assert search.descend() == now
        assert search.path == path


def test_a_start_of_another_planner_is_never_made_worse():
    model, limits = MadeUp(8, 3), budget(8, kv_reduction=0.5)
    for kept in itertools.combinations(range(8), 4):
        start = tuple(KEEP if i in kept else NONE for i in range(8))
        search = model.search(limits, 2.0)
        assert model.loss(search.run([start])) <= model.loss(start) + 1e-9


@pytest.mark.parametrize("most", [0.0, 0.2, 0.6, 1.5, 100.0])
def test_as_much_is_saved_as_the_loss_allows(most):
    for seed in range(4):
        model, limits = MadeUp(5, seed), budget(5, max_loss=most)
        found = model.search(limits, 1_000.0).run([], most)
        assert model.loss(found) <= most
        every = list(itertools.product([KEEP, *TRIED], repeat=5))
        least = min(limits.kv_share(list(p)) for p in every if model.loss(p) <= most)
        assert least <= limits.kv_share(list(found)) <= least + 0.2 + 1e-9  # a layer more at most


def test_a_loss_budget_keeps_the_others():
    model, limits = MadeUp(5, 0), budget(5, max_loss=100.0, at_least=plan.AtLeast(full_attention=2))
    found = model.search(limits).run([], 100.0)
    assert limits.met(list(found))


def test_what_cannot_be_met():
    model = MadeUp(4, 0)
    with pytest.raises(PlanError, match="cannot be met with the candidates"):
        model.search(budget(4, kv_reduction=0.9, at_least=plan.AtLeast(full_attention=2))).run([])
    search = model.search(budget(4, kv_reduction=0.9, max_loss=0.001))
    with pytest.raises(PlanError, match="cannot be met together: the least measured loss"):
        search.check(search.run([], 0.001), 0.001)


class TestOnAModel:
    @pytest.fixture(scope="class")
    def found(self, tiny):
        return analyze.run(tiny, analyze.Config(windows=[4, 16], texts=2, answers=2, length=64))

    @staticmethod
    def config(**more):
        return plan.Config(**({"measuring": FEW, "kv_reduction": 0.5, "context": 128} | more))

    def test_the_loss_is_that_of_the_whole_plan(self, tiny, found):
        config = self.config()
        made = plan.run(found, config, model=tiny)
        model = _model(config, tiny)
        own = Scorer(model, _data(model, found, config, tiny))
        more = Scorer(model, _more_data(model, found, config, tiny))
        assert more.tokens == _MORE_DATA * own.tokens

        def measured(layers, scorer):
            base, scores = scorer([[KEEP] * 4, layers])
            return weighted(damages(base, scores), config.weights)

        # on the data of the search and, for those that were best there, on three times as much
        wanted = (measured(made.layers, own) + _MORE_DATA * measured(made.layers, more)) / (1 + _MORE_DATA)
        assert made.measured["loss"] == pytest.approx(wanted, abs=1e-5)
        assert measured(made.layers, more) != pytest.approx(measured(made.layers, own), abs=1e-4)
        assert made.predicted["kv_share"] <= 0.5
        assert made.measured["cost"]["forwards"] <= config.measuring.naive_passes * 13 + 1
        chosen = [point for point in made.front if point.chosen]
        assert len(chosen) == 1
        assert chosen[0].measured
        assert chosen[0].loss == made.measured["loss"]
        assert all(layer.reason for layer in made.layers)

    @pytest.mark.parametrize("naive_passes", [0.1, 1.0, 5.0])
    def test_forwards_are_counted_and_kept_within_the_limit(self, tiny, found, naive_passes):
        config = self.config()
        limits = Budget(found.model, config)
        model = _model(config, tiny)
        scorer = Scorer(model, _data(model, found, config, tiny))
        runs = []
        for layer in scorer.model.decoder_layers:
            layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        candidates = [[c.plan for c in own] for own in found.layers]
        single = [[candidate_loss(c, config.weights) for c in own] for own in found.layers]
        search = Search(scorer, candidates, single, config.weights, limits, naive_passes * 13)
        layers = search.run([])
        assert limits.met(list(layers))
        assert math.isfinite(search.known[layers])
        assert len(runs) / (4 * len(scorer.batches)) == pytest.approx(scorer.forwards)
        assert scorer.forwards == pytest.approx(search.spent)
        assert scorer.forwards <= max(naive_passes * 13, 1) + 1

    def test_through_the_planner(self, tiny, found):
        small = self.config(measuring=FEW.model_copy(update={"naive_passes": 0.1}))
        made = plan.run(found, small, model=tiny)
        assert made.measured["loss"] > 0
        assert made.measured["cost"]["forwards"] <= 2.3
        bound = self.config(kv_reduction=None, max_loss=0.5)
        saved = plan.run(found, bound, model=tiny)
        assert saved.measured["loss"] <= 0.5
        with pytest.raises(PlanError, match="cannot be met"):
            plan.run(found, self.config(kv_reduction=0.9, at_least=plan.AtLeast(full_attention=2)), model=tiny)

    def test_of_the_best_the_one_that_other_data_confirms(self, tiny, found, monkeypatch):
        """What flatters one plan on the search's data does not on more of it."""
        config = self.config()
        usual = plan.run(found, config, model=tiny)
        real = plan.damages

        def spoilt(base, scores):
            lost = real(base, scores)
            return {metric: values + 10 * (scores["text.nll"] == flattered).all() for metric, values in lost.items()}

        model = _model(config, tiny)
        flattered = Scorer(model, _more_data(model, found, config, tiny))([usual.layers])[0]["text.nll"]
        monkeypatch.setattr(plan, "damages", spoilt)
        other = plan.run(found, config, model=tiny)
        assert [p.label for p in other.layers] != [p.label for p in usual.layers]

    def test_other_data_is_none_that_the_search_has_seen(self, tiny, found, tmp_path):
        model, text = _model(self.config(), tiny), tmp_path / "text.txt"
        text.write_text(" ".join(str(n * n) for n in range(2_000)))
        few = FEW.model_copy(update={"texts": 40, "length": 64})
        for config in (self.config(), self.config(text=text, measuring=few)):
            seen, other = _data(model, found, config, tiny), _more_data(model, found, config, tiny)
            assert set(seen) == set(other)
            for kind in seen:
                rows = [tuple(row) for data in (seen, other) for row in data[kind].tokens.tolist()]
                assert len(set(rows)) == len(rows)
        assert len(other["text"]) == 80  # of 128 rows, 40 are seen, and 8 are no whole helping

    def test_text_that_the_search_has_seen_all_of(self, tiny, found, tmp_path, capsys, monkeypatch):
        text = tmp_path / "text.txt"
        text.write_text(" ".join(str(n * n) for n in range(1_500)))
        few = FEW.model_copy(update={"texts": 400, "length": 64, "naive_passes": 10})
        config = self.config(text=text, measuring=few)
        made = plan.run(found, config, model=tiny)
        assert "no text that the search has not seen" in capsys.readouterr().err
        model = _model(config, tiny)
        base, scores = Scorer(model, _data(model, found, config, tiny))([[KEEP] * 4, made.layers])
        assert made.measured["loss"] == pytest.approx(weighted(damages(base, scores), config.weights), abs=1e-6)

    def test_the_limit_on_loss_is_of_the_best_on_more_data(self, tiny, found):
        best = plan.run(found, self.config(), model=tiny).measured["loss"]
        made = plan.run(found, self.config(max_loss=best + 1e-5), model=tiny)
        assert made.measured["loss"] == best
        with pytest.raises(PlanError, match="the least measured loss is"):
            plan.run(found, self.config(max_loss=best - 1e-3), model=tiny)

    def test_what_is_not_measured_here_has_no_weight(self, tiny, found):
        for planner in ("greedy", "gates"):
            with pytest.raises(PlanError, match=rf"{planner} measures text_kl, .*, not benchmarks"):
                plan.run(found, self.config(planner=planner, weights={"benchmarks": 1.0}), model=tiny)

    def test_another_model_is_refused(self, checkpoints, found):
        with pytest.raises(PlanError, match=r"was measured on qwen3, which .*llama is not"):
            plan.run(found, self.config(), model=checkpoints["llama"])
