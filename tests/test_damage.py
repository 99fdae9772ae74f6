"""Damage as one number per layer, and the knapsack over it, against arithmetic by hand and trying everything."""

import itertools

import numpy as np
import pytest
import torch

from layerboost import analyze
from layerboost.analyze import plan_stability
from layerboost.artifacts import Candidate, Damage, KVShape, ModelRecord, Sensitivity
from layerboost.damage import (
    candidate_loss,
    damages,
    differ,
    levels,
    predicted_loss,
    ranking,
    reason,
    resampled_losses,
    weighted,
)
from layerboost.errors import PlanError
from layerboost.knapsack import hull, options, solve
from layerboost.layer_plan import LayerPlan, full_plan
from layerboost.scoring import TokenScores
from tests.tiny import FULL, NONE, linear, window

ONE = {"text_kl": 1.0}
BOTH = {"text_kl": 0.6, "recall_kl": 0.4}


def damage(values):
    values = np.atleast_1d(values)
    return Damage(mean=float(values.mean()), low=float(values.min()), high=float(values.max()),
                  per_sequence=values.tolist())  # fmt: skip


def sensitivity(layers, native=None, context=128):
    """From, per layer, values per sequence by metric of each mixer; bare values are those of `text_kl`."""
    model = ModelRecord(
        name="made up", digest="0" * 64, num_layers=len(layers), native_windows=native or [None] * len(layers),
        context=context, kv_shape=KVShape(num_key_value_heads=2, head_dim=8, bytes_per_value=2),
    )  # fmt: skip
    found = [
        [
            Candidate.of(plan, {m: damage(v) for m, v in (own if isinstance(own, dict) else {"text_kl": own}).items()})
            for plan, own in layer.items()
        ]
        for layer in layers
    ]
    return Sensitivity(model=model, layers=found)


def noise(count, scale=1.0, seed=0):
    """Values whose mean is nought."""
    values = np.random.default_rng(seed).normal(0, scale, count)
    return values - values.mean()


def test_candidates_weigh_their_metrics():
    found = sensitivity([{NONE: {"text_kl": [1.0, 3.0], "recall_kl": [0.5, 0.5]}, window(4): {"text_kl": [-1.0]}}])
    removal, narrow = found.layers[0]
    assert candidate_loss(removal, BOTH) == pytest.approx(0.6 * 2 + 0.4 * 0.5)
    assert candidate_loss(narrow, ONE) == 0  # what seems to do good is harmless
    assert weighted({"text_kl": np.array([1.0, 3.0]), "recall_kl": np.array([0.5])}, BOTH) == pytest.approx(1.4)
    assert weighted({"text_kl": np.array([-1.0])}, ONE) == -1


def test_a_metric_that_was_not_measured():
    found = sensitivity([{NONE: {"text_kl": [1.0, 2.0], "copy": [0.0, 1.0]}}])
    message = "damage answer_kl was not measured; measured are text_kl, copy"
    for ask in (
        lambda weights: candidate_loss(found.layers[0][0], weights),
        lambda weights: predicted_loss(found, [NONE], weights),
        lambda weights: resampled_losses(found, weights),
        lambda weights: ranking(found, weights, 0.95),
        lambda weights: options(found, 128, weights),
        lambda weights: plan_stability(found, weights, 0.5),
    ):
        with pytest.raises(PlanError, match=message):
            ask({"text_kl": 0.5, "answer_kl": 0.5})
    with pytest.raises(PlanError, match="measured are none"):
        candidate_loss(Candidate.of(NONE, {}), ONE)


def test_damages_of_layers_add_up():
    found = sensitivity([{NONE: [1.0], window(4): [0.25]}, {NONE: [2.0]}, {NONE: [-4.0]}])
    assert predicted_loss(found, [FULL, FULL, FULL], ONE) == 0
    assert predicted_loss(found, [window(4), NONE, NONE], ONE) == pytest.approx(2.25)
    assert predicted_loss(found, [LayerPlan("no_attention", reason="why"), FULL, FULL], ONE) == pytest.approx(1)
    assert predicted_loss(found, [FULL, window(4), FULL], ONE) is None


def test_resamples_are_paired():
    """The same sequences are drawn for every layer and mixer, so what they share cancels."""
    hard = noise(20) + 3
    found = sensitivity([{NONE: hard, window(4): hard}, {NONE: hard}, {NONE: hard + 0.25}, {}])
    losses = resampled_losses(found, ONE)
    assert [one.shape for one in losses] == [(2, 1_000), (1, 1_000), (1, 1_000), (0, 1_000)]
    assert np.array_equal(losses[0][0], losses[1][0])
    assert np.array_equal(losses[0][0], losses[0][1])
    np.testing.assert_allclose(losses[2][0] - losses[1][0], 0.25)
    assert losses[0][0].mean() == pytest.approx(3, abs=0.03)
    assert losses[0][0].std() == pytest.approx(hard.std() / np.sqrt(20), rel=0.1)
    assert all(np.array_equal(a, b) for a, b in zip(losses, resampled_losses(found, ONE), strict=True))


