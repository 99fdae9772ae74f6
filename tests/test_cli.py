"""The command line: what the contract promises, exit codes, and one clear line for every trouble."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from string import Template

import pytest
from typer.testing import CliRunner

import layerboost
from layerboost import __version__
from layerboost.cli import app
from layerboost.errors import EnvironmentTrouble
from tests.test_pipeline import SMALL
from tests.tiny import make_checkpoint

ANALYZE = [setting.partition(".")[2] for setting in SMALL if setting.startswith("analyze.")]
HEAL = [setting.partition(".")[2] for setting in SMALL if setting.startswith("heal.") and "tokens" not in setting]
EVALUATE = [setting.partition(".")[2] for setting in SMALL if setting.startswith("evaluate.")]
BENCH = [setting.partition(".")[2] for setting in SMALL if setting.startswith("bench.")]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def session(tiny, tmp_path_factory):
    """Every verb alone, from files, as a user would call them one after the other."""
    root = tmp_path_factory.mktemp("session")
    results = {
        "analyze": call("analyze", tiny, "--out", root / "sensitivity.json", *ANALYZE),
        "plan": call("plan", root / "sensitivity.json", "--out", root / "plan.json", "--kv-reduction", "0.6"),
        "convert": call("convert", tiny, root / "plan.json", "--out", root / "hybrid"),
        "heal": call("heal", root / "hybrid", "--teacher", tiny, "--tokens", "20k", "--out", root / "healed", *HEAL),
        "evaluate": call("evaluate", root / "healed", "--against", tiny, "--out", root / "evaluation.json", *EVALUATE),
        "bench": call("bench", root / "healed", "--against", tiny, "--out", root / "bench.json", *BENCH),
        "export": call("export", root / "healed", "--portable", "--out", root / "portable"),
        "verify": call("verify", root / "portable", "--against", root / "healed"),
    }
    return root, results


def test_the_verbs_one_by_one(session):
    root, results = session
    for verb, result in results.items():
        assert result.exit_code == 0, f"{verb}: {result.output}"
    assert {p.name for p in root.iterdir()} == {
        "sensitivity.json", "plan.json", "hybrid", "healed", "evaluation.json", "bench.json", "portable",
    }  # fmt: skip
    assert "no_attention" in results["analyze"].output
    assert "layer" in results["plan"].output
    assert "recall mean" in results["evaluate"].output
    assert "KV bytes per token" in results["bench"].output
    assert results["verify"].output.count("yes") == 7


@pytest.mark.parametrize("planner", ["greedy", "milp", "gates", "tiers", "uniform", "periodic", "random"])
def test_every_planner_by_name(session, tiny, tmp_path, planner):
    root, _ = session
    few = ["measuring.texts=2", "measuring.answers=2", "measuring.length=64", "measuring.steps=2"]
    words = ["plan", root / "sensitivity.json", "--out", tmp_path / "plan.json", "--model", tiny, *few]
    done = call(*words, "--planner", planner, "--kv-reduction", "0.6", "--context", "128", "--engine", "vllm")
    assert done.exit_code == 0, done.output
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["planner"]["planner"] == planner
    assert raw["predicted"]["kv_share"] <= 0.4
    assert raw["predicted"]["engine"] == "vllm"
    assert "what other budgets would give" in done.output
    assert ("finding it took" in done.output) == (planner in ("greedy", "gates"))
    held = raw["predicted"]["kv_bytes"]
    assert f"as vllm keeps it: {held['hybrid']:,} of {held['base']:,} bytes" in done.output
    assert call("convert", tiny, tmp_path / "plan.json", "--out", tmp_path / "hybrid").exit_code == 0


def test_flags_of_plan(session, tiny, tmp_path):
    root, _ = session
    words = ["plan", root / "sensitivity.json", "--out", tmp_path / "plan.json", "--planner", "milp"]

    def layers(*flags):
        done = call(*words, *flags)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "plan.json").read_text())

    assert sum(layer["mixer"] == "full_attention" for layer in layers("--full-layers", 1)["layers"]) <= 1
    assert layers("--kv-bytes", 100, "--context", 128)["predicted"]["kv_bytes"]["hybrid"] <= 100 * 128
    assert layers("--max-loss", 0.1)["predicted"]["loss"] <= 0.1
    fast = ["--throughput", 1.2, "--device", "a10", "--model", tiny, "concurrency=30", "kv_memory=200000"]
    found = layers(*fast, "prompt_tokens=100", "output_tokens=20")
    assert found["predicted"]["throughput"] >= 1.2
    assert found["planner"]["device_profile"] == "a10"
    assert call(*words, *fast, "--planner", "best").exit_code == 2


def test_verify_fails_with_its_own_exit_code(session, tiny):
    root, _ = session
    found = call("verify", root / "hybrid", "--against", root / "healed")
    assert found.exit_code == 8
    assert "NO" in found.output
    assert "1 of 7 checks do not hold" in found.output
    assert call("verify", root / "healed", "--against", tiny).exit_code == 3
    assert call("verify", root / "hybrid", "--against", tiny, "--dtype", "int8").exit_code == 2


def test_export_needs_a_form(session):
    root, _ = session
    for flags in ([], ["--portable", "--native"]):
        found = call("export", root / "healed", *flags, "--out", root / "nothing")
        assert found.exit_code == 2
        assert "either --portable or --native" in found.output
    assert not (root / "nothing").exists()


def test_families():
    shown = call("families")
    assert shown.exit_code == 0
    assert "gpt_neox" in shown.output
    listed = json.loads(call("families", "--json").output)
    assert {entry["family"] for entry in listed} >= {"llama", "gemma3_text", "mixtral"}
    assert all(entry["supported"] for entry in listed)


def test_inspect(session, tiny):
    root, _ = session
    shown = call("inspect", root / "healed")
    assert shown.exit_code == 0
    assert "layerboost_qwen3" in shown.output
    assert "intact" in shown.output
    facts = json.loads(call("inspect", root / "healed", "--json").output)
    assert facts["hybrid"]
    plan = json.loads((root / "plan.json").read_text())["layers"]
    assert [layer["mixer"] for layer in facts["layers"]] == [layer["mixer"] for layer in plan]
    base = call("inspect", tiny)
    assert base.exit_code == 0
    assert "not a hybrid" in base.output


def test_a_plan_as_a_person_writes_it(tiny, tmp_path):
    layers = [
        {"mixer": "full_attention"}, {"mixer": "sliding_attention", "window": 64}, {"mixer": "no_attention"},
        {"mixer": "full_attention"},
    ]  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "layers": layers}))
    assert call("convert", tiny, tmp_path / "plan.json", "--out", tmp_path / "hybrid").exit_code == 0


@pytest.fixture(scope="module")
def places(session, tiny, tmp_path_factory):
    """What `TROUBLES` speak of: a session's folder; a model; another; what is none of them; and a place for results."""
    other = tmp_path_factory.mktemp("other")
    (other / "plan.json").write_text(json.dumps({"schema": 1, "layers": [{"mixer": "full"}] * 4}))
    (other / "empty").mkdir()
    (other / "job.yaml").write_text(f"models: [{tiny}]\n")
    (other / "notes").mkdir()
    (other / "notes" / "comparison.json").write_text("mine")
    shutil.copytree(session[0] / "hybrid", other / "damaged")
    (other / "damaged" / "generation_config.json").write_text("{}")
    stranger = make_checkpoint(other / "stranger", "llama", vocab_size=300)
    return {"root": session[0], "tiny": tiny, "other": other, "stranger": stranger, "out": other / "out"}


