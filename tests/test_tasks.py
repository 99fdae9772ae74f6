import copy
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from layerboost import passes, tasks
from layerboost.errors import DataError, EnvironmentTrouble, UsageError
from layerboost.measured import Measured
from layerboost.model.loading import load_original
from layerboost.progress import unheard
from layerboost.tasks import load_tasks, task_scores
from tests.harness import WORDS, only_own_tasks, write_task
from tests.tiny import FULL, NONE, linear, tokenizer, window

pytest.importorskip("lm_eval")

PLANS = [[FULL] * 4, [FULL, window(3), FULL, NONE], [FULL, window(3), linear("linear", feature_map="elu"), FULL]]


@pytest.fixture(scope="module", autouse=True)
def own_tasks(tmp_path_factory):
    with only_own_tasks(tmp_path_factory.mktemp("datasets")) as patch:
        yield patch


@pytest.fixture(scope="module")
def model(tiny):
    return load_original(tiny)


@pytest.fixture(scope="module")
def stock(tiny):
    return harness_model(AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stock):
    """Three tasks and their data."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS, 3 + n)) for n in range(8)]
    endless = written(stock, prompts, {"until": [], "max_gen_toks": 12})
    common = Counter(c for text in endless for c in set(text[2:]) if c.isascii() and c.isprintable()).most_common(2)
    settings = {"until": [stop for stop, _ in common], "max_gen_toks": 12}
    texts = written(stock, prompts, settings)
    assert sum(0 < len(text) < len(full) for text, full in zip(texts, endless, strict=True)) >= 2
    documents = [
        {"text": p, "choices": [f" {w}" for w in rng.choice(WORDS, 3, replace=False)], "gold": n % 3, "written": t}
        for n, (p, t) in enumerate(zip(prompts, texts, strict=True))
    ]
    for document in documents[::4]:
        document["written"] = "something else"
    documents[0]["text"] *= 20  # longer than the model's context
    write_task(root, "choose", documents, output_type="multiple_choice", doc_to_choice="{{choices}}",
               doc_to_target="gold", num_fewshot=1, fewshot_split="test")  # fmt: skip
    write_task(root, "write", documents, output_type="generate_until", generation_kwargs=settings,
               doc_to_target="{{written}}", metric_list=[{"metric": "exact_match"}])  # fmt: skip
    write_task(root, "read", documents, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
               metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    return root


def written(judge, prompts, settings):
    requests = [SimpleNamespace(args=(prompt, settings)) for prompt in prompts]
    return judge.generate_until(requests, disable_tqdm=True)


def harness_model(model, reader=None):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=reader or tokenizer(), backend="causal", batch_size=3, device="cpu")


def harness_samples(model, folder, names, limit=None):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)["samples"]


def test_every_plan_scores_what_the_harness_finds_itself(model, stock, folder, capfd):
    names = ["choose", "write", "read"]
    heard = []
    got, forwards = task_scores(
        model, tokenizer(), PLANS, load_tasks(names, folder), advance=lambda steps=1, note="": heard.append(steps)
    )
    assert capfd.readouterr() == ("", "")
    assert sum(heard) == len(PLANS)
    assert 1 < forwards <= len(PLANS)
    for number, (plan, scores) in enumerate(zip(PLANS, got, strict=True)):
        with model.mixed(dict(enumerate(plan))):
            samples = harness_samples(stock if number == 0 else harness_model(model), folder, names)
        assert list(scores) == names
        np.testing.assert_array_equal(scores["choose"], [s["acc"] for s in samples["choose"]])
        np.testing.assert_array_equal(scores["write"], [s["exact_match"] for s in samples["write"]])
        likelihoods, words = np.array([s["word_perplexity"] for s in samples["read"]]).T
        np.testing.assert_allclose(np.log(-scores["read"]) * -words, likelihoods, rtol=0, atol=1e-3)
    assert got[0]["write"].sum() >= 4
    assert any((got[0][name] != got[1][name]).any() for name in ("choose", "write"))
    limited, _ = task_scores(model, tokenizer(), PLANS[:1], load_tasks(["choose"], folder), limit=3)
    assert limited[0]["choose"].shape == (3,)


def test_answers_that_are_known_are_not_computed_again(model, folder, tmp_path, monkeypatch):
    names = ["choose", "write", "read"]
    wanted, forwards = task_scores(model, tokenizer(), PLANS, load_tasks(names, folder))
    kept = Measured(tmp_path / "kept")
    task_scores(model, tokenizer(), PLANS[:2], load_tasks(names, folder), kept=kept)
    again, fewer = task_scores(model, tokenizer(), PLANS, load_tasks(names, folder), kept=Measured(tmp_path / "kept"))
    assert fewer < forwards
    every = Measured(tmp_path / "kept")
    task_scores(model, tokenizer(), PLANS, load_tasks(names, folder), kept=every)
    monkeypatch.setattr(tasks, "finals", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("written again"))
    third, _ = task_scores(model, tokenizer(), PLANS, load_tasks(names, folder), kept=every)
    for scores in (again, third):
        for one, other in zip(scores, wanted, strict=True):
            assert {name: own.tolist() for name, own in one.items()} == {n: own.tolist() for n, own in other.items()}


def test_likelihoods_are_the_harness_own(model, stock):
    rng = np.random.default_rng(1)
    shapes = [(1, 1), (5, 3), (40, 1), (9, 17), (250, 6), (250, 7), (300, 20), (2, 256)]
    pairs = [tuple(tuple(rng.integers(2, 258, n).tolist()) for n in shape) for shape in shapes]
    greedy = stock.model.generate(torch.tensor([pairs[1][0]]), max_new_tokens=3, do_sample=False)[0].tolist()
    pairs[1] = pairs[1][0], tuple(greedy[-3:])
    found, computed, tokens = tasks._likelihoods(model, 256, pairs, PLANS, Measured(), unheard)
    assert computed == tokens * (4 + 3 + 2)  # the second shares one layer with the first, the third two with others
    for number, (plan, answers) in enumerate(zip(PLANS, found, strict=True)):
        with model.mixed(dict(enumerate(plan))):
            judge = stock if number == 0 else harness_model(model)
            expected = judge._loglikelihood_tokens([((None, None), list(c), list(k)) for c, k in pairs], True)
        got = [answers[pair] for pair in pairs]
        np.testing.assert_allclose([g[0] for g in got], [e[0] for e in expected], rtol=1e-5, atol=1e-4)
        assert [g[1] for g in got] == [e[1] for e in expected]
    assert found[0][pairs[1]][1]


@pytest.mark.parametrize("begins", [False, True])
def test_texts_are_split_into_tokens_as_the_harness_does(model, stock, begins):
    reader = tokenizer()
    if begins:  # as Llama's tokenizer, which begins every text by itself
        reader = copy.deepcopy(reader)
        reader.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", 0)]
        )
    texts = [("", "amber"), ("basil ", "cedar"), (" ", "delta"), ("<|end|>ember", " flint"), ("", "<|end|>grove")]
    requests = [SimpleNamespace(args=pair) for pair in texts]
    judge, asked = harness_model(stock.model, reader), []
    judge._loglikelihood_tokens = lambda requests, **_: asked.extend(requests)
    judge.loglikelihood(requests, disable_tqdm=True)
    player = tasks._player_class()(model, reader)
    player.loglikelihood(requests)
    assert list(player.likelihoods) == [(tuple(c) or (0,), tuple(k)) for _, c, k in asked]


def test_memory_is_bounded_without_changing_scores(model, monkeypatch):
    pairs = [((2, 3, 4), (5, n)) for n in range(6, 12)]
    whole, _, _ = tasks._likelihoods(model, 256, pairs, PLANS, Measured(), unheard)
    monkeypatch.setattr(passes, "_STREAM_BYTES", 1)
    monkeypatch.setattr(tasks, "CHUNK_ELEMENTS", 258 * 5)
    monkeypatch.setattr(tasks, "batch_rows", lambda *_: 4)
    parts, computed, tokens = tasks._likelihoods(model, 256, pairs, PLANS, Measured(), unheard)
    assert computed == 3 * 4 * tokens
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose([a[p][0] for p in pairs], [b[p][0] for p in pairs], atol=1e-5)


def test_groups_count_as_all_of_their_tasks(model, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["choose", "read"]}))
    got, _ = task_scores(model, tokenizer(), PLANS[:1], load_tasks(["both", "choose"], tmp_path), limit=2)
    assert got[0]["both"].shape == (4,)
    np.testing.assert_array_equal(got[0]["both"][:2], got[0]["choose"])


def test_trouble_is_told_in_a_line(model, folder, tmp_path, monkeypatch):
    def told(error, name, folder=tmp_path):
        with pytest.raises(error) as caught:
            task_scores(model, tokenizer(), PLANS[:1], load_tasks([name], folder), limit=1)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    message = told(UsageError, "chose", folder)
    assert "did you mean choose" in message
    assert "choose, read, write" in message
    write_task(tmp_path, "gone", [])
    (tmp_path / "gone.jsonl").unlink()
    assert "gone" in told(DataError, "gone")
    write_task(tmp_path, "wordy", [{"text": "a"}], output_type="generate_until", doc_to_target="text",
               generation_kwargs={"max_gen_toks": 300}, metric_list=[{"metric": "exact_match"}])  # fmt: skip
    assert "300" in told(DataError, "wordy")
    write_task(tmp_path, "foreign", [{"text": "a"}], dataset_kwargs={"trust_remote_code": True})
    assert "trust_remote_code" in told(UsageError, "foreign")
    write_task(tmp_path, "faulty", [{"text": "a"}], output_type="multiple_choice", doc_to_choice="{{nothing.here}}",
               doc_to_target="0")  # fmt: skip
    assert "faulty" in told(DataError, "faulty")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'layerboost[tasks]'" in told(EnvironmentTrouble, "choose", folder)


def test_data_that_are_not_here_are_said(own_tasks):  # the last test: it reads all tasks that the harness brings
    own_tasks.undo()
    with pytest.raises(DataError, match="arc_easy cannot be read from this machine"):
        tasks.load_tasks(["arc_easy"])
