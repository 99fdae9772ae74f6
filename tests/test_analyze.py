"""Sensitivity: what the file holds, each damage against the slow way, and how much data is looked at."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch

from layerboost import analyze
from layerboost.analyze.estimators import ESTIMATORS
from layerboost.analyze.looking import Looking, kinds
from layerboost.artifacts import Sensitivity, load
from layerboost.data.corpus import open_corpus, standard_library
from layerboost.data.probes import PROBES
from layerboost.data.samples import probe_lengths, samples
from layerboost.data.sequences import text_sequences
from layerboost.errors import DataError, UsageError
from layerboost.model.loading import describe, load_original, load_tokenizer, read_config
from layerboost.tasks import load_tasks, task_scores
from tests.tiny import (
    BEGIN,
    FULL,
    NONE,
    beginning_tokenizer,
    linear,
    make_checkpoint,
    reference_logits,
    tokenizer,
    window,
)

SMALL = {"texts": 4, "answers": 4, "length": 96, "windows": [4, 16]}
QUICK = SMALL | {"estimators": []}
TRIED = [NONE, window(4), window(16)]
TEXT_AND_RECALL = {"text_nll", "text_kl", "recall_nll", "recall_kl", *PROBES}


def run(folder, **settings):
    return analyze.run(folder, analyze.Config(**(QUICK | settings)))


def looked_at(folder, turn=0, **settings):
    """The sequences behind such an analysis."""
    config = analyze.Config(**(QUICK | settings))
    return Looking(load_original(folder), tokenizer(), config, config.windows).data(turn)


def one_changed(layer, plan):
    return [plan if i == layer else FULL for i in range(4)]


def slow_damage(folder, layer, plan, sequences):
    """Per sequence, KL, growth of NLL, and accuracy lost, of whole stock models with hooks."""
    rows = []
    for tokens, scored in zip(sequences.tokens, sequences.scored, strict=True):
        teacher, student = (
            reference_logits(folder, layers, tokens[None])[0, :-1].double().log_softmax(-1)[scored[1:]]
            for layers in (one_changed(layer, FULL), one_changed(layer, plan))
        )
        target = tokens[1:][scored[1:]]
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        nll = [-float(p.gather(-1, target[:, None]).mean()) for p in (teacher, student)]
        hit = [float((p.argmax(-1) == target).double().mean()) for p in (teacher, student)]
        rows.append((float(kl), nll[1] - nll[0], hit[0] - hit[1]))
    return np.array(rows).T


def assert_is(found, values):
    np.testing.assert_allclose(found.per_sequence, values, rtol=0, atol=2e-4)


def numbers(found):
    return [{c.plan.label: c.damage for c in layer} for layer in found.layers]


def test_what_the_file_holds(tiny, tmp_path):
    path = tmp_path / "sensitivity.json"
    analyze.run(tiny, analyze.Config(**SMALL), out=path)
    raw = json.loads(path.read_text())
    assert raw["schema"] == 1
    assert raw["model"]["num_layers"] == 4
    assert raw["model"]["kv_shape"] == {"num_key_value_heads": 2, "head_dim": 8, "bytes_per_value": 4}
    assert len(raw["layers"]) == 4
    for layer in raw["layers"]:
        assert [(c["mixer"], c["window"]) for c in layer] == [
            ("no_attention", None), ("sliding_attention", 4), ("sliding_attention", 16),
        ]  # fmt: skip
        for candidate in layer:
            assert set(candidate["damage"]) == TEXT_AND_RECALL | set(ESTIMATORS)
            for metric, damage in candidate["damage"].items():
                count = 4 if not metric.startswith("recall") else 12
                assert len(damage["per_sequence"]) == count
                assert damage["low"] <= damage["mean"] <= damage["high"]
                assert damage["mean"] == pytest.approx(np.mean(damage["per_sequence"]))
    assert set(raw["baseline"]) == TEXT_AND_RECALL - {"text_kl", "recall_kl"}
    assert raw["baseline"]["text_nll"]["mean"] > 1
    assert set(raw["costs"]) == {"measured", *ESTIMATORS}
    # 4 sequences of text and of each of 3 probes; a change in layer l leaves 4 - l layers to compute
    measured = raw["costs"]["measured"]
    assert measured["tokens"] == raw["provenance"]["tokens"] == 4 * 4 * 96
    assert measured["forwards"] == pytest.approx((4 + 3 * (4 + 3 + 2 + 1)) / 4)
    assert all(cost["tokens"] == 4 * 96 for name, cost in raw["costs"].items() if name != "measured")
    assert all(cost["seconds"] >= 0 and cost["forwards"] >= 1 for cost in raw["costs"].values())
    resolution = raw["resolution"]
    assert resolution["confidence"] == 0.95
    assert resolution["weights"] == {"text_kl": 0.6, "recall_kl": 0.4}
    assert set(resolution["ranking"]) == {plan.label for plan in TRIED}
    assert all(sorted(itertools.chain(*groups)) == [0, 1, 2, 3] for groups in resolution["ranking"].values())
    assert [resolution[key] for key in ("kv_reduction", "stability", "stopped")] == [None] * 3
    assert raw["provenance"]["length"] == 96
    assert raw["provenance"]["distance"] == [48]
    assert load(Sensitivity, path).inputs["text"] == raw["provenance"]["corpus_digest"]


@pytest.mark.parametrize("plan", [NONE, window(4)], ids=["removal", "window"])
def test_damage_is_that_of_the_whole_model(tiny, plan):
    """Recomputed the slow way, sequence by sequence."""
    layer = 2
    found = next(c for c in run(tiny).layers[layer] if c.plan == plan).damage
    data = samples(
        standard_library(), tokenizer(), 258, split="train", texts=4, answers=4, length=96, distance=48, seed=0
    )  # fmt: skip
    kl, nll, _ = slow_damage(tiny, layer, plan, data["text"])
    assert_is(found["text_kl"], kl)
    assert_is(found["text_nll"], nll)
    kl, nll, hit = np.concatenate([slow_damage(tiny, layer, plan, data[probe]) for probe in PROBES], 1)
    assert_is(found["recall_kl"], kl)
    assert_is(found["recall_nll"], nll)
    for n, probe in enumerate(PROBES):
        assert_is(found[probe], hit[4 * n : 4 * n + 4])


def test_the_same_seed_gives_the_same_numbers(tiny):
    runs = [numbers(analyze.run(tiny, analyze.Config(**SMALL, seed=seed))) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_several_distances(tiny):
    found, near = run(tiny, distance=[20, 60]), run(tiny, distance=20)
    assert found.provenance["distance"] == [20, 60]
    for one, other in zip(numbers(found), numbers(near), strict=True):
        for label, damage in one.items():
            assert set(damage) == TEXT_AND_RECALL | {f"recall_{m}@{d}" for m in ("kl", "nll") for d in (20, 60)}
            for metric in ("recall_kl", "recall_nll"):
                apart = [damage[f"{metric}@{distance}"].per_sequence for distance in (20, 60)]
                assert damage[metric].per_sequence == apart[0] + apart[1]
                assert list(map(len, apart)) == [12, 12]
                assert apart[0] == pytest.approx(other[label][metric].per_sequence, abs=1e-5)
            for probe in PROBES:
                assert len(damage[probe].per_sequence) == 8
                assert damage[probe].per_sequence[:4] == other[label][probe].per_sequence
            assert damage["text_kl"] == other[label]["text_kl"]
    data = looked_at(tiny, distance=[20, 60])
    kl = np.concatenate([slow_damage(tiny, 1, NONE, data[f"{probe}@60"])[0] for probe in PROBES])
    assert_is(found.layers[1][0].damage["recall_kl@60"], kl)
    with pytest.raises(DataError, match="within a window of 64"):
        run(tiny, windows=[64], length=128, distance=[100, 63])


def test_answers_to_long_prompts(tiny):
    found = run(tiny, long_answers=5, long_length=160)
    long = looked_at(tiny, long_answers=5, long_length=160)["long"]
    assert long.tokens.shape == (5, 160)
    assert long.scored[:, -1].all()
    assert not long.scored[:, :-2].any()
    kl, nll, hit = slow_damage(tiny, 3, NONE, long)
    damage = found.layers[3][0].damage
    assert_is(damage["answer_kl"], kl)
    assert_is(damage["answer_nll"], nll)
    assert_is(damage["answer"], hit)
    assert found.baseline["answer"].mean >= 0
    assert len(found.baseline["answer_nll"].per_sequence) == 5
    # four times as long as other probes, as far as the context of 256 allows
    assert looked_at(tiny, long_answers=1, length=64)["long"].tokens.shape == (1, 256)
    assert looked_at(tiny, long_answers=2)["long"].tokens.shape == (2, 256)
    with pytest.raises(DataError, match=r"long prompts of 64 tokens .* within a window of 40; .* at least 80"):
        run(tiny, long_answers=2, long_length=64, windows=[40])


@torch.no_grad()
def test_generations(tiny):
    """How much earlier greedy decoding of the changed model leaves what the original writes."""
    found = run(tiny, generations=4, new_tokens=6, answers=2)
    model = load_original(tiny)
    prompts = looked_at(tiny, generations=4, new_tokens=6)["text"].tokens[:, :48]

    def write(plan, layer):
        with model.mixed({layer: plan}):
            return model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=6,
                min_new_tokens=6, pad_token_id=1,
            )[:, 48:]  # fmt: skip

    original = write(FULL, 0)
    assert found.baseline["generation"].per_sequence == [1.0] * 4
    seen = set()
    for layer, candidates in enumerate(found.layers):
        for candidate in candidates:
            same = (write(candidate.plan, layer) == original).long().cumprod(1).double().mean(1)
            assert_is(candidate.damage["generation"], 1 - same)
            seen |= set(candidate.damage["generation"].per_sequence)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generations": 5}, "generations 5 begin with 4 texts; ask for as many texts or fewer generations"),
        ({"generations": 2, "new_tokens": 209}, "48 tokens of text and 209 new_tokens do not fit .* context of 256"),
    ],
)
def test_generations_that_cannot_be_had(tiny, settings, message):
    with pytest.raises(DataError, match=message):
        looked_at(tiny, **settings)


def write_prompts(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    return path


ROWS = [
    {"text": "def add(a, b):"},
    {"prompt": "The capital of France is", "answer": " Paris"},
    {"prompt": "", "answer": "a bee"},
    {"text": "for row in rows: print(row) " * 5},
]


def test_prompts_of_a_users_own(tiny, tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl", *ROWS)
    found = run(tiny, prompts=path)
    data = looked_at(tiny, prompts=path)["prompts"]
    assert data.scored.sum(1).tolist() == [13, 6, 4, 139]  # tokens are bytes, and a first one cannot be predicted
    assert bytes(tokenizer().decode(data.tokens[1][data.scored[1]]), "utf-8") == b" Paris"
    kl, nll, hit = slow_damage(tiny, 1, NONE, data)
    damage = found.layers[1][0].damage
    assert_is(damage["prompts_kl"], kl)
    assert_is(damage["prompts_nll"], nll)
    assert_is(damage["prompts"], hit)


def test_prompts_may_hold_what_json_may(tiny, tmp_path):
    """Other ends of lines inside a string, and half a character."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\r\n{"text": "half \\ud83d of it"}\n', encoding="utf-8")
    assert looked_at(tiny, prompts=path)["prompts"].scored.sum(1).tolist() == [
        len("one\u2028two\u0085three".encode()) - 1, len("half \ufffd of it".encode()) - 1
    ]  # fmt: skip


