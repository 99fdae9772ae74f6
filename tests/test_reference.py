"""The shipped model: what its card says has to hold."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from layerboost import analyze
from layerboost.data.corpus import standard_library
from layerboost.data.probes import PROBES
from layerboost.data.samples import samples
from layerboost.data.sequences import text_sequences
from layerboost.model.loading import find_model, load_model, load_tokenizer, read_config
from layerboost.recipe import load_recipe
from layerboost.scoring import final_hidden, scored_hidden, scored_targets


@pytest.fixture(scope="module")
def folder():
    return find_model("reference")


def test_a_folder_of_the_same_name_is_asked_for_as_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    assert find_model("reference") == folder
    assert find_model("./reference") == find_model(Path("reference")) == Path("reference")


def test_shape_and_size(folder):
    assert folder == Path(str(resources.files("layerboost") / "reference"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
    config = read_config(folder)
    assert config.model_type == "qwen3"
    assert 8 <= config.num_hidden_layers <= 12
    assert 128 <= config.hidden_size <= 192
    assert config.head_dim in (32, 64)
    assert config.max_position_embeddings >= 1_024
    assert load_model(folder).dtype == torch.bfloat16
    record = json.loads((folder / "training.json").read_text())
    assert len(record["curve"]) > 10
    assert record["parameters"] == sum(p.numel() for p in load_model(folder).parameters())


def test_the_tokenizer_gives_back_what_it_was_given(folder):
    tokenizer = load_tokenizer(folder)
    for document in standard_library().split("held_out")[:5]:
        text = document.text[:3_000]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@torch.no_grad()
def test_recall_beyond_the_demos_windows(folder):
    """At least 95 % on every probe at 256 tokens, further back than any window of the demo."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    windows = load_recipe("demo").section(analyze.Config, "analyze").windows
    assert max(windows) <= 128
    data = samples(
        standard_library(), tokenizer, model.config.vocab_size, split="held_out", texts=2, answers=400, length=256,
        distance=128, seed=5,
    )  # fmt: skip
    for probe in PROBES:
        hits = []
        for batch in data[probe].batches(25):
            hidden = scored_hidden(final_hidden(model, batch.tokens), batch.scored)
            hits.append(model.lm_head(hidden).argmax(-1) == scored_targets(batch))
        assert torch.cat(hits).float().mean() >= 0.95, probe


@torch.no_grad()
def test_it_reads_python(folder):
    """Far better than chance on text it has not seen, and than on the same tokens in another order."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    text = text_sequences(standard_library().split("held_out"), tokenizer, count=8, length=256, seed=0).tokens
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    losses = [model(tokens, labels=tokens).loss.item() for tokens in (text, text[:, order])]
    assert losses[0] < 3.0
    assert losses[1] > losses[0] + 1.0