TROUBLES = [
    (2, "unknown key windws; did you mean windows", "analyze $tiny --out $out windws=[4]"),
    (2, "is not an override", "analyze $tiny --out $out windows"),
    (2, "recipe nowhere.yaml cannot be read", "run $tiny --out $out --recipe nowhere.yaml"),
    (2, "unknown key heal.token; did you mean heal.tokens", "run $tiny --out $out heal.token=3"),
    (2, "tiers.score: task:x is not measured", "run $tiny --out $out plan.planner=tiers plan.tiers.score=task:x"),
    (2, "is not a finished run", "report $other"),
    (2, "plan.json is a file; name a folder", "run $tiny --out $other/plan.json"),
    (2, "plan.json is a file; name a folder", "run $tiny --out $other/plan.json --dry-run"),
    (2, "is a checkpoint; name another --out", "run $tiny --out $tiny --dry-run"),
    (2, "'most' is not a share; write 0.6 or 60%", "plan $out --out $out --kv-reduction most"),
    (3, "does not exist", "run $other/nowhere --out $out"),
    (3, "does not exist", "run $other/nowhere --out $out --dry-run"),
    (3, "config.json does not exist", "analyze $other/empty --out $out"),
    (3, "is not that of the teacher", "heal $root/hybrid --teacher $stranger --tokens 2k --out $out"),
    (3, "config.json is missing or not as it was written", "evaluate $other/damaged --against $tiny --out $out"),
    (3, "config.json is missing or not as it was written", "bench $other/damaged --against $tiny --out $out"),
    (3, "vocab_size", "evaluate $root/healed --against $stranger --out $out"),
    (3, "not a hybrid; convert it first", "bench $tiny --against $tiny --out $out"),
    (3, "is a file; name the folder", "inspect $other/plan.json"),
    (4, "layer 0: mixer", "convert $tiny $other/plan.json --out $out"),
    (4, "cannot be met", "plan $root/sensitivity.json --out $out at_least.full_attention=4"),
    (4, "name the model with --model", "plan $root/sensitivity.json --out $out --planner greedy"),
    (4, "name the model with --model", "plan $root/sensitivity.json --out $out --pilots 2"),
    (4, "name the model with --model", "plan $root/sensitivity.json --out $out --throughput 2"),
    (4, "analyze it", "plan $root/sensitivity.json --out $out --model $stranger"),
    (4, "does not exist", "plan $other/nowhere.json --out $out"),
    (4, "schema must be 1", "plan $tiny/config.json --out $out"),
    (5, "holds no UTF-8 text", "analyze $tiny --out $out text=$other/empty"),
    (5, "less than one sequence", "heal $root/hybrid --teacher $tiny --tokens 3 --out $out"),
    (5, "does not fit a model", "bench $root/healed --against $tiny --out $out context=100000"),
    (6, "cannot be written", "plan $root/sensitivity.json --out $other/plan.json/x.json"),
    (2, "Missing option", "plan $root/sensitivity.json"),
    (2, "empty exists and is no sensitivity.json", "analyze $tiny --out $other/empty"),
    (2, "is no plan.json", "plan $root/sensitivity.json --out $root/sensitivity.json"),
    (2, "is no evaluation.json", "evaluate $root/healed --against $tiny --out $other/plan.json"),
    (2, "is no bench.json", "bench $root/healed --against $tiny --out /dev/null"),
    (2, "is no comparison.json", "compare $other/job.yaml --out $other/notes"),
    (4, "is a sensitivity.json; a plan.json is", "convert $tiny $root/sensitivity.json --out $out"),
    (2, "healed is a healed model", "convert $tiny $root/plan.json --out $root/healed"),
    (2, "is a hybrid, and no export", "export $root/healed --portable --out $root/hybrid"),
    (2, "a flag says context already", "plan $root/sensitivity.json --out $out --context 64 context=32"),
    (4, "context 99999 is more than the", "plan $root/sensitivity.json --out $out --context 99999"),
    (5, "length 99999 is more than the", "analyze $tiny --out $out length=99999"),
    (5, "length 99999 is more than the", "evaluate $root/healed --against $tiny --out $out length=99999"),
    (2, "found 60; write 60%", "plan $root/sensitivity.json --out $out --kv-reduction 60"),
    (2, "did you mean analyze.kv_reduction or plan.kv_reduction?", "run $tiny --out $out kv_reduction=60%"),
    (2, "plan.weights: write {text_kl: 1}", "run $tiny --out $out plan.weights={text_kl:1}"),
    (5, "distance 60 does not fit probes of 64", "run $tiny --out $out evaluate.length=64 evaluate.distance=60"),
    (5, "distance 16 is within a window of 16", "run $tiny --out $out evaluate.distance=16 analyze.windows=[8,16]"),
    (5, "distance 16 is within a window of 16", "run $tiny --out $out analyze.distance=16 analyze.windows=[8,16]"),
    (5, "distance 250 does not fit probes of 256", "run $tiny --out $out plan.measuring.distance=250"),
    (5, "length 99999 is", "heal $root/hybrid --teacher $tiny --out $out length=99999"),
    (2, "settings: weights: write {text_kl: 1}", "plan $root/sensitivity.json --out $out weights={text_kl:1}"),
    (2, "--window is of the sliding share of --plan", "predict $root/healed --window 32"),
    (2, "No such command", "analyse"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "message", "line"), TROUBLES, ids=[line for _, _, line in TROUBLES])