def test_padding_to_the_right_changes_nothing(tiny, tmp_path):
    """A short row beside a long one, and beside one as short."""
    damage = [
        run(tiny, prompts=write_prompts(tmp_path / "prompts.jsonl", ROWS[1], other)).layers
        for other in (ROWS[3], ROWS[1])
    ]
    for padded, alone in zip(*damage, strict=True):
        for one, other in zip(padded, alone, strict=True):
            for metric in ("prompts_kl", "prompts_nll", "prompts"):
                first, wanted = (c.damage[metric].per_sequence[0] for c in (one, other))
                assert first == pytest.approx(wanted, abs=1e-5)


def test_prompts_begin_as_the_tokenizer_begins_texts(tiny, tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "x" * 999, "answer": "y"}, {"text": "abc"})
    config = analyze.Config(**(QUICK | {"prompts": path}))
    found = Looking(load_original(tiny), beginning_tokenizer(), config, config.windows).data(0)["prompts"]
    assert found.tokens.shape[1] == 256
    assert (found.tokens[:, 0] == BEGIN).all()
    assert found.scored.sum(1).tolist() == [1, 3]


def test_prompts_longer_than_the_context_lose_their_beginning(tiny, tmp_path):
    rows = [{"prompt": "x" * 300, "answer": "end"}, {"text": "y" * 300}, {"prompt": "x", "answer": "z" * 300}]
    data = looked_at(tiny, prompts=write_prompts(tmp_path / "prompts.jsonl", *rows))["prompts"]
    assert data.tokens.shape == (3, 256)
    assert data.scored.sum(1).tolist() == [3, 255, 255]
    assert data.scored[0, -3:].all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "fine"}\n{"txt": "no"}\n', "prompts.jsonl line 2: must be a JSON object with the keys prompt and"),
        ('{"text": "fine"}\n\n{"prompt": "a", "answer": 3}\n', "prompts.jsonl line 3: must be a JSON object"),
        ('{"text": "fine"}\n["text"]\n', "prompts.jsonl line 2"),
        ("{not JSON}\n", "prompts.jsonl line 1"),
        ('{"text": "a", "answer": "b"}\n', "prompts.jsonl line 1"),
        ('{"text": "fine"}\n', "holds 1 usable lines, at least 2 are needed"),
        ('{"text": "fine"}\n{"text": "x"}\n{"prompt": "x", "answer": ""}\n', "holds 1 usable lines"),
        ("", "holds 0 usable lines"),
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_prompts_that_are_none(tiny, tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        looked_at(tiny, prompts=path)


def test_further_mixers(tiny):
    further = [linear("lolcats", 4), window(16, sink=True), linear("gla")]
    found = run(tiny, mixers=further, answers=2, estimators=list(ESTIMATORS))
    assert [[c.plan for c in layer] for layer in found.layers] == [[*TRIED, *further]] * 4
    assert set(found.resolution.ranking) == {plan.label for plan in [*TRIED, *further]}
    text = looked_at(tiny, answers=2)["text"]
    model = load_original(tiny)
    for candidate in found.layers[1]:
        assert set(candidate.damage) == TEXT_AND_RECALL | set(ESTIMATORS)
        with torch.no_grad():
            teacher = model(text.tokens).logits[:, :-1].double().log_softmax(-1)
            with model.mixed({1: candidate.plan}):
                student = model(text.tokens).logits[:, :-1].double().log_softmax(-1)
        assert_is(candidate.damage["text_kl"], (teacher.exp() * (teacher - student)).sum(-1).mean(1))
    for mixer in (FULL, NONE, window(4), further[0]):
        with pytest.raises(UsageError, match=rf"mixers: {mixer.label} is tried anyway; leave it out"):
            run(tiny, mixers=[further[0], mixer])


def test_probes_reach_beyond_the_windows_of_further_mixers(tiny):
    data = looked_at(tiny, mixers=[window(60, sink=True)])
    assert data["copy"].tokens.shape == (4, 240)
    with pytest.raises(DataError, match="within a window of 60"):
        run(tiny, mixers=[window(60, sink=True)], distance=50)


def test_native_windows_and_further_mixers(checkpoints):
    """Where a layer sees a window only, nothing is tried that sees more."""
    folder = checkpoints["gemma2"]
    further = [linear("lolcats", 4), linear("gla"), window(5, sink=True), window(20, sink=True)]
    found = analyze.candidates_for(describe("gemma2", folder, read_config(folder)), [4, 16], further)
    assert found == [[NONE, window(4), window(5, sink=True)], [*TRIED, *further]] * 2
    assert [len(layer) for layer in run(folder, mixers=further[1:3], texts=2, answers=2).layers] == [3, 5] * 2


def test_more_data_until_the_plan_is_stable(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", *ROWS)
    found = run(tiny, until_resolved=True, kv_reduction=1.0, prompts=prompts)
    assert (found.resolution.stopped, found.resolution.stability) == ("stable", 1.0)  # all layers have to go
    assert found.provenance["tokens"] == found.costs["measured"].tokens
    assert len(found.layers[0][0].damage["text_kl"].per_sequence) == 4


def test_more_data_until_the_cap(tiny, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "prompts.jsonl", *ROWS)
    shares = iter([0.5, 0.94, 0.94])
    monkeypatch.setattr(analyze, "plan_stability", lambda *_: next(shares))
    settings = {"until_resolved": True, "prompts": prompts, "estimators": ["cosine"]}
    found = run(tiny, max_tokens=6_000, **settings)
    resolution = found.resolution
    assert (resolution.stopped, resolution.stability, resolution.kv_reduction) == ("token cap", 0.94, 0.5)
    first, second, third = (looked_at(tiny, turn=turn, prompts=prompts) for turn in range(3))
    sizes = [sum(sequences.tokens.numel() for sequences in data.values()) for data in (first, second, third)]
    # the cap leaves no room for as much again
    assert found.provenance["tokens"] == found.costs["measured"].tokens == sum(sizes) <= 6_000
    assert sum(sizes) + sizes[2] > 6_000
    damage = found.layers[2][0].damage
    lengths = {metric: len(own.per_sequence) for metric, own in damage.items()}
    assert lengths == dict.fromkeys(damage, 12) | {
        "recall_kl": 36, "recall_nll": 36, "prompts_kl": 4, "prompts_nll": 4, "prompts": 4, "cosine": 4,
    }  # fmt: skip
    assert not torch.equal(first["text"].tokens, second["text"].tokens)
    assert_is(
        damage["text_kl"], np.concatenate([slow_damage(tiny, 2, NONE, d["text"])[0] for d in (first, second, third)])
    )
    assert len(found.baseline["text_nll"].per_sequence) == 12
    assert next(shares, None) is None


def test_no_text_is_looked_at_twice_and_looking_ends_with_it(tiny, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(4_500)))  # about four helpings of bytes, no two rows alike
    monkeypatch.setattr(analyze, "plan_stability", lambda *_: 0.5)
    found = run(tiny, until_resolved=True, text=text, texts=40)
    assert found.resolution.stopped == "no more text"
    rows: list[tuple[int, ...]] = []
    turns = 0
    while len(rows) == 40 * turns:
        helping = looked_at(tiny, turn=turns, text=text, texts=40)["text"].tokens.tolist()
        rows += map(tuple, helping)
        turns += 1
    assert turns > 1
    assert len(set(rows)) == len(rows) == len(found.layers[0][0].damage["text_kl"].per_sequence)
    everything = text_sequences(open_corpus(text).split("train"), tokenizer(), count=10_000, length=96, seed=5)
    assert len(everything) - 1 <= len(rows) <= len(everything)
    with pytest.raises(DataError, match="at least"):
        looked_at(tiny, turn=turns, text=text, texts=40)


def test_stability_decides_between_more_data_and_enough(tiny, monkeypatch):
    shares = [0.5, 0.94, 0.95, 1.0]
    for confidence, turns in ((0.95, 3), (0.9, 2), (0.99, 4)):
        left = iter(shares)
        monkeypatch.setattr(analyze, "plan_stability", lambda *_, left=left: next(left))
        found = run(tiny, until_resolved=True, confidence=confidence, texts=2, answers=2, windows=[4])
        assert found.resolution.stopped == "stable"
        assert found.resolution.stability == shares[turns - 1]
        assert len(found.layers[0][0].damage["text_kl"].per_sequence) == 2 * turns
        assert found.costs["measured"].tokens == turns * 4 * 2 * 96


def test_stability_at_a_budget_without_more_data(tiny):
    resolution = run(tiny, kv_reduction=0.5).resolution
    assert resolution.stopped is None
    assert resolution.kv_reduction == 0.5
    assert 0 < resolution.stability <= 1
    weights = {"text_nll": 1.0}
    found = run(tiny, weights=weights, confidence=0.6)
    assert (found.resolution.weights, found.resolution.confidence) == (weights, 0.6)
    worst = found.resolution.ranking["no_attention"][0][0]
    assert worst == int(np.argmax([layer[0].damage["text_nll"].mean for layer in found.layers]))


def test_names_that_are_none_are_told_before_anything_is_measured(tiny, monkeypatch):
    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr("layerboost.analyze.Scorer.__call__", never)
    with pytest.raises(
        UsageError, match="weights: answer_kl is not measured with these settings; it is one of text_kl, "
    ):
        run(tiny, weights={"answer_kl": 1.0})
    with pytest.raises(UsageError, match="weights: benchmarks is not measured"):
        run(tiny, weights={"benchmarks": 1.0})
    with pytest.raises(UsageError, match="no task 'no_such_task'"):
        run(tiny, tasks=["no_such_task"])


@pytest.mark.parametrize("distance", [None, 40, [40], [40, 48]])
@pytest.mark.parametrize("more", [{}, {"long_answers": 2, "generations": 2}])
def test_what_is_looked_at_is_known_before(tiny, tmp_path, distance, more):
    settings = {"distance": distance, "prompts": write_prompts(tmp_path / "prompts.jsonl", *ROWS) if more else None}
    looking = looked_at(tiny, **settings, **more)
    assert list(looking) == kinds(analyze.Config(**(QUICK | settings | more)))


def test_weights_may_name_all_that_is_measured(tiny):
    asked = {
        "answers": 4,
        "distance": [40, 48],
        "generations": 2,
        "new_tokens": 4,
        "long_answers": 2,
        "estimators": ["cosine"],
    }
    measured = run(tiny, **asked).layers[0][0].damage
    assert {"recall_kl@48", "answer_kl", "generation", "cosine"} <= set(measured)
    run(tiny, **asked, weights=dict.fromkeys(measured, 1.0))


def test_inputs_are_all_that_decides_what_comes_out(tiny, tmp_path):
    folder = tmp_path / "tasks"
    (folder / "more").mkdir(parents=True)
    prompts = write_prompts(tmp_path / "prompts.jsonl", *ROWS)
    for path in ("a.yaml", "more/a.yaml", "more/helper.py", "more/data.jsonl", "sensitivity.json"):
        (folder / path).write_text("task: a\ndata_files: {test: more/data.jsonl}")
    record = describe("tiny", tiny, read_config(tiny))
    config = analyze.Config(**QUICK, prompts=prompts, task_folder=folder)

    def digests(config=config):
        return analyze.inputs(record, tiny, config)

    seen = [digests()]
    assert digests() == seen[0]
    write_prompts(prompts, *ROWS[:2])
    seen.append(digests())
    for path in ("a.yaml", "more/a.yaml", "more/helper.py", "more/data.jsonl"):
        (folder / path).write_text("task: b\ndata_files: {test: more/data.jsonl}")
        seen.append(digests())
    (folder / "sensitivity.json").write_text("what is written there is no task")
    assert digests() == seen[-1]
    seen.append(digests(config.model_copy(update={"long_answers": 2})))
    assert all(a != b for n, a in enumerate(seen) for b in seen[:n])
    assert digests(config.model_copy(update={"device": "cpu"})) == digests()
    assert set(analyze.inputs(record, tiny, analyze.Config(**QUICK))) == {"model", "tokenizer", "text", "settings"}


def test_benchmark_tasks(tiny, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets
    import lm_eval.tasks

    from tests.test_tasks import write_task

    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / name)
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    rng = np.random.default_rng(0)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, count in (("few", 3), ("many", 20)):
        documents = [
            {
                "text": " ".join(rng.choice(["amber", "basil", "cedar"], 5)),
                "choices": [" delta", " ember"],
                "gold": n % 2,
            }
            for n in range(count)
        ]
        write_task(folder, name, documents, output_type="multiple_choice", doc_to_choice="{{choices}}",
                   doc_to_target="gold")  # fmt: skip
    names = ["few", "many"]
    found = run(tiny, tasks=names, task_folder=folder, task_limit=11, answers=2, weights={"benchmarks": 1.0})
    places = [(layer, n) for layer in range(4) for n in range(3)]
    plans = [[FULL] * 4, *(one_changed(layer, TRIED[n]) for layer, n in places)]
    scores, forwards = task_scores(load_original(tiny), tokenizer(), plans, load_tasks(names, folder), limit=11)
    for (layer, n), own in zip(places, scores[1:], strict=True):
        damage = found.layers[layer][n].damage
        for name in names:
            assert_is(damage[f"task:{name}"], scores[0][name] - own[name])
        assert len(damage["benchmarks"].per_sequence) == 3 + 11
        means = [damage[f"task:{name}"].mean for name in names]
        assert damage["benchmarks"].mean == pytest.approx(np.mean(means), abs=1e-5)  # not over documents
    changed = {round(c.damage["benchmarks"].mean, 3) for layer in found.layers for c in layer}
    assert len(changed) > 1
    for name in names:
        assert_is(found.baseline[f"task:{name}"], scores[0][name])
    both = np.mean([found.baseline[f"task:{name}"].mean for name in names])
    assert found.baseline["benchmarks"].mean == pytest.approx(both, abs=1e-5)
    assert found.costs["tasks"].forwards == pytest.approx(forwards)
    assert found.costs["tasks"].tokens == 14
    parts = []

    def halves(plans, score, advance):  # as two processes share them
        parts.extend([plans[::2], plans[1::2]])
        scored = [score(part, advance) for part in parts]
        return [scored[n % 2][n // 2] for n in range(len(plans))]

    monkeypatch.setattr(analyze, "shared", halves)
    again = run(tiny, tasks=names, task_folder=folder, task_limit=11, answers=2, weights={"benchmarks": 1.0})
    assert again.layers == found.layers
    assert [len(part) for part in parts] == [7, 6]
    with pytest.raises(UsageError, match="did you mean few"):
        run(tiny, tasks=["fwe"], task_folder=folder)


def test_layers_from_disk_give_the_same_numbers(tiny, tmp_path):
    settings = {
        "prompts": write_prompts(tmp_path / "prompts.jsonl", *ROWS), "distance": [20, 60], "long_answers": 2,
        "mixers": [window(4, sink=True)], "estimators": ["cosine"],
    }  # fmt: skip
    memory, streamed = run(tiny, **settings), run(tiny, **settings, stream=True)
    for here, there in zip(numbers(streamed), numbers(memory), strict=True):
        assert list(here) == list(there)
        for label, damage in here.items():
            assert set(damage) == set(there[label]) - {"cosine"}
            for metric, own in damage.items():
                np.testing.assert_allclose(own.per_sequence, there[label][metric].per_sequence, rtol=0, atol=2e-5)
    assert streamed.resolution.ranking == memory.resolution.ranking
    assert streamed.costs["measured"].forwards == pytest.approx(memory.costs["measured"].forwards)
    assert set(streamed.costs) == {"measured"}


@pytest.mark.parametrize("settings", [{"tasks": ["arc_easy"]}, {"generations": 2}], ids=["tasks", "generations"])
def test_what_layers_from_disk_cannot_do(tiny, settings):
    with pytest.raises(
        UsageError, match="stream reads layers from disk for each pass; leave tasks and generations out"
    ):
        run(tiny, stream=True, **settings)


def test_windows_wider_than_native_ones_are_not_tried(tmp_path):
    folder = make_checkpoint(tmp_path, "mistral", sliding_window=9)
    found = analyze.run(folder, analyze.Config(**(SMALL | {"windows": [4, 9, 16]})))
    assert [[c.window for c in layer] for layer in found.layers] == [[None, 4]] * 4


def test_fewer_texts_than_asked_for_are_said(tiny, tmp_path, capsys):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"some words {n} " * 200)
    arguments = {"split": "train", "answers": 2, "length": 64, "distance": 32}
    for texts, said in ((2, False), (100_000, True)):
        found = samples(open_corpus(tmp_path), load_tokenizer(tiny), 512, texts=texts, **arguments)
        told = f"its train split holds {len(found['text'])} sequences of 64 tokens, not 100000"
        assert (told in "".join(capsys.readouterr())) == said


def test_probes_reach_beyond_every_window():
    assert probe_lengths(256, None, [16, 64], 1024) == (256, 128)
    assert probe_lengths(256, None, [512], 4096) == (2048, 1024)
    assert probe_lengths(256, None, [512], 1024) == (1024, 513)
    assert probe_lengths(256, None, [128], 1024) == (256, 129)  # a window sees its own length, less one, behind it
    assert probe_lengths(256, None, [], 1024) == (256, 128)
    assert probe_lengths(256, 100, [64], 1024) == (256, 100)
    with pytest.raises(DataError, match="within a window of 64"):
        probe_lengths(256, 64, [64], 1024)
    assert probe_lengths(256, 65, [64], 1024) == (256, 65)
    with pytest.raises(DataError, match="too short for probes beyond a window of 512"):
        probe_lengths(256, None, [512], 400)


def test_default_windows():
    assert analyze.default_windows(1_024) == [16, 64]
    assert analyze.default_windows(131_072) == [64, 512]
    assert analyze.default_windows(128) == [16]
