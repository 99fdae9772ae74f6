"""Runs: everything in order, skipped while current, and after kill -9 the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import layerboost  # noqa: F401, teaches transformers the hybrids
from layerboost import analyze, evaluate, heal, pipeline, plan
from layerboost.errors import EnvironmentTrouble, LayerBoostError, PlanError, UsageError
from layerboost.estimate import count_parameters, estimate
from layerboost.model.loading import read_config
from layerboost.recipe import Recipe, load_recipe, shipped
from tests.conftest import FAMILIES
from tests.tiny import make_checkpoint

SMALL = (
    "analyze.texts=4", "analyze.answers=4", "analyze.length=96", "analyze.windows=[4, 16]",
    "plan.kv_reduction=0.5", "plan.measuring={texts: 2, answers: 2, length: 64}", "plan.pilots=0",
    "plan.at_least={full_attention: 1, sliding_attention: 1, no_attention: 1}",
    "heal.tokens=4k", "heal.length=64", "heal.rank=4", "heal.texts=2", "heal.answers=2",
    "evaluate.texts=4", "evaluate.answers=4", "evaluate.length=96", "evaluate.completions=1", "evaluate.new_tokens=4",
    "bench.context=64", "bench.new_tokens=4", "bench.batch=2", "bench.repeats=2",
)  # fmt: skip
FILES = (
    "recipe.yaml", "sensitivity.json", "plan.json", "hybrid/model.safetensors", "healed/model.safetensors",
    "healed/healing.json", "evaluation.json", "bench.json", "result.json", "report.html",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("default", SMALL)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory, recipe):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, pipeline.run(tiny, recipe, out=out)


def stamps(out):
    return {name: (out / name).stat().st_mtime_ns for name in FILES}


def test_result(finished):
    out, result = finished
    raw = json.loads((out / "result.json").read_text())
    assert raw["schema"] == 1
    model = AutoModelForCausalLM.from_pretrained(out / "healed")
    assert raw["model"]["num_layers"] == 4
    assert raw["plan"]["layers"] == [plan.mixer for plan in model.plan]
    assert raw["plan"]["windows"] == [plan.window for plan in model.plan]
    assert set(raw["plan"]["layers"]) == {"full_attention", "sliding_attention", "no_attention"}
    assert raw["quality"]["base"]["kl"] == 0
    for name in ("base", "converted", "healed"):
        assert set(raw["quality"][name]) == {"nll", "perplexity", "kl", "recall"}
        assert set(raw["quality"][name]["recall"]) == {"copy", "key_value", "needle", "mean"}
    gap = raw["quality"]["converted"]["kl"]
    assert raw["quality"]["recovered"]["kl"] == pytest.approx(1 - raw["quality"]["healed"]["kl"] / gap)
    kv = raw["cost"]["kv_bytes_per_token"]
    assert raw["cost"]["context"] == 64
    assert kv["base"] == 4 * 2 * 2 * 8 * 4
    held = sum({"full_attention": 64, "no_attention": 0}.get(p.mixer, (p.window or 1) - 1) for p in model.plan)
    assert kv["healed"] == pytest.approx(held * 2 * 2 * 8 * 4 / 64)
    assert raw["cost"]["parameters"]["healed"] == sum(p.numel() for p in model.parameters())
    for ratio in raw["speed"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert result.model["name"] == "qwen3"


def test_nothing_is_left_over(finished):
    out, _ = finished
    left = {p.name for p in out.iterdir()} - {name.split("/")[0] for name in FILES}
    assert left <= {".lock"}


def test_converted_quality_is_that_of_the_converted_checkpoint(finished, tiny):
    """The evaluation converts in memory; the folder `hybrid` must be the same model."""
    from layerboost import evaluate

    out, _ = finished
    config = load_recipe("default", SMALL).section(evaluate.Config, "evaluate")
    again = evaluate.run(out / "hybrid", tiny, config)
    assert again.models["healed"] == again.models["converted"]
    assert (
        again.models["converted"].kl.mean == json.loads((out / "result.json").read_text())["quality"]["converted"]["kl"]
    )


def test_whole_plans_are_measured_where_nothing_else_is_said(finished):
    out, _ = finished
    raw = json.loads((out / "plan.json").read_text())
    assert raw["planner"]["planner"] == "greedy"
    assert raw["measured"]["loss"] > 0
    assert raw["measured"]["cost"]["forwards"] > 1
    assert [point["measured"] for point in raw["front"] if point["chosen"]] == [True]


def test_a_plan_at_the_budget_nobody_gave_is_current(finished, tiny, tmp_path):
    out, _ = finished
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sensitivity.json").write_bytes((out / "sensitivity.json").read_bytes())
    without = load_recipe("default", [setting for setting in SMALL if not setting.startswith("plan.kv_reduction")])
    planning = pipeline.stages(tiny, tiny, without, tmp_path / "run")[1]
    assert not planning.is_current()
    planning.make(planning.path)
    assert planning.is_current()
    other = load_recipe("default", [*SMALL, "plan.kv_reduction=0.6"])
    assert not pipeline.stages(tiny, tiny, other, tmp_path / "run")[1].is_current()


def test_a_second_run_does_nothing_again(finished, tiny, recipe):
    out, _ = finished
    before = stamps(out)
    pipeline.run(tiny, recipe, out=out)
    after = stamps(out)
    again = {name for name in FILES if before[name] != after[name]}
    assert again == {"result.json", "report.html"}


def test_a_recipe_in_the_run_folder_keeps_its_comments(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3  # a good one\n")
    pipeline._keep(load_recipe(path), path)
    assert "a good one" in path.read_text()
    for text in (path.read_text(), "seed: [", "no_such_key: 1"):
        path.write_text(text)
        pipeline._keep(load_recipe("default", ["seed=4"]), path)
        assert load_recipe(path).seed == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.device_profile=h1000", "h1000"),
        ("heal.text=/nonexistent", "/nonexistent"),
        ("heal.data=[{kind: chat, path: nope.jsonl}]", "nope.jsonl"),
        ("plan.mixer={mixer: no_attention}", "mixer is for the planners uniform and periodic"),
        ("plan.weights={nonsense: 1}", "greedy measures text_kl"),
        ("plan.weights={text_kl: 0}", "at least one metric needs a weight above 0"),
        ("plan.weights={text_kl: -1}", "text_kl"),
        ("plan.measuring.length=99999", "length 99999 is more than the model's context"),
        ("analyze.length=99999", "length 99999 is more than the model's context"),
        ("evaluate.length=99999", "length 99999 is more than the model's context"),
        ("heal.length=99999", "length 99999 is more than the model's context"),
        ("heal.tokens=3", "3 tokens are less than one sequence"),
        (
            "heal.targets=[changed, kept.attention.qproj]",
            "no layer has a module qproj in its attention; it has q_proj, ",
        ),
        ("bench.context=99999", "context 99999 with"),
        ("bench={engine: vllm, serving: {prompt_tokens: 99999}}", "make 100063 tokens, the model takes 256"),
        ("bench.serving.concurrency=[8, 0]", "concurrency"),
        ("evaluate.new_tokens=999", "completions of 999 new_tokens after 48 do not fit"),
        ("heal.shard=true", "a run is one process"),
        ("heal.data=[{kind: chat, path: nowhere.jsonl}]", "chats nowhere.jsonl must be"),
        ("plan.context=999", "context 999 is more than the 256 tokens"),
        ("plan.at_least.no_attention=99", "at_least asks for [0-9]+ layers, the model has 4"),
        ("plan={planner: tiers, tiers: {score: recal}}", "recal is not measured with these settings; it is one of"),
        ("plan={planner: milp, weights: {cosin: 1}}", "cosin is not measured with these settings"),
        ("plan.measuring.distance=3", "distance 3 is within a window of "),
        ("analyze.mixers=[{mixer: no_attention}]", "mixers: no_attention is tried anyway"),
    ],
)
def test_slips_of_later_stages_are_found_before_the_first(tiny, tmp_path, setting, message):
    settings = [*SMALL, "plan.throughput=1.1", setting]
    with pytest.raises(LayerBoostError, match=message):
        pipeline.run(tiny, load_recipe("default", settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_conversations_are_told_before_anything_is_done(tiny, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "hi"}\n')
    data = f"heal.data=[{{kind: chat, path: {tmp_path / 'chats.jsonl'}}}]"
    with pytest.raises(LayerBoostError, match=r"chats.jsonl line 2: must be a JSON object with messages"):
        pipeline.run(tiny, load_recipe("default", [*SMALL, data]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hybrid_is_refused_before_anything_is_done(finished, tmp_path):
    out, _ = finished
    with pytest.raises(LayerBoostError, match="is a hybrid already; name the original model"):
        pipeline.run(out / "hybrid", load_recipe("default", SMALL), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_task_names_are_looked_up_first_and_in_a_finished_run_as_well(finished, tiny, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(LayerBoostError, match="no_such_task"):
        pipeline.run(tiny, load_recipe("default", [*SMALL, "evaluate.tasks=[no_such_task]"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    out, _ = finished
    before = stamps(out)
    with pytest.raises(LayerBoostError, match="no_such_task"):
        pipeline.run(tiny, load_recipe("default", [*SMALL, "heal.tokens=2k", "evaluate.tasks=[no_such_task]"]), out=out)
    assert stamps(out) == before


def test_several_processes_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ranks", lambda: (1, 2))
    with pytest.raises(LayerBoostError, match="a run is one process"):
        pipeline.run(tiny, load_recipe("default", SMALL), out=tmp_path / "run")


def test_only_what_depends_on_a_change_is_done_again(finished, tiny, capsys):
    out, _ = finished
    before = stamps(out)
    pipeline.run(tiny, load_recipe("default", [*SMALL, "heal.tokens=2k"]), out=out)
    again = {name for name in FILES if before[name] != stamps(out)[name]}
    assert not again & {"sensitivity.json", "plan.json", "hybrid/model.safetensors"}
    assert {"healed/model.safetensors", "evaluation.json", "bench.json"} <= again
    pipeline.run(tiny, load_recipe("default", SMALL), out=out)  # as the other tests found it


def test_a_plan_edited_by_hand_is_followed(tiny, tmp_path, recipe):
    pipeline.run(tiny, recipe, out=tmp_path / "run")
    plan = tmp_path / "run" / "plan.json"
    raw = json.loads(plan.read_text())
    raw["layers"] = [{"mixer": "no_attention"}, {"mixer": "full_attention"}, {"mixer": "sliding_attention", "window": 5}, {"mixer": "full_attention"}]  # fmt: skip  # noqa: E501
    plan.write_text(json.dumps(raw))
    result = pipeline.run(tiny, recipe, out=tmp_path / "run")
    assert result.plan["layers"] == ["no_attention", "full_attention", "sliding_attention", "full_attention"]
    assert result.plan["windows"] == [None, None, 5, None]


def test_a_plan_written_by_hand_is_kept_whatever_the_settings(tiny, tmp_path, recipe, capsys):
    layers = [{"mixer": "full_attention"}] * 3 + [{"mixer": "no_attention"}]
    (tmp_path / "run").mkdir()
    plan = tmp_path / "run" / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "layers": layers}))
    written = plan.read_bytes()
    result = pipeline.run(tiny, recipe, out=tmp_path / "run")
    assert result.plan["layers"] == ["full_attention"] * 3 + ["no_attention"]
    assert plan.read_bytes() == written
    plan.write_text(json.dumps({"schema": 1, "layers": layers})[:-1] + ",}")
    with pytest.raises(PlanError, match="is not JSON"):
        pipeline.run(tiny, recipe, out=tmp_path / "run")
    assert plan.read_text().endswith(",}")


def test_one_flipped_bit_in_a_result_is_noticed(finished, tiny, recipe):
    out, _ = finished
    for name in ("hybrid", "healed"):
        weights = out / name / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        pipeline.run(tiny, recipe, out=out)
        assert weights.read_bytes() == before


def test_damaged_results_are_made_again(finished, tiny, recipe):
    out, _ = finished
    weights = (out / "healed" / "model.safetensors").read_bytes()
    (out / "healed" / "model.safetensors").write_bytes(weights[:-10])
    (out / "bench.json").write_text("{")
    pipeline.run(tiny, recipe, out=out)
    assert (out / "healed" / "model.safetensors").read_bytes() == weights
    json.loads((out / "bench.json").read_text())


@pytest.mark.parametrize("verb", ["analyze", "heal", "evaluate", "bench"])
def test_a_stage_that_fails_leaves_the_rest(finished, tiny, tmp_path, recipe, monkeypatch, verb):
    done, _ = finished

    def fail(*args, **kwargs):
        raise EnvironmentTrouble("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(f"layerboost.{verb}.run", fail)
        with pytest.raises(EnvironmentTrouble, match="on purpose"):
            pipeline.run(tiny, recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    pipeline.run(tiny, recipe, out=tmp_path / "run")
    for name in ("sensitivity.json", "hybrid/model.safetensors", "healed/model.safetensors"):
        if name.endswith("json"):
            here, there = (json.loads((folder / name).read_text())["layers"] for folder in (tmp_path / "run", done))
            assert here == there
        else:
            assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes()


def start(tiny, out):
    return subprocess.Popen(
        [sys.executable, "-m", "layerboost.cli", "run", str(tiny), "--out", str(out), *SMALL, "heal.tokens=60k"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill_when(process, there):
    until = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_same_after_kills(tiny, tmp_path, moments):
    """Kill a run at each of these moments in turn, then let it finish; compare with a run that was left alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    alone = start(tiny, whole)
    assert alone.wait() == 0, alone.stderr.read()
    for moment in moments:
        kill_when(start(tiny, parts), lambda moment=moment: moment(parts))
        assert not (parts / "report.html").exists()  # which is written last; result.json follows bench.json at once
    last = start(tiny, parts)
    assert last.wait() == 0, last.stderr.read()
    for name in ("hybrid/model.safetensors", "healed/model.safetensors", "healed/config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_kill_9_while_healing_ends_with_the_same_bytes(tiny, tmp_path):
    def healing(out):
        if not (out / "hybrid").exists() or not (out / "heal" / ".lock").exists():
            return False
        time.sleep(1.5)  # some steps in
        return True

    assert_same_after_kills(tiny, tmp_path, [healing])


@pytest.mark.slow
def test_kill_9_in_every_stage_ends_with_the_same_bytes(tiny, tmp_path):
    moments = [
        lambda out: (out / ".lock").exists(),
        lambda out: (out / "sensitivity.json").exists(),
        lambda out: (out / "plan.json").exists(),
        lambda out: (out / ".hybrid.partial").exists(),
        lambda out: (out / "heal").exists(),
        lambda out: any((out / "heal").glob("step-*")) or (out / ".healed.partial").exists(),
        lambda out: (out / "healed").exists(),
        lambda out: (out / "evaluation.json").exists(),
        lambda out: (out / "bench.json").exists(),
    ]
    assert_same_after_kills(tiny, tmp_path, moments)


def test_states_that_a_kill_left_behind_go_with_the_next_run(finished, tiny, recipe):
    """Killed between publishing what was healed and clearing up."""
    out, _ = finished
    (out / "heal" / "step-000004").mkdir(parents=True)
    pipeline.run(tiny, recipe, out=out)
    assert not (out / "heal").exists()


def test_a_run_folder_has_one_writer(finished, tiny, recipe):
    from layerboost.artifacts import lock

    out, _ = finished
    with lock(out), pytest.raises(EnvironmentTrouble, match="another layerboost process"):
        pipeline.run(tiny, recipe, out=out)


def test_a_folder_of_someone_else_is_left_alone(tiny, tmp_path, recipe):
    (tmp_path / "hybrid").mkdir()
    (tmp_path / "hybrid" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not written by layerboost"):
        pipeline.run(tiny, recipe, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["hybrid"]


def test_too_little_disk_is_said_before_any_work(tiny, tmp_path, recipe, monkeypatch):
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr("layerboost.artifacts.shutil.disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentTrouble, match="needs about"):
        pipeline.run(tiny, recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_families_and_depths(tmp_path, family, depth, recipe):
    folder = make_checkpoint(tmp_path / "model", family, seed=depth, num_hidden_layers=depth, dtype=torch.bfloat16)
    fitting = recipe.model_copy(
        update={"plan": recipe.plan.model_copy(update={"at_least": type(recipe.plan.at_least)()})}
    )
    result = pipeline.run(folder, fitting, out=tmp_path / "run")
    assert len(result.plan["layers"]) == depth
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "healed")


def test_estimates_from_the_configuration_alone(tiny, recipe):
    config = read_config(tiny)
    parameters, embedding = count_parameters(config)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert embedding == 258 * 32
    found = estimate(config, recipe, 1e9)
    assert found.disk_bytes > 2 * 4 * parameters
    longer = estimate(config, load_recipe("default", [*SMALL, "heal.tokens=8k"]), 1e9)
    assert longer.seconds["heal"] == pytest.approx(2 * found.seconds["heal"])


class TestRecipe:
    def test_shipped_recipes_are_valid(self):
        for name in shipped():
            assert isinstance(load_recipe(name), Recipe)

    def test_shared_settings_reach_every_verb_that_does_not_say_otherwise(self, tmp_path):
        text = tmp_path / "text"
        recipe = load_recipe("default", [f"text={text}", "seed=3", "heal.seed=4"])
        assert recipe.section(analyze.Config, "analyze").text == text
        assert recipe.section(analyze.Config, "analyze").seed == 3
        assert recipe.section(heal.Config, "heal").seed == 4

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("heal.tokns=5", r"unknown key heal.tokns; did you mean heal.tokens\?"),
            ("haal.tokens=5", r"unknown key haal; did you mean heal\?"),
            ("heal.tokens", "is not an override; write key=value"),
            ("=5", "is not an override"),
            ("heal..tokens=5", "is not an override"),
            ("heal.tokens=[", "the value is not YAML"),
            ("seed.deep=5", "seed"),
            ("analyze.windows=[0]", "analyze.windows.0"),
            ("analyze.windows=16", "analyze.windows"),
            ("plan.kv_reduction=2", "between 0 and 1, or 0% and 100%, found 2"),
            ("plan.weights={text_kl: .nan}", "finite"),
            ("plan.planner=best", "plan.planner"),
            ("heal.tokens=many", "is not a number of tokens"),
            ("heal=5", "heal"),
            ("heal.seed=2024-13-45", "the value is not YAML"),
            ("heal.seed=" + "[" * 5_000, "the value is not YAML"),
            ("device=gpu", "device"),
        ],
    )
    def test_wrong_overrides(self, override, message):
        with pytest.raises(UsageError, match=message):
            load_recipe("default", [override])

    def test_wrong_files(self, tmp_path):
        with pytest.raises(UsageError, match=r"cannot be read.*default, demo"):
            load_recipe(tmp_path / "nowhere.yaml")
        (tmp_path / "bad.yaml").write_text("heal: [")
        with pytest.raises(UsageError, match="is not YAML"):
            load_recipe(tmp_path / "bad.yaml")
        (tmp_path / "list.yaml").write_text("- heal")
        with pytest.raises(UsageError, match="keys and values, found list"):
            load_recipe(tmp_path / "list.yaml")
        (tmp_path / "evil.yaml").write_text("heal: !!python/object/apply:os.system ['true']")
        with pytest.raises(UsageError, match="is not YAML"):
            load_recipe(tmp_path / "evil.yaml")
        (tmp_path / "empty.yaml").write_text("")
        assert load_recipe(tmp_path / "empty.yaml") == Recipe()

    def test_the_written_recipe_reads_back_to_the_same_settings(self, finished, recipe, tmp_path):
        out, _ = finished
        assert load_recipe(out / "recipe.yaml").resolved() == recipe.resolved()
        shared = load_recipe("default", ["seed=3", f"text={tmp_path}"])
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(shared.resolved()))
        again = load_recipe(tmp_path / "recipe.yaml").section(heal.Config, "heal")
        assert (again.seed, again.text) == (3, tmp_path)
        other = load_recipe(tmp_path / "recipe.yaml", ["seed=9"])
        assert other.section(heal.Config, "heal").seed == other.section(plan.Config, "plan").seed == 9

    def test_what_one_verb_says_otherwise_stays_its_own(self, tmp_path):
        recipe = load_recipe("default", ["seed=3", "heal.seed=0", "evaluate.device=cpu"])
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved()))
        again = load_recipe(tmp_path / "recipe.yaml", ["seed=9"])
        assert again.section(heal.Config, "heal").seed == 0
        assert again.section(evaluate.Config, "evaluate").device == "cpu"
        assert again.section(plan.Config, "plan").device == "auto"

    def test_a_section_without_keys_is_the_default(self, tmp_path):
        for name, text in (("mine", "analyze:\n  # windows: [16]\nheal: {rank: 8}\n"), ("short", "heal: {rank: 8}")):
            (tmp_path / f"{name}.yaml").write_text(text)
        mine, short = (load_recipe(tmp_path / f"{name}.yaml").resolved() for name in ("mine", "short"))
        assert mine == short
