"""evaluate: three models in the memory of two, and lm-eval's own numbers for each of them."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import layerboost  # noqa: F401, teaches transformers the hybrids
from layerboost import convert, evaluate
from layerboost.artifacts import MANIFEST, Evaluation, TaskScore
from layerboost.cli import app
from layerboost.data.sequences import Sequences
from layerboost.errors import DataError, EnvironmentTrouble, UsageError
from layerboost.model.loading import load_model, load_original
from tests.harness import only_own_tasks, small_tasks, write_task
from tests.tiny import FAMILIES, FULL, NONE, linear, some_tokens, window

pytest.importorskip("lm_eval")

LAYERS = [window(3), linear("lolcats", window=4), NONE, FULL]
NAMES = ["choose", "write", "read"]
FEW = {"texts": 2, "answers": 2, "length": 64, "completions": 0}


@pytest.fixture(scope="module", autouse=True)
def _own_tasks(tmp_path_factory):
    with only_own_tasks(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return small_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Per model, its checkpoint; the healed one has other weights than the converted one."""
    root = tmp_path_factory.mktemp("models")
    plan = root / "plan.json"
    plan.write_text(json.dumps({"schema": 1, "layers": [layer.entry() for layer in LAYERS]}))
    for name in ("converted", "healed"):
        convert.run(tiny, plan, out=root / name)
    weights = load_file(root / "healed" / "model.safetensors")
    changed = {name: 1.05 * tensor if "mlp" in name else tensor for name, tensor in weights.items()}
    save_file(changed, root / "healed" / "model.safetensors", {"format": "pt"})
    (root / "healed" / MANIFEST).unlink()  # which says what was written
    return {"base": tiny, "converted": root / "converted", "healed": root / "healed"}