def test_resamples_of_several_metrics():
    text, recall = noise(8) + 1, noise(30, seed=1) + 2
    both = sensitivity([{NONE: {"text_kl": text, "recall_kl": recall}}, {NONE: {"text_kl": text, "recall_kl": text}}])
    with pytest.raises(PlanError, match="damage recall_kl has no value per sequence that could be resampled"):
        resampled_losses(both, BOTH)  # not the same sequences in every layer
    own = both.model_copy(update={"layers": both.layers[:1]})
    found = resampled_losses(own, BOTH, 4_000)[0][0]
    assert found.mean() == pytest.approx(0.6 * 1 + 0.4 * 2, abs=0.02)
    assert found.std() == pytest.approx(np.hypot(0.6 * text.std() / 8**0.5, 0.4 * recall.std() / 30**0.5), rel=0.06)
    kept_none = Candidate.of(NONE, {"text_kl": Damage(mean=1, low=1, high=1)})
    with pytest.raises(PlanError, match="damage text_kl has no value per sequence"):
        resampled_losses(own.model_copy(update={"layers": [[kept_none]]}), ONE)


def test_metrics_of_the_same_sequences_are_resampled_together():
    hard = noise(20) + 3
    for one, other in (("text_kl", "text_nll"), ("recall_kl", "recall_nll"), ("recall_kl@48", "recall_nll@48")):
        found = sensitivity([{NONE: {one: hard, other: hard}}])
        both = resampled_losses(found, {one: 0.5, other: 0.5})[0][0]
        assert both == pytest.approx(resampled_losses(found, {one: 1.0})[0][0])
    apart = sensitivity([{NONE: {"text_kl": hard, "recall_kl": hard}}])  # of other sequences
    both = resampled_losses(apart, {"text_kl": 0.5, "recall_kl": 0.5})[0][0]
    assert both.std() == pytest.approx(hard.std() / 20**0.5 / 2**0.5, rel=0.1)


def test_stability_counts_the_cache_as_plan_does():
    """At 100,000 tokens a window of 4,000 is nearly nothing, at 4,096 nearly everything."""
    found = sensitivity([{NONE: [3.0, 3.1], window(4_000): [0.1, 0.1]}, {NONE: [1.0, 1.1], window(4_000): [0.1, 0.1]}])
    long = found.model_copy(update={"model": found.model.model_copy(update={"context": 100_000})})
    chosen = []
    for own in (long, long.model_copy(update={"model": long.model.model_copy(update={"context": 4_096})})):
        with pytest.MonkeyPatch.context() as patch:
            real = analyze.solve
            patch.setattr(analyze, "solve", lambda *a, real=real, **k: chosen.append(real(*a, **k)) or chosen[-1])
            plan_stability(own, ONE, 0.5)
    assert chosen[0] == chosen[-1] == [FULL, NONE]


def test_layers_that_cannot_be_told_apart_are_grouped():
    hard = noise(24)  # far more than layers differ by: only pairs can tell them apart
    found = sensitivity(
        [
            {NONE: hard + 2.0, window(4): hard + 1},
            {NONE: hard + 3.0 + noise(24, 0.01, 1), window(4): hard + 1},
            {NONE: hard + 2.5},
            {NONE: hard + 3.0 + noise(24, 0.01, 2), window(4): hard + 1.5},
        ]
    )
    assert ranking(found, ONE, 0.95) == {"no_attention": [[1, 3], [2], [0]], "sliding_attention 4": [[3], [0, 1]]}


def test_more_confidence_tells_less_apart():
    found = sensitivity([{NONE: np.full(30, 1.0)}, {NONE: 1 + 0.33 + noise(30)}])  # about 1.8 standard errors
    assert ranking(found, ONE, 0.8) == {"no_attention": [[1], [0]]}
    assert ranking(found, ONE, 0.99) == {"no_attention": [[1, 0]]}


def test_differences():
    values = noise(1_000)
    assert not differ(values, values, 0.95)
    assert not differ(values, values + 1e-9, 0.95)  # rounding
    assert differ(values, values + 1e-3, 0.95)
    assert differ(values + 1e-3, values, 0.95)
    assert not differ(values + 0.5, np.zeros(1_000), 0.95)
    few_below = np.arange(1_001) - 60.5  # 6 %
    for sign in (1, -1):
        assert differ(sign * few_below, np.zeros(1_001), 0.85)
        assert not differ(sign * few_below, np.zeros(1_001), 0.9)


