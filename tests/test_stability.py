"""stability: ranks against scipy on sensitivities made up by hand, plans of one judged by another, and the tables."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from layerboost import plan, stability
from layerboost.artifacts import Candidate, Damage, KVShape, ModelRecord, Sensitivity, Stability, load, save
from layerboost.cli import app
from layerboost.damage import DEFAULT_WEIGHTS, predicted_loss
from layerboost.errors import PlanError, UsageError
from tests.tiny import NONE, window

METRICS = ("text_kl", "recall_kl", "copy")
TRIED = (NONE, window(4))


def made_up(means, noise=0.05, seed=0, layers=6):
    """`means[mixer][metric]` over layers; 16 sequences around each."""
    rng = np.random.default_rng(seed)

    def damage(mean):
        values = mean + noise * rng.normal(size=16)
        return Damage(mean=float(values.mean()), low=0.0, high=9.0, per_sequence=values.tolist())

    model = ModelRecord(
        name="made up", digest="0" * 64, num_layers=layers, native_windows=[None] * layers, context=128,
        kv_shape=KVShape(num_key_value_heads=2, head_dim=8, bytes_per_value=2),
    )  # fmt: skip
    found = [
        [Candidate.of(p, {m: damage(means[n][k][i]) for k, m in enumerate(METRICS)}) for n, p in enumerate(TRIED)]
        for i in range(layers)
    ]
    return Sensitivity(model=model, layers=found)


@pytest.fixture
def two(tmp_path):
    rng = np.random.default_rng(1)
    means = rng.random((2, 3, 6)) * np.array([2.0, 0.5])[:, None, None]
    one, other = made_up(means), made_up(means + rng.normal(size=means.shape) * 0.1, seed=2)
    save(one, tmp_path / "one.json")
    save(other, tmp_path / "other.json")
    return one, other, tmp_path / "one.json", tmp_path / "other.json"


def over_layers(sensitivity, mixer, weights):
    return [sum(w * own[mixer].damage[m].mean for m, w in weights.items()) for own in sensitivity.layers]


def test_ranks_are_scipys(two, tmp_path):
    one, other, first, second = two
    stability.run([first, second], out=tmp_path / "stability.json")
    found = load(Stability, tmp_path / "stability.json")
    labels = [p.label for p in TRIED]
    for name, file in ((str(first), one), (str(second), other)):
        own = {(a.metric, a.mixer): a.rank.mean for a in found.probes if a.where == name}
        assert len(own) == 3 * 2 + 1
        for n, label in enumerate(labels):
            for a, b in (("text_kl", "recall_kl"), ("text_kl", "copy"), ("recall_kl", "copy")):
                wanted = spearmanr(over_layers(file, n, {a: 1}), over_layers(file, n, {b: 1})).statistic
                assert own[f"{a} / {b}", label] == pytest.approx(wanted)
        wanted = spearmanr(*[over_layers(file, n, DEFAULT_WEIGHTS) for n in (0, 1)]).statistic
        assert own["loss", " / ".join(labels)] == pytest.approx(wanted)
    assert len(found.files) == 2 * 4
    for agreed in found.files:
        weights = DEFAULT_WEIGHTS if agreed.metric == "loss" else {agreed.metric: 1}
        n = labels.index(agreed.mixer)
        wanted = spearmanr(over_layers(one, n, weights), over_layers(other, n, weights)).statistic
        assert agreed.rank.mean == pytest.approx(wanted)
        assert agreed.where == f"{first} / {second}"
    for agreed in (*found.probes, *found.files):
        assert agreed.rank.count == 6
        assert -1 <= agreed.rank.low <= agreed.rank.mean <= agreed.rank.high <= 1
    assert any(agreed.rank.low < agreed.rank.high for agreed in found.files)
    both_ways = {(str(first), str(second)), (str(second), str(first))}
    assert {(row.made_on, row.judged_on) for row in found.transfer} == both_ways
    assert len(found.transfer) == 2 * 3


def test_noise_widens_the_interval():
    means = np.tile(np.linspace(0.1, 2, 6), (2, 3, 1))
    widths = []
    for noise in (0.001, 0.3, 3.0):
        found = {"a": made_up(means, noise), "b": made_up(means, noise, seed=1)}
        loss = next(r for r in stability.across_files("a", "b", found) if r.metric == "loss")
        widths.append(loss.rank.high - loss.rank.low)
    assert widths[0] == 0
    assert widths == sorted(widths)
    assert widths[2] > widths[1]


def test_layers_that_are_all_the_same_have_no_rank():
    same = made_up(np.ones((2, 3, 6)), noise=0)
    assert {agreed.rank.mean for agreed in stability.across_probes("a", same)} == {0.0}


def test_plans_of_one_judged_by_another(two):
    one, other, _, _ = two
    rows = stability.transfer("a", "b", {"a": one, "b": other})
    assert [row.kv_reduction for row in rows] == [0.4, 0.6, 0.8]
    for row in rows:
        config = plan.Config(planner="milp", kv_reduction=row.kv_reduction, context=128)
        made, own = plan.run(one, config).layers, plan.run(other, config).layers
        assert row.loss == pytest.approx(predicted_loss(other, made, DEFAULT_WEIGHTS))
        assert row.own == pytest.approx(predicted_loss(other, own, DEFAULT_WEIGHTS))
        assert row.loss >= row.own - 1e-6
    assert [row.loss for row in stability.transfer("a", "a", {"a": one})] == [
        row.own for row in stability.transfer("a", "a", {"a": one})
    ]


def test_models_of_other_depth_are_not_compared_layer_by_layer(capsys):
    found = {"a": made_up(np.ones((2, 3, 6))), "b": made_up(np.ones((2, 3, 4)), layers=4)}
    assert stability.across_files("a", "b", found) == []
    assert stability.transfer("a", "b", found) == []
    assert "a has 6 layers, b 4: their rankings do not compare" in capsys.readouterr().err


def test_layers_that_are_missing(two, tmp_path):
    one, _, first, _ = two
    save(one.model_copy(update={"layers": one.layers[1:]}), tmp_path / "less.json")
    with pytest.raises(PlanError, match="sensitivity has 5 layers, its model has 6"):
        stability.run([first, tmp_path / "less.json"])


def test_what_cannot_be_compared(two, tmp_path):
    one, _, first, _ = two
    with pytest.raises(UsageError, match=r"one\.json is named twice"):
        stability.run([first, first])
    bare = one.model_dump()
    bare["layers"][1][0]["damage"]["copy"]["per_sequence"] = []
    save(Sensitivity(**bare), tmp_path / "bare.json")
    with pytest.raises(PlanError, match="no value per sequence"):
        stability.run([tmp_path / "bare.json"])


def test_as_a_command(two, tmp_path):
    _, _, first, second = two
    done = CliRunner().invoke(app, ["stability", str(first), str(second), "--out", str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    for title in ("Across probes and mixers", "Across files", "Plans of one, judged by another"):
        assert f"## {title}" in done.output
    found = load(Stability, tmp_path / "s.json")
    lines = [line for line in done.output.splitlines() if line.startswith("| ") and "/one.json" in line]
    assert len(lines) == 7 + len(found.files) + len(found.transfer)
    rank = found.files[0].rank
    assert f"| loss | {rank.mean:.2f} ({rank.low:.2f} to {rank.high:.2f}) |" in done.output
    assert f"| {first} | {second} | 40% | {found.transfer[0].loss:.4f} |" in done.output
    twice = CliRunner().invoke(app, ["stability", str(first), str(first), "--out", str(tmp_path / "t.json")])
    assert twice.exit_code == 2
    assert "is named twice" in twice.output
    assert not (tmp_path / "t.json").exists()


def test_a_file_without_damages(two, tmp_path):
    one, _, first, _ = two
    save(one.model_copy(update={"layers": [[] for _ in one.layers]}), tmp_path / "empty.json")
    with pytest.raises(UsageError, match="has no damages of any layer"):
        stability.run([first, tmp_path / "empty.json"])
