"""The recipe of the paper's setting: planned at full size from a configuration, and run in miniature."""

import json

import pytest
from transformers import Qwen3Config
from typer.testing import CliRunner

from layerboost import pipeline
from layerboost.artifacts import Evaluation, Plan, load
from layerboost.cli import app
from layerboost.errors import UsageError
from layerboost.recipe import load_recipe
from tests.harness import only_own_tasks, small_tasks
from tests.test_pipeline import SMALL

QWEN3_4B = Qwen3Config(
    vocab_size=151_936, hidden_size=2_560, intermediate_size=9_728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True, dtype="bfloat16",
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
KEEP = ("plan.kv_reduction", "plan.at_least", "plan.measuring", "analyze.windows")  # what the recipe says itself


def test_a_dry_run_needs_the_configuration_alone(tmp_path):
    QWEN3_4B.save_pretrained(tmp_path / "qwen3-4b")
    words = ["run", tmp_path / "qwen3-4b", "--recipe", "paper", "--out", tmp_path / "run", "--dry-run"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "4,022,468,096 parameters" in done.output
    assert "without lm-eval tasks" in done.output
    for stage in ("analyze", "plan", "convert", "heal", "evaluate", "bench", "report"):
        assert stage in done.output
    assert not (tmp_path / "run").exists()


def test_in_miniature(tiny, tmp_path_factory):
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("paper")
    tasks = small_tasks(root)
    with only_own_tasks(root / "datasets"):
        recipe = load_recipe("paper", [
            *(setting for setting in SMALL if not setting.startswith(KEEP)), "analyze.windows=[4]",
            "analyze.tasks=[choose]", f"analyze.task_folder={tasks}",
            "evaluate.tasks=[choose, write]", f"evaluate.task_folder={tasks}", "bench.engine=transformers",
        ])  # fmt: skip
        pipeline.run(tiny, recipe, out=root / "run")
    plan = load(Plan, root / "run" / "plan.json")
    assert plan.planner["tiers"]["score"] == "benchmarks"
    assert plan.predicted["kv_share"] <= 0.5
    assert plan.predicted["engine"] == "vllm"
    assert all("(benchmarks)" in layer.reason for layer in plan.layers)
    evaluation = load(Evaluation, root / "run" / "evaluation.json")
    assert list(evaluation.tasks) == ["base", "converted", "healed"]
    assert all(list(found) == ["choose", "write"] for found in evaluation.tasks.values())
    page = (root / "run" / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "choose: acc ↑" in page
    written = json.loads((root / "run" / "result.json").read_text())
    assert written["plan"]["layers"] == [layer.mixer for layer in plan.layers]
    assert written["tasks"]["healed"]["choose"]["acc"] == evaluation.tasks["healed"]["choose"]["acc"].value


def test_a_slip_in_a_task_is_found_before_any_work(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    with only_own_tasks(tmp_path / "datasets"), pytest.raises(UsageError, match="did you mean choose"):
        pipeline.run(
            tiny,
            load_recipe(
                "paper",
                [
                    "analyze.windows=[4]",
                    "heal.length=64",
                    "bench.serving={prompt_tokens: 64, output_tokens: 16}",
                    "evaluate.tasks=[chose]",
                    f"evaluate.task_folder={small_tasks(tmp_path)}",
                ],
            ),
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