def test_reasons_name_the_loss_of_every_mixer():
    own = sensitivity([{NONE: [2.0], window(4): [0.25]}]).layers[0]
    assert reason(FULL, own, ONE) == "replacing it would cost: no_attention 2.000, sliding_attention 4 0.250 nats"
    assert reason(NONE, own, ONE) == "costs 2.000 nats; sliding_attention 4 0.250"
    assert reason(window(9), own, ONE) == "was not measured; no_attention 2.000, sliding_attention 4 0.250"
    assert reason(FULL, [], ONE) == "nothing narrower was measured"


def scores(**kinds):
    """Per kind, rows of NLL, hit, KL and lead of each sequence."""
    return {
        f"{kind.replace('_at_', '@')}.{name}": np.array(values, dtype=float)
        for kind, rows in kinds.items()
        for name, values in zip(("nll", "hit", "kl", "lead"), zip(*rows, strict=True), strict=True)
    }


BASE = {
    "text": [(2, 0.5, 0, 0), (3, 0.25, 0, 0)],
    "copy_at_8": [(1, 1, 0, 1)],
    "needle_at_8": [(2, 0.5, 0, 1)],
    "copy_at_48": [(3, 0.75, 0, 0)],
    "needle_at_48": [(4, 1, 0, 0)],
    "long": [(5, 1, 0, 0)],
    "prompts": [(6, 0.5, 0, 0), (7, 1, 0, 0)],
    "generation": [(0.5, 1, 0, 1), (0.5, 1, 0, 0.75)],
}
CHANGED = {
    "text": [(2.5, 0, 0.1, 0), (2, 0, 0.2, 0)],
    "copy_at_8": [(1.25, 0.5, 0.3, 0)],
    "needle_at_8": [(3, 0.75, 0.4, 0)],
    "copy_at_48": [(4, 0.5, 0.5, 0)],
    "needle_at_48": [(4, 0, 0.6, 0)],
    "long": [(7, 0.25, 0.7, 0)],
    "prompts": [(6.5, 0, 0.8, 0), (7, 1, 0.9, 0)],
    "generation": [(0.7, 0.5, 1, 0.25), (0.7, 0.5, 1, 0.75)],
}


def as_lists(found):
    return {name: values.tolist() for name, values in found.items()}


def test_damages_by_hand():
    found = as_lists(damages(scores(**BASE), scores(**CHANGED)))
    assert found == {
        "text_kl": [0.1, 0.2], "text_nll": [0.5, -1.0],
        "recall_kl": [0.3, 0.4, 0.5, 0.6], "recall_nll": [0.25, 1.0, 1.0, 0.0],
        "recall_kl@8": [0.3, 0.4], "recall_nll@8": [0.25, 1.0],
        "recall_kl@48": [0.5, 0.6], "recall_nll@48": [1.0, 0.0],
        "copy": [0.5, 0.25], "needle": [-0.25, 1.0],
        "answer_kl": [0.7], "answer_nll": [2.0], "answer": [0.75],
        "prompts_kl": [0.8, 0.9], "prompts_nll": [0.5, 0.0], "prompts": [0.5, 0.0],
        "generation": [0.75, 0.0],
    }  # fmt: skip


def test_damages_of_text_and_of_one_distance():
    text = {"text": BASE["text"]}, {"text": CHANGED["text"]}
    assert set(damages(*(scores(**kinds) for kinds in text))) == {"text_kl", "text_nll"}
    plain = [{"copy": kinds["copy_at_8"]} for kinds in (BASE, CHANGED)]
    assert as_lists(damages(*(scores(**kinds) for kinds in plain))) == {
        "recall_kl": [0.3], "recall_nll": [0.25], "copy": [0.5],
    }  # fmt: skip


def test_levels_by_hand():
    assert as_lists(levels(scores(**BASE))) == {
        "text_nll": [2, 3], "recall_nll": [1, 2, 3, 4], "recall_nll@8": [1, 2], "recall_nll@48": [3, 4],
        "copy": [1, 0.75], "needle": [0.5, 1], "answer_nll": [5], "answer": [1], "prompts_nll": [6, 7],
        "prompts": [0.5, 1], "generation": [1, 0.75],
    }  # fmt: skip


def test_lead_is_the_share_before_the_first_miss():
    generator = torch.Generator().manual_seed(0)
    scored = torch.rand(40, 9, generator=generator) < 0.6
    scored[:, 0], scored[3] = False, False  # a sequence in which nothing counts
    hit = torch.rand(int(scored.sum()), generator=generator) < 0.7
    nothing = torch.zeros(len(hit))
    found = TokenScores(nothing, hit.float(), nothing).per_sequence(scored)["lead"]
    left, wanted = iter(hit.tolist()), []
    for row in scored:
        hits = [next(left) for _ in range(int(row.sum()))]
        count = 0
        for one in hits:
            if not one:
                break
            count += 1
        wanted.append(count / len(hits) if hits else 0.0)
    np.testing.assert_allclose(found, wanted)
    assert {0.0, 1.0} < set(wanted)


