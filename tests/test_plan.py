"""Planners: the knapsack against trying everything, the paper's tiers, and plans as people edit them."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerboost import plan
from layerboost.artifacts import Candidate, Damage, KVShape, ModelRecord, Plan, Sensitivity, load, save
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan, full_plan
from tests.tiny import FULL, NONE, window

WEIGHTS = {"text_kl": 0.6, "recall_kl": 0.4}


def sensitivity(losses, native=None, windows=(4, 16)):
    """From per-layer losses `[removal, window, window]`, the same for text and recall."""
    count = len(losses)
    tried = [NONE, *map(window, windows)]

    def candidate(layer_plan, loss):
        damage = Damage(mean=loss, low=loss, high=loss)
        return Candidate(
            mixer=layer_plan.mixer, window=layer_plan.window, damage={"text_kl": damage, "recall_kl": damage}
        )

    model = ModelRecord(
        name="made up", digest="0" * 64, num_layers=count, native_windows=native or [None] * count, context=128,
        kv_shape=KVShape(num_key_value_heads=2, head_dim=8, bytes_per_value=2),
    )  # fmt: skip
    return Sensitivity(
        model=model, layers=[[candidate(p, x) for p, x in zip(tried, row, strict=True)] for row in losses]
    )


def brute_force(found, limit_kv=None, limit_loss=None, at_least=None):
    """Least loss, or least KV, over every plan there is; None if there is none."""
    best = None
    options = [[(FULL, 0.0)] + [(c.plan, max(0.0, c.damage["text_kl"].mean)) for c in layer] for layer in found.layers]
    whole = found.model.kv_bytes(full_plan(found.model.num_layers), 128)
    for choice in itertools.product(*options):
        layers, loss = [p for p, _ in choice], sum(x for _, x in choice)
        kv = found.model.kv_bytes(layers, 128) / whole
        if any(sum(p.mixer == mixer for p in layers) < n for mixer, n in (at_least or {}).items()):
            continue
        if (limit_kv is not None and kv > limit_kv + 1e-9) or (limit_loss is not None and loss > limit_loss + 1e-9):
            continue
        value = loss if limit_kv is not None else kv
        best = value if best is None else min(best, value)
    return best


# steps that the solver tells apart: what differs by less than its tolerance of 1e-6 is the same to it
rows = st.lists(st.tuples(*[st.integers(-128, 3_072).map(lambda n: n / 1_024)] * 3), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0, 1), st.sampled_from([{}, {"no_attention": 1}, {"full_attention": 1, "sliding_attention": 1}]))
def test_least_loss_under_a_kv_budget(losses, reduction, at_least):
    found = sensitivity(losses)
    wanted = brute_force(found, limit_kv=1 - reduction, at_least=at_least)
    config = plan.Config(kv_reduction=reduction, context=128, at_least=plan.AtLeast(**at_least))
    if wanted is None:
        with pytest.raises(PlanError, match="cannot be met"):
            plan.run(found, config)
        return
    made = plan.run(found, config)
    assert made.predicted["loss"] == pytest.approx(wanted, abs=1e-5)
    assert made.predicted["kv_share"] <= 1 - reduction + 1e-4
    assert all(sum(p.mixer == mixer for p in made.layers) >= n for mixer, n in at_least.items())


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0, 3))
def test_least_kv_under_a_loss_budget(losses, most):
    found = sensitivity(losses)
    made = plan.run(found, plan.Config(max_loss=most, context=128))
    assert made.predicted["loss"] <= most + 1e-5
    assert made.predicted["kv_share"] == pytest.approx(brute_force(found, limit_loss=most), abs=1e-4)


def test_both_budgets_together():
    found = sensitivity([(1, 0.5, 0.2)] * 4)
    assert plan.run(found, plan.Config(kv_reduction=0.5, max_loss=1.0, context=128)).predicted["loss"] <= 1.0
    with pytest.raises(
        PlanError, match=r"max_loss 0.1 cannot be met with kv_reduction 0.5: the least predicted loss is 0.6"
    ):
        plan.run(found, plan.Config(kv_reduction=0.5, max_loss=0.1, context=128))


def test_a_reason_for_every_layer_and_the_default_budget():
    made = plan.run(sensitivity([(2, 0.01, 0.0), (0.02, 0.5, 0.4), (0.3, 0.3, 0.3), (1, 1, 1)]))
    assert made.predicted["kv_share"] <= 0.5
    assert all(layer.reason for layer in made.layers)
    assert made.layers[0].mixer == "sliding_attention"
    assert made.layers[1].alike(NONE)
    assert made.layers[3].alike(FULL)
    assert "no_attention 2.000" in made.layers[0].reason


def test_of_equal_losses_the_smaller_cache_wins():
    assert [p.label for p in plan.run(sensitivity([(0, 0, 0)] * 2), plan.Config(kv_reduction=0)).layers] == [
        "no_attention"
    ] * 2


def test_native_windows_count_in_the_budget():
    found = sensitivity([(1, 0.1, 0.1)] * 2, native=[8, None])
    assert found.model.kv_bytes([FULL, FULL], 128) == (7 + 128) * 64
    assert found.model.kv_bytes([window(4), window(200)], 128) == (3 + 128) * 64
    assert found.model.kv_bytes([NONE, NONE], 128) == 0


def test_receptive_field():
    model = sensitivity([(1, 1, 1)] * 3).model
    assert model.receptive_field([window(16), NONE, window(4)]) == 1 + 15 + 3
    assert model.receptive_field([window(16), FULL, NONE]) is None
    assert model.receptive_field([NONE] * 3) == 1


def test_tiers_by_count_and_by_threshold():
    found = sensitivity([(0.5, 0, 0), (2, 0, 0), (0.1, 0, 0), (1, 0, 0)])
    wanted = [window(16), FULL, NONE, window(16)]
    counted = plan.run(found, plan.Config(planner="tiers", tiers=plan.Tiers(full=1, sliding=2)))
    cut = plan.run(found, plan.Config(planner="tiers", tiers=plan.Tiers(keep_above=1.5, remove_below=0.3)))
    for made in (counted, cut):
        assert all(p.alike(w) for p, w in zip(made.layers, wanted, strict=True))
    narrow = plan.run(found, plan.Config(planner="tiers", tiers=plan.Tiers(full=1, sliding=2, window=7)))
    assert narrow.layers[0].window == 7
    assert narrow.predicted.get("loss") is None  # 7 was not measured


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({}, "needs either counts"),
        ({"full": 1, "keep_above": 1.0}, "needs either counts"),
        ({"full": 3, "sliding": 2}, "more than the model's 4 layers"),
        ({"keep_above": 0.1, "remove_below": 0.5}, "the first not below the second"),
        ({"full": 1, "score": "perplexity"}, "perplexity was not measured"),
    ],
)
def test_wrong_tiers(tiers, message):
    found = sensitivity([(1, 0, 0)] * 4)
    with pytest.raises(PlanError, match=message):
        plan.run(found, plan.Config(planner="tiers", tiers=plan.Tiers(**tiers)))


def test_budgets_that_cannot_be_met_say_what_can():
    found = sensitivity([(1, 0, 0)] * 4)
    with pytest.raises(PlanError, match=r"at most 0.500 is possible"):
        plan.run(found, plan.Config(kv_reduction=0.9, at_least=plan.AtLeast(full_attention=2), context=128))
    with pytest.raises(PlanError, match="at_least asks for 5 layers, the model has 4"):
        plan.run(found, plan.Config(at_least=plan.AtLeast(full_attention=5)))
    with pytest.raises(PlanError, match=r"max_loss 0.0 cannot be met together with at_least"):
        plan.run(found, plan.Config(max_loss=0.0, at_least=plan.AtLeast(no_attention=1)))


def test_settings_that_the_planner_would_not_look_at_are_refused():
    found = sensitivity([(1, 0, 0)] * 4)
    tiers = {"planner": "tiers", "tiers": plan.Tiers(full=1, sliding=1)}
    for more in ({"kv_reduction": 0.9}, {"max_loss": 0.0}, {"at_least": plan.AtLeast(no_attention=1)}):
        with pytest.raises(PlanError, match="planner tiers knows no budget"):
            plan.run(found, plan.Config(**tiers, **more))
    with pytest.raises(PlanError, match="are for planner tiers"):
        plan.run(found, plan.Config(tiers=plan.Tiers(full=1)))


def test_a_plan_knows_whether_it_was_edited(tmp_path):
    made = plan.run(sensitivity([(1, 0.2, 0.1)] * 4), out=tmp_path / "plan.json")
    assert not plan.edited(load(Plan, tmp_path / "plan.json"))
    assert plan.edited(made.model_copy(update={"layers": [FULL] * 4}))
    assert plan.edited(Plan(layers=[FULL] * 4))


def test_the_file_reads_back(tmp_path):
    made = plan.run(sensitivity([(1, 0.2, 0.1)] * 4), out=tmp_path / "plan.json")
    assert load(Plan, tmp_path / "plan.json") == made
    save(made, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw["layers"][2].update(window=8), "layer 2: window 8 has no meaning for full_attention"),
        (lambda raw: raw["layers"][1].pop("window"), "layer 1: window is missing"),
        (
            lambda raw: raw["layers"][1].update(window=0),
            "layer 1: window must be a whole number .* found 0",
        ),
        (lambda raw: raw["layers"][1].update(window="8"), "layer 1: window"),
        (lambda raw: raw["layers"][1].update(window=True), "layer 1: window"),
        (lambda raw: raw["layers"][1].update(windw=8), "layer 1: unknown key windw; did you mean window"),
        (lambda raw: raw["layers"][0].update(mixer="no_atention"), "layer 0: mixer must .*did you mean no_attention"),
        (lambda raw: raw["layers"][0].update(mixer="linear_attention"), "layer 0: variant must be one of lolcats"),
        (lambda raw: raw["layers"][0].update(variant="gla"), "layer 0: variant 'gla' has no meaning for"),
        (lambda raw: raw["layers"][0].update(sink=True), "layer 0: sink True has no meaning for"),
        (lambda raw: raw["layers"][1].update(sink="yes"), "layer 1: sink must be true or false, found 'yes'"),
        (
            lambda raw: raw["layers"].__setitem__(0, {"mixer": "linear_attention", "variant": "lolcats"}),
            "layer 0: window is missing; linear_attention of variant lolcats needs one",
        ),
        (
            lambda raw: raw["layers"].__setitem__(0, {"mixer": "linear_attention", "variant": "gla", "window": 8}),
            "layer 0: window 8 has no meaning for linear_attention of variant gla",
        ),
        (
            lambda raw: raw["layers"].__setitem__(
                0, {"mixer": "linear_attention", "variant": "linear", "feature_map": "favor"}
            ),
            "layer 0: feature_map must be one of elu for variant linear, found 'favor'",
        ),
        (lambda raw: raw["layers"][0].pop("mixer"), "layer 0: key mixer is missing"),
        (lambda raw: raw["layers"].__setitem__(0, "none"), "layer 0: "),
        (lambda raw: raw.update(layers={}), "layers must be a list"),
        (lambda raw: raw.pop("layers"), "layers must be a list"),
        (lambda raw: raw.update(schema=2), "schema must be 1, found 2"),
        (lambda raw: raw.pop("schema"), "schema must be 1, found None"),
        (lambda raw: raw.update(layer=[]), "unknown key layer; did you mean layers"),
    ],
)
def test_wrong_edits_name_the_layer_and_the_key(tmp_path, edit, message):
    raw = {
        "schema": 1,
        "layers": [{"mixer": "no_attention"}, {"mixer": "sliding_attention", "window": 8}, {"mixer": "full_attention"}],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    assert load(Plan, path).layers == [NONE, window(8), FULL]
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=message):
        load(Plan, path)


def test_a_sensitivity_of_another_shape_is_refused():
    found = sensitivity([(1, 1, 1)] * 3)
    with pytest.raises(PlanError, match="sensitivity has 2 layers, its model has 3"):
        plan.run(Sensitivity(model=found.model, layers=found.layers[:2]))


def test_labels():
    assert LayerPlan(mixer="sliding_attention", window=8).label == "sliding_attention 8"
    assert NONE.label == "no_attention"