def alone(folder, tasks):
    """What the harness finds when it is given a checkpoint's folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = {}
    for name in NAMES:
        judge = HFLM(pretrained=str(folder), batch_size=3, device="cpu")
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found |= simple_evaluate(judge, tasks=[name], task_manager=manager, log_samples=False)["results"]
    return found


def test_task_numbers_are_those_of_the_harness_on_each_folder(folders, tasks, capfd):
    config = evaluate.Config(**FEW, tasks=NAMES, task_folder=tasks, task_batch=3)
    found = evaluate.run(folders["healed"], folders["base"], config)
    assert "tasks: 9/9" in capfd.readouterr().err
    for model, folder in folders.items():
        assert list(found.tasks[model]) == NAMES
        expected = alone(folder, tasks)
        for task, metrics in found.tasks[model].items():
            for metric, score in metrics.items():
                assert score.value == expected[task][f"{metric},none"]
                error = expected[task][f"{metric}_stderr,none"]
                assert score.stderr == (None if error == "N/A" else error)
                assert score.documents == 6
    assert set(found.tasks["base"]["read"]) == {"word_perplexity", "bits_per_byte"}
    for task, metric in (("read", "word_perplexity"), ("write", "letters")):
        assert len({metrics[task][metric].value for metrics in found.tasks.values()}) == 3
    assert found.provenance["lm_eval"]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_weights_change_no_number(checkpoints, family):
    folder = checkpoints[family]
    base, stock, separate = load_original(folder), load_model(folder), load_original(folder)
    separate.convert(LAYERS)
    tokens = some_tokens(5, 24)
    data = {"text": Sequences(tokens, torch.ones_like(tokens, dtype=torch.bool))}
    shared = evaluate.measure(base, {"base": base, "converted": evaluate.Borrowing(base, LAYERS)}, data, 2)
    apart = evaluate.measure(stock, {"base": stock, "converted": separate}, data, 2)
    for model in shared:
        for metric, values in shared[model].items():
            np.testing.assert_array_equal(values, apart[model][metric])
    assert (shared["converted"]["text.kl"] > 0).all()
    with evaluate.model_of(evaluate.Borrowing(base, LAYERS)) as model:
        assert model is base
        assert model.plan == LAYERS
    assert base.plan == [FULL] * 4
    assert evaluate._greedy(base, tokens[:1], 6) == evaluate._greedy(stock, tokens[:1], 6)


@pytest.mark.parametrize("asked", [{"repetition_penalty": 1.3}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}])
@torch.no_grad()
def test_completions_are_greedy_whatever_the_checkpoint_asks_for(folders, asked):
    model = load_model(folders["base"])
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    tokens = some_tokens(1, 9)
    wanted = tokens
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    assert evaluate._greedy(model, tokens, 8) == wanted[0, 9:].tolist()
    assert getattr(model.generation_config, next(iter(asked))) == next(iter(asked.values()))


def test_two_models_are_loaded(folders, monkeypatch):
    loaded = []
    for name in ("load_model", "load_original"):
        function = getattr(evaluate, name)
        monkeypatch.setattr(evaluate, name, lambda *a, f=function, **k: loaded.append(f(*a, **k)) or loaded[-1])
    evaluate.run(folders["healed"], folders["base"], evaluate.Config(**FEW))
    assert len(loaded) == 2


def test_trouble_is_said_before_any_model_is_loaded(folders, tasks, monkeypatch):
    def told(error, name):
        with pytest.raises(error) as caught:
            evaluate.run(folders["healed"], folders["base"], evaluate.Config(tasks=[name], task_folder=tasks))
        return str(caught.value)

    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "did you mean choose?" in told(UsageError, "chose")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'layerboost[tasks]'" in told(EnvironmentTrouble, "choose")


def test_groups_are_one_row_where_they_have_a_score_of_their_own(folders, tasks, tmp_path):
    for path in tasks.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    scored = {"group": "scored", "task": ["choose"], "aggregate_metric_list": [{"metric": "acc"}]}
    for group in ({"group": "both", "task": ["choose", "read"]}, scored):
        (tmp_path / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    config = evaluate.Config(**FEW, tasks=["both", "scored"], task_folder=tmp_path, task_limit=3)
    found = evaluate.run(folders["healed"], folders["base"], config).tasks["healed"]
    assert set(found) == {"choose", "read", "scored"}
    assert found["scored"]["acc"].value == found["choose"]["acc"].value
    assert found["choose"]["acc"].documents == 3


def test_what_is_not_finite_is_said_by_name(folders, tmp_path, capfd):
    (tmp_path / "odd.py").write_text("def nothing(doc, results):\n    return {'score': float('nan')}\n")
    write_task(tmp_path, "void", [{"text": "amber"}] * 2, output_type="loglikelihood", doc_to_target=" basil",
               metric_list=[{"metric": "score", "aggregation": "mean", "higher_is_better": True}])  # fmt: skip
    with open(tmp_path / "void.yaml", "a") as file:
        file.write("process_results: !function odd.nothing\n")
    found = evaluate.run(
        folders["healed"], folders["base"], evaluate.Config(**FEW, tasks=["void"], task_folder=tmp_path)
    )
    said = capfd.readouterr().err
    for model in ("base", "converted", "healed"):
        assert f"{model}: score of task void is no finite number" in said
    assert found.tasks["base"]["void"]["score"].value is None
    (tmp_path / "odd.py").write_text("def nothing(doc, results):\n    return {}\n")
    with pytest.raises(DataError, match="task void: lm-eval finds no metric"):
        evaluate.run(folders["healed"], folders["base"], evaluate.Config(**FEW, tasks=["void"], task_folder=tmp_path))


def test_rows_put_the_models_side_by_side():
    def scores(value, **more):
        return {"arc": {"acc": TaskScore(value=value, documents=5, **more)}}

    tasks = {"base": scores(0.5, stderr=0.1, higher_is_better=True), "converted": {"arc": {}}, "healed": scores(0.25)}
    row, *others = Evaluation(models={}, tasks=tasks).task_rows()
    assert not others
    assert row.name == "arc: acc ↑"
    assert row.scores == ["0.500 ± 0.100", "missing", "0.250"]
    assert row.difference == "-0.250"
    (row,) = Evaluation(models={}, tasks=tasks | {"healed": scores(None)}).task_rows()
    assert row.scores[-1] == "no number"
    assert row.difference == ""


def test_the_command_prints_tasks_and_follows_changed_files(folders, tasks, tmp_path):
    words = ["evaluate", folders["healed"], "--against", folders["base"], "--out", tmp_path / "evaluation.json"]
    settings = [*(f"{key}={value}" for key, value in FEW.items()), "tasks=[choose]", f"task_folder={tasks}"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, *settings)])
    assert done.exit_code == 0, done.output
    assert "lm-eval task" in done.output
    assert "healed - base" in done.output
    assert "choose: acc ↑" in done.output
    raw = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(raw["tasks"]["converted"]["choose"]["acc"]) == {"value", "stderr", "higher_is_better", "documents"}
    assert "task choose.yaml" in raw["inputs"]


def test_completions_beyond_the_context_are_refused_before_a_model_is_loaded(folders, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("loaded"))
    config = evaluate.Config(**FEW | {"completions": 1, "new_tokens": 999})
    with pytest.raises(DataError, match="completions of 999 new_tokens after"):
        evaluate.run(folders["healed"], folders["base"], config)