def test_options_share_out_the_cache():
    mixers = [NONE, window(5), window(200), linear("linear")]
    tried = {plan: [float(n)] for n, plan in enumerate(mixers)}
    found = sensitivity([tried, tried, {NONE: [-1.0]}], native=[None, 40, None])
    own = options(found, 100, ONE)
    assert [(o.layer, o.plan, o.loss) for o in own] == [
        *((layer, plan, loss) for layer in (0, 1) for plan, loss in zip([FULL, *mixers], (0, 0, 1, 2, 3), strict=True)),
        (2, FULL, 0), (2, NONE, 0),
    ]  # fmt: skip
    whole = found.model.kv_bytes(full_plan(3), 100)
    by_layer = [[o for o in own if o.layer == layer] for layer in range(3)]
    for choice in itertools.product(*by_layer):
        wanted = found.model.kv_bytes([o.plan for o in choice], 100) / whole
        assert sum(o.kv for o in choice) == pytest.approx(wanted)
    assert [o.loss for o in options(found, 100, ONE, [[9] * 4, [8] * 4, [7]])] == [0, 9, 9, 9, 9, 0, 8, 8, 8, 8, 0, 7]


def random_options(seed):
    rng = np.random.default_rng(seed)
    mixers = [NONE, window(4), window(16), window(64), linear("linear")]
    layers = [
        {plan: [float(rng.integers(-1, 9)) / 4] for plan in mixers if rng.random() < 0.8}
        for _ in range(int(rng.integers(1, 5)))
    ]
    native = [None if rng.random() < 0.7 else 24 for _ in layers]
    found = sensitivity(layers, native)
    return found, options(found, 128, ONE)


@pytest.mark.parametrize("seed", range(25))
def test_every_plan_of_the_hull_is_optimal_at_its_cost(seed):
    found, choices = random_options(seed)
    count = found.model.num_layers
    by_layer = [[o for o in choices if o.layer == layer] for layer in range(count)]
    every = np.array([(sum(o.kv for o in c), sum(o.loss for o in c)) for c in itertools.product(*by_layer)])
    by_plan = {(o.layer, o.plan): o for o in choices}
    plans = hull(choices, count)
    points = np.array(
        [np.sum([(by_plan[i, p].kv, by_plan[i, p].loss) for i, p in enumerate(plan)], axis=0) for plan in plans]
    )
    for kv, loss in points:
        assert loss == pytest.approx(every[every[:, 0] <= kv + 1e-9, 1].min())
    assert points[0, 1] == pytest.approx(every[:, 1].min())
    assert points[-1, 0] == pytest.approx(every[:, 0].min())
    assert (np.diff(points[:, 0]) < 0).all()
    for before, after in itertools.pairwise(plans):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    # no plan lies below the line through them, so no corner is left out
    line = np.interp(every[:, 0], points[::-1, 0], points[::-1, 1])
    assert (every[:, 1] >= line - 1e-9).all()
    solved = solve(choices, count, minimise="loss", kv=float(points[len(points) // 2, 0]))
    loss = sum(by_plan[i, p].loss for i, p in enumerate(solved))
    assert loss == pytest.approx(points[len(points) // 2, 1], abs=1e-5)


def test_the_hull_begins_with_everything_kept():
    found = sensitivity([{NONE: [1.0], window(4): [0.5]}, {NONE: [0.25]}])
    plans = hull(options(found, 128, ONE), 2)
    assert plans[0] == [FULL, FULL]
    assert plans[1] == [FULL, NONE]
    assert plans[-1] == [NONE, NONE]


def test_clear_plans_are_stable_and_ties_are_not():
    quiet = [noise(30, 0.1, seed) for seed in range(4)]
    clear = sensitivity([{NONE: values + loss} for values, loss in zip(quiet, (5, 0.5, 4, 1), strict=True)])
    assert plan_stability(clear, ONE, 0.5) == 1.0
    loud = [noise(30, 1, seed) for seed in range(4)]
    tied = sensitivity([{NONE: values + 3} for values in loud])
    assert 0 < plan_stability(tied, ONE, 0.5) < 0.5  # one of six plans
    # what all layers share decides nothing
    shared = sensitivity([{NONE: loud[0] * 9 + loss} for loss in (30.5, 30.2, 30.4, 30.3)])
    assert plan_stability(shared, ONE, 0.5) == 1.0
    assert plan_stability(tied, ONE, 1.0) == 1.0  # all have to go
