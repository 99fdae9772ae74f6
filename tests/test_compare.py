"""The neutral benchmark: what it runs, that it goes on after a kill, and how it judges."""

import json

import numpy as np
import pytest

from layerboost import compare, heal
from layerboost.artifacts import Comparison, Entry, Plan, Trial, load
from layerboost.compare.tables import markdown
from layerboost.data.corpus import open_corpus
from layerboost.errors import CheckpointError, PlanError, UsageError

SETTINGS = {
    "seeds": [0], "length": 64, "texts": 2, "answers": 2, "replacement_window": 4,
    "analyze": {"windows": [4], "texts": 2, "answers": 2},
    "heal": {"tokens": 128, "length": 64, "batch": 1, "texts": 2, "answers": 2, "rank": 2},
    "plan": {"texts": 2, "answers": 2, "steps": 2, "batch": 1},
}  # fmt: skip


def job(model, **changes):
    return compare.Job.model_validate({"models": [str(model)], **SETTINGS, **changes})


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    asked = job(checkpoints["qwen3"], kv_reduction=0.3)
    return asked, out, compare.run(asked, out=out)


def test_every_way_is_tried_at_the_budget(finished):
    asked, out, found = finished
    names = [entry.name for entry in found.entries]
    assert names[: len(asked.selectors)] == asked.selectors
    assert {f"{how} {what}" for how in ("uniform", "periodic", "aware") for what in compare.OPERATORS} <= set(names)
    tried = [entry for entry in found.entries if entry.trial is not None]
    assert len(tried) > 20
    for entry in tried:
        assert entry.kv_share <= 0.7 + 1e-9
        assert set(entry.loss) == {"before", "after"}
        assert entry.loss["after"].low <= entry.loss["after"].mean <= entry.loss["after"].high
    for entry in found.entries:
        if entry.trial is None:
            assert entry.verdict["after"].startswith("no plan: ")
    by_name = {entry.name: entry for entry in found.entries}
    assert by_name["greedy+pilots"].trial is not None
    assert by_name["greedy+pilots"].cost > by_name["greedy"].cost
    assert load(Comparison, out / "comparison.json") == found
    assert (out / "comparison.png").stat().st_size > 5_000
    text = (out / "comparison.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    labels = {label for entry in tried for label in entry.plan}
    assert {"linear_attention performer/favor", "linear_attention gla/softmax", "sliding_attention 4 sink"} <= labels


def test_a_replacement_is_all_that_its_ways_put_in(finished):
    asked, _, found = finished
    plans = {entry.name: set(entry.plan) for entry in found.entries if entry.trial is not None}
    for name in compare.OPERATORS:
        mixer = compare.Bout(asked, "model", 0, None)._mixer(name, asked.replacement_window).label
        for way in {f"aware {name}", f"periodic {name}"} & plans.keys():
            assert mixer in plans[way], way
            assert plans[way] <= {mixer, "full_attention"}, way
    assert sum(name.startswith("aware ") for name in plans) > 4


def test_default_windows_are_candidates_too(tiny, tmp_path):
    """As a job says that names a model and nothing else."""
    asked = job(tiny, selectors=["greedy", "uniform"], replacements=[], kv_reduction=0.3)
    asked = asked.model_copy(update={"analyze": asked.analyze.model_copy(update={"windows": None})})
    found = compare.run(asked, out=tmp_path)
    assert found.entries[1].plan == ["sliding_attention 16"] * 4


def test_ways_of_the_same_plan_share_a_trial(finished):
    _, out, found = finished
    trials = {entry.trial: tuple(entry.plan) for entry in found.entries if entry.trial}
    assert len(set(trials.values())) == len(trials)
    assert {path.stem for path in out.rglob("trials/*.json")} == set(trials)


def test_a_trial_is_what_evaluate_says_of_the_healed_model(finished, tmp_path):
    """Once more by hand: convert, heal, and the damages of both, on the held-out split."""
    from layerboost import convert, evaluate
    from layerboost.artifacts import Plan, save

    asked, out, found = finished
    entry = found.entries[0]
    trial = load(Trial, next(out.rglob(f"{entry.trial}.json")))
    planned = load(Plan, next(out.rglob("greedy.json")))
    save(planned, tmp_path / "plan.json")
    convert.run(asked.models[0], tmp_path / "plan.json", out=tmp_path / "hybrid")
    heal.run(tmp_path / "hybrid", asked.models[0], asked.heal, out=tmp_path / "healed")
    config = evaluate.Config(texts=2, answers=2, length=64, distance=32, completions=0)
    quality = evaluate.run(tmp_path / "healed", asked.models[0], config).models
    assert np.mean(trial.before["text_kl"]) == pytest.approx(quality["converted"].kl.mean, abs=1e-5)
    assert np.mean(trial.after["text_kl"]) == pytest.approx(quality["healed"].kl.mean, abs=1e-5)
    lost = quality["base"].recall["copy"].mean - quality["healed"].recall["copy"].mean
    assert np.mean(trial.after["copy"]) == pytest.approx(lost, abs=1e-6)


def test_what_other_settings_left_half_done_is_not_used(checkpoints, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    asked = job(checkpoints["llama"], selectors=["greedy"], replacements=[])
    with monkeypatch.context() as patched:
        patched.setattr(compare.Bout, "_scores", killed)
        with pytest.raises(KeyboardInterrupt):
            compare.run(asked, out=tmp_path)
    assert list(tmp_path.rglob("*.work/healed"))
    longer = asked.model_copy(update={"heal": asked.heal.model_copy(update={"tokens": 3 * asked.heal.tokens})})
    found = compare.run(longer, out=tmp_path)
    fresh = compare.run(longer, out=tmp_path / "fresh")
    trials = [
        load(Trial, next((tmp_path / where / "llama").rglob(f"{one.entries[0].trial}.json")))
        for where, one in ((".", found), ("fresh", fresh))
    ]
    assert trials[0].after == trials[1].after
    assert not list(tmp_path.rglob("*.work"))


def test_other_text_is_healed_and_planned_on(checkpoints, tmp_path):
    text = tmp_path / "text.txt"
    where = {"analyze": {**SETTINGS["analyze"], "text": str(text)}, "heal": {**SETTINGS["heal"], "text": str(text)}}
    asked = job(checkpoints["llama"], selectors=["greedy", "uniform"], replacements=[], **where)
    found = []
    for power in (2, 3):
        text.write_text(" ".join(str(n**power) for n in range(2_000)))
        found.append((compare.run(asked, out=tmp_path / "out"), compare.run(asked, out=tmp_path / f"fresh{power}")))
    for again, fresh in found:
        assert again.entries == fresh.entries
    (plan,) = (load(Plan, path) for path in (tmp_path / "out").rglob("plans/greedy.json"))
    assert plan.inputs["text"] == open_corpus(text).digest


def test_a_plan_that_cannot_be_converted_is_told_in_the_table(checkpoints, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PlanError("not in this family")

    asked = job(checkpoints["llama"], selectors=["greedy", "uniform"], replacements=[])
    monkeypatch.setattr(compare.convert, "run", refused)
    found = compare.run(asked, out=tmp_path)
    assert [entry.verdict["after"] for entry in found.entries] == ["no plan: not in this family"] * 2


def test_every_replacement_in_a_model_with_windows_of_its_own(checkpoints, tmp_path):
    asked = job(checkpoints["gemma2"], selectors=["greedy"], replacements=["linear", "lolcats"], kv_reduction=0.3)
    found = compare.run(asked, out=tmp_path)
    assert [entry.name for entry in found.entries][1:4] == ["uniform linear", "periodic linear", "aware linear"]
    assert any(entry.trial for entry in found.entries[1:])
    assert load(Comparison, tmp_path / "comparison.json") == found


def test_it_goes_on_after_a_kill(checkpoints, tmp_path, monkeypatch):
    asked = job(checkpoints["llama"], selectors=["greedy", "milp", "uniform", "random"], replacements=[])
    healed = []

    def counted(*args, **kwargs):
        healed.append(kwargs["out"])
        if len(healed) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = heal.run
    monkeypatch.setattr(heal, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.run(asked, out=tmp_path)
    first = compare.run(asked, out=tmp_path)
    trials = {entry.trial for entry in first.entries}
    assert len(healed) == len(trials) + 1  # one of them twice, and none once more
    assert compare.run(asked, out=tmp_path).entries == first.entries
    assert len(healed) == len(trials) + 1
    assert not list(tmp_path.rglob("*.work"))


def bout(asked, tmp_path):
    return compare.Bout(asked, "model", 0, tmp_path)


def entry(name):
    return Entry(model="model", seed=0, name=name, trial=name, plan=[name])


def trial(name, loss, recall=0.0, spread=0.1):
    noise = spread * np.linspace(-1, 1, 8)
    metrics = {"text_kl": loss + noise, "recall_kl": loss + noise}
    metrics |= {probe: np.full(8, recall) for probe in ("copy", "key_value", "needle")}
    plain = {metric: values.tolist() for metric, values in metrics.items()}
    return Trial(layers=[name], kv_share=0.5, before=plain, after=plain, healing_tokens=1)


@pytest.mark.parametrize(("ours", "theirs", "verdict"), [(0.1, 0.2, "wins"), (0.3, 0.2, "loses"), (0.2, 0.2, "ties")])
def test_verdicts_are_paired(tiny, tmp_path, ours, theirs, verdict):
    """The noise is larger than the difference, but the same for both."""
    trials = {"greedy": trial("greedy", ours, spread=5), "milp": trial("milp", theirs, spread=5)}
    judged = bout(job(tiny), tmp_path)._judged(entry("milp"), trials)
    assert judged.verdict["after"] == verdict
    assert judged.against["after"].mean == pytest.approx(ours - theirs)
    assert judged.verdict["recall after"] == "ties"


@pytest.mark.parametrize(("ours", "theirs"), [(0.1, 0.2), (0.2, 0.1)])
def test_a_difference_within_its_noise_is_a_tie(tiny, tmp_path, ours, theirs):
    trials = {"greedy": trial("greedy", ours, spread=5), "milp": trial("milp", theirs, spread=-5)}
    judged = bout(job(tiny), tmp_path)._judged(entry("milp"), trials)
    assert judged.verdict["after"] == "ties"
    assert judged.against["after"].low < 0 < judged.against["after"].high


def test_recall_is_judged_on_its_own(tiny, tmp_path):
    """Lost recall, so less of it wins."""
    for ours, verdict in ((0.1, "wins"), (0.3, "loses")):
        trials = {"greedy": trial("greedy", 0.9, ours), "milp": trial("milp", 0.1, 0.2)}
        judged = bout(job(tiny), tmp_path)._judged(entry("milp"), trials).verdict
        assert judged == {"before": "loses", "after": "loses", "recall before": verdict, "recall after": verdict}


def test_the_same_plan_is_no_tie(tiny, tmp_path):
    trials = {"greedy": trial("same", 0.1), "milp": trial("same", 0.1)}
    assert bout(job(tiny), tmp_path)._judged(entry("milp"), trials).verdict["after"] == "same plan"


def test_the_table_counts_verdicts():
    entries = [
        Entry(model="m", seed=s, name=name, trial="t", plan=["no_attention"], kv_share=0.5, cost=1,
              loss={w: {"mean": 1, "low": 1, "high": 1, "count": 2} for w in ("before", "after")},
              recall_lost={w: {"mean": 0, "low": 0, "high": 0, "count": 2} for w in ("before", "after")},
              verdict={} if name == "greedy" else {"after": v, "recall after": "ties"})
        for s, v in enumerate(["wins", "wins", "loses"]) for name in ("greedy", "milp")
    ]  # fmt: skip
    assert "| milp | 2 / 0 / 1 / 0 | 0 / 3 / 0 / 0 |" in markdown(Comparison(default="greedy", entries=entries))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "cannot be read"),
        ("seeds: [0]", "key models is missing"),
        ("{models: [m], selector: [greedy]}", "unknown key selector; did you mean selectors"),
        ("{models: [m], selectors: [greedy, tiers cosin]}", "'tiers cosin' is not one of"),
        ("{models: [m], selectors: [milp]}", "selectors must have greedy"),
        ("{models: [m], replacements: [mamba]}", "'mamba' is not one of"),
        ("{models: [a/m, b/m]}", "two are called m"),
        ("{models: [m], weights: {cosine: 1}}", "weights: 'cosine' is not one of text_kl, "),
        ("{models: [m], analyze: {seed: 3}}", "analyze.seed is told by seeds; leave it out"),
        ("{models: [m], heal: {seed: 3}}", "heal.seed is told by seeds"),
        ("{models: [m], plan: {length: 64}}", "plan.length is told by length"),
        ("[models]", "must hold keys and values, found list"),
        ("{models: [m], seeds: [-1]}", "seeds.0"),
        ("{models: [m], seeds: [2024-13-45]}", "cannot be read"),
        ("{models: [m], replacement_window: 128}", "a window of 128 reaches answers of 256 tokens, .* at least 258"),
        ("{models: [m], length: 64, analyze: {windows: [4, 32]}}", "a window of 32 reaches answers of 64 tokens"),
    ],
)
def test_wrong_jobs(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        compare.load_job(path)


def test_a_job_from_a_file(tmp_path, tiny):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({"models": [str(tiny)], "heal": {"tokens": "50k"}}))
    assert compare.load_job(path).heal.tokens == 50_000
    for healing in ({}, {"heal": {}}, {"heal": {"length": 256}}):
        path.write_text(json.dumps({"models": [str(tiny)], **healing}))
        assert compare.load_job(path).heal.tokens == 100_000
    with pytest.raises(UsageError, match="is a file; name a folder"):
        compare.run(compare.load_job(path), out=path)


def test_no_window_reaches_an_answer(tiny, tmp_path, monkeypatch):
    """Neither a usual one nor the widest within the budget."""
    monkeypatch.setattr(compare.analyze, "default_windows", lambda _: [4, 31, 32])
    one = compare.Bout(job(tiny, kv_reduction=0.1, analyze={}), str(tiny), 0, tmp_path)
    assert one.windows == [4, 31]
    assert one._window_at_budget(one._mixer("window", 4)) == 31
    assert compare.Job(models=["m"], replacement_window=127).distance == 128


def test_a_missing_second_model_is_told_before_the_first_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.Bout, "run", lambda _: pytest.fail("measured"))
    with pytest.raises(CheckpointError, match="nowhere"):
        compare.run(job(tiny, models=[str(tiny), str(tmp_path / "nowhere")]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