def test_exit_codes_and_one_line_each(places, code, message, line):
    result = call(*(Template(word).substitute(places) for word in line.split()))
    said = " ".join((result.output + result.stderr).replace("│", " ").split())
    assert result.exit_code == code, f"{said} {result.exception!r}"
    assert message in said
    assert "Traceback" not in said
    assert not places["out"].exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["analyze", "reference", "--out", "x.json", "windws=[4]"], 2, ""),  # the first process says it for all
        (["analyze", "./nowhere", "--out", "x.json"], 3, "rank 1: error: ./nowhere does not exist"),
    ],
)
def test_what_one_of_several_processes_says(tmp_path, words, code, said):
    done = subprocess.run(
        [sys.executable, "-m", "layerboost.cli", *words], cwd=tmp_path, env=os.environ | {"RANK": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code
    assert ("error" in done.stderr) == bool(said)
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("verb", "said"), [("analyze", "the same command goes on"), ("evaluate", "nothing was written")]
)
def test_interrupted(monkeypatch, tmp_path, verb, said):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"layerboost.{verb}"), "run", interrupted)
    done = call(verb, "reference", "--out", tmp_path / "out.json", *(["--against", "x"] if verb == "evaluate" else []))
    assert done.exit_code == 130
    assert f"interrupted; {said}" in done.output


