"""Sensitivity: prefix reuse against whole forward passes, and what the file says."""

import json

import numpy as np
import pytest
import torch

from layerboost import analyze
from layerboost.analyze.prefix import capture, suffix
from layerboost.artifacts import Sensitivity, load
from layerboost.data.samples import probe_lengths
from layerboost.errors import DataError
from layerboost.model.loading import load_original
from tests.conftest import FAMILIES
from tests.tiny import NONE, linear, make_checkpoint, native_windows, some_tokens, window

SMALL = {"texts": 4, "answers": 4, "length": 96, "windows": [4, 16]}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_suffix_is_bit_equal_to_the_whole_model(checkpoints, family):
    model = load_original(checkpoints[family])
    tokens = some_tokens(3, 40)
    prefix = capture(model, tokens)
    assert torch.equal(prefix.final, model.base_model(tokens).last_hidden_state)
    for layer in range(4):
        native = native_windows(model.config, 4)[layer]
        for plan in (NONE, window(5), window(1), *([] if native else [linear("lolcats", 5), linear("gla")])):
            with model.mixed({layer: plan}):
                whole = model.base_model(tokens).last_hidden_state
            found = suffix(model, prefix, layer, plan)
            if plan.mixer == "linear_attention":  # batched products of few rows depend on where memory lies
                torch.testing.assert_close(found, whole)
            else:
                assert torch.equal(found, whole)


@torch.no_grad()
def test_suffix_beside_native_windows(tmp_path):
    folder = make_checkpoint(
        tmp_path, "qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=2, num_hidden_layers=4
    )
    model = load_original(folder)
    tokens = some_tokens(2, 30)
    prefix = capture(model, tokens)
    for layer in range(4):
        with model.mixed({layer: window(5)}):
            whole = model.base_model(tokens).last_hidden_state
        assert torch.equal(suffix(model, prefix, layer, window(5)), whole)


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
            assert set(candidate["damage"]) == {
                "text_nll", "text_kl", "recall_nll", "recall_kl", "copy", "key_value", "needle",
            }  # fmt: skip
            for metric, damage in candidate["damage"].items():
                count = 4 if not metric.startswith("recall") else 12
                assert len(damage["per_sequence"]) == count
                assert damage["low"] <= damage["mean"] <= damage["high"]
                assert damage["mean"] == pytest.approx(np.mean(damage["per_sequence"]))
    assert load(Sensitivity, path).inputs["text"] == raw["provenance"]["corpus_digest"]


def test_damage_is_that_of_the_whole_model(tiny):
    """One candidate recomputed the slow way: KL, NLL and accuracy of the changed model, sequence by sequence."""
    from layerboost.data.corpus import standard_library
    from layerboost.data.samples import samples
    from tests.tiny import reference_logits, tokenizer

    found = analyze.run(tiny, analyze.Config(**SMALL)).layers[2][0].damage
    data = samples(
        standard_library(), tokenizer(), 258, split="train", texts=4, answers=4, length=96, distance=48, seed=0
    )  # fmt: skip
    full, changed = [window(96)] * 4, [window(96), window(96), NONE, window(96)]
    for n, tokens in enumerate(data["text"].tokens):
        teacher, student = (
            reference_logits(tiny, p, tokens[None])[0, :-1].double().log_softmax(-1) for p in (full, changed)
        )
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        nll = [-lp.gather(-1, tokens[1:, None]).mean() for lp in (teacher, student)]
        assert found["text_kl"].per_sequence[n] == pytest.approx(float(kl), abs=2e-4)
        assert found["text_nll"].per_sequence[n] == pytest.approx(float(nll[1] - nll[0]), abs=2e-4)
    copies = data["copy"]
    for n, (tokens, scored) in enumerate(zip(copies.tokens, copies.scored, strict=True)):
        hits = [
            (reference_logits(tiny, p, tokens[None])[0, :-1].argmax(-1) == tokens[1:])[scored[1:]]
            for p in (full, changed)
        ]
        drop = hits[0].double().mean() - hits[1].double().mean()
        assert found["copy"].per_sequence[n] == pytest.approx(float(drop), abs=1e-6)


def test_the_same_seed_gives_the_same_numbers(tiny):
    runs = [analyze.run(tiny, analyze.Config(**SMALL, seed=seed)).layers[1][1].damage for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_windows_wider_than_native_ones_are_not_tried(tmp_path):
    folder = make_checkpoint(tmp_path, "mistral", sliding_window=9)
    found = analyze.run(folder, analyze.Config(**SMALL))
    assert [[c.window for c in layer] for layer in found.layers] == [[None, 4]] * 4


def test_probes_reach_beyond_every_window():
    assert probe_lengths(256, None, [16, 64], 1024) == (256, 128)
    assert probe_lengths(256, None, [512], 4096) == (2048, 1024)
    assert probe_lengths(256, None, [512], 1024) == (1024, 512)
    assert probe_lengths(256, None, [], 1024) == (256, 128)
    assert probe_lengths(256, 100, [64], 1024) == (256, 100)
    with pytest.raises(DataError, match="within a window of 64"):
        probe_lengths(256, 63, [64], 1024)
    with pytest.raises(DataError, match="too short for probes beyond a window of 512"):
        probe_lengths(256, None, [512], 400)


def test_default_windows():
    assert analyze.default_windows(1_024) == [16, 64]
    assert analyze.default_windows(131_072) == [64, 512]
    assert analyze.default_windows(128) == [16]