def test_what_the_file_system_refuses_is_one_line(tmp_path):
    done = call("inspect", tmp_path / ("long" * 100))
    assert done.exit_code == EnvironmentTrouble.exit_code
    assert "File name too long" in done.output
    assert "Traceback" not in done.output


def test_dry_run_does_nothing(tiny, tmp_path):
    result = call("run", tiny, "--out", tmp_path / "run", "--dry-run", *SMALL)
    assert result.exit_code == 0, result.output
    assert "GB of memory" in result.output
    assert "MB of disk" in result.output
    assert "lm-eval" not in result.output
    assert not (tmp_path / "run").exists()


def test_dry_run_says_what_is_current(tiny, tmp_path):
    assert call("run", tiny, "--out", tmp_path / "run", *SMALL).exit_code == 0
    shown = call("run", tiny, "--out", tmp_path / "run", "--dry-run", *SMALL).output
    assert shown.count("current, is skipped") == 6
    shown = call("run", tiny, "--out", tmp_path / "run", "--dry-run", *SMALL, "heal.tokens=8k").output
    assert shown.count("current, is skipped") == 3


def test_help_and_version_load_no_torch():
    for words in (["--help"], ["--version"], ["run", "--help"], []):
        code = (
            "import sys\nfrom layerboost.cli import app\n"
            f"try:\n    app({words!r})\nexcept SystemExit:\n    pass\n"
            "loaded = {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\nassert not loaded, loaded"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert call("--version").output.strip() == f"layerboost {__version__}"


def test_import_layerboost_loads_no_torch():
    code = (
        "import sys, layerboost\nassert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "layerboost.LayerPlan, layerboost.plan\nassert not hasattr(layerboost, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trouble_of_any_process_is_told(tmp_path):
    """Of all that is said, the first process says it; but what ends one of the others is known to that one alone."""
    for rank, told in (("0", "error: "), ("1", "rank 1: error: ")):
        command = [sys.executable, "-m", "layerboost.cli", "inspect", str(tmp_path / "nowhere")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RANK": rank})
        assert done.returncode == 3
        assert done.stderr.startswith(told)


@pytest.mark.parametrize("setting", ["seed=99999999999999999999", "data_seed=99999999999999999999", "seed=-1"])
def test_seeds_are_of_32_bits(setting, tmp_path):
    done = call("heal", "hybrid", "--teacher", "teacher", "--out", tmp_path / "out", setting)
    assert done.exit_code == 2
    assert setting.partition("=")[0] in done.output


def test_the_package_has_every_verb():
    """What takes no `run` of its own: these write others' artifacts, or several at once."""
    without = {"calibrate", "demo", "families", "run"}
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names - without <= set(layerboost.__all__)
    assert all(callable(getattr(layerboost, name).run) for name in names - without)
