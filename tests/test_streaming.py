"""Layers from disk one at a time, and plans shared by processes: the numbers of one process with all in memory."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerboost import passes
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError
from layerboost.model import selfcheck, streaming
from layerboost.model.loading import find_model, load_original
from layerboost.model.streaming import stream_original
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, make_checkpoint, some_tokens, window


def all_plans(layers=4):
    """Untouched, first layer, last layer, all layers."""
    rest = [FULL] * (layers - 1)
    return [[FULL, *rest], [NONE, *rest], [*rest, window(5)], [NONE, window(3), *[window(7)] * (layers - 3), NONE]]


def some_data():
    data = {}
    for seed, (kind, rows, length) in enumerate((("text", 5, 24), ("copy", 3, 20))):
        scored = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.7
        scored[:, 0], scored[:, 1] = False, True
        data[kind] = Sequences(some_tokens(rows, length, seed), scored)
    return data


def as_lists(scores):
    return [{name: values.tolist() for name, values in found.items()} for found in scores]


def numbers(model, resident=None, plans=None):
    return as_lists(passes.Scorer(model, some_data(), resident=resident)(plans or all_plans(len(model.decoder_layers))))


def real_layers(model):
    """Indices of layers with anything off the meta device."""
    return [i for i, layer in enumerate(model.decoder_layers) if any(not p.is_meta for p in layer.parameters())]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(passes, "batch_rows", lambda *_: 2)


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_the_model_in_memory(checkpoints, family, dtype):
    memory = load_original(checkpoints[family], dtype=dtype)
    model, resident = stream_original(checkpoints[family], dtype=dtype)
    found = numbers(model, resident)
    assert found == numbers(memory)
    assert found[0]["text.kl"] != found[1]["text.kl"] != found[3]["text.kl"]
    for (name, here), (_, there) in zip(model.named_buffers(), memory.named_buffers(), strict=True):
        assert here.dtype == there.dtype, name
        assert torch.equal(here, there), name


def test_numbers_of_the_shipped_model():
    folder = find_model("reference")
    assert numbers(*stream_original(folder)) == numbers(load_original(folder))


def test_one_layer_at_a_time_and_each_once(tiny, monkeypatch):
    model, resident = stream_original(tiny)
    assert real_layers(model) == []
    assert not any(p.is_meta for n, p in model.named_parameters() if ".layers." not in n)
    read, seen = [], []
    load = streaming.convert_and_load_state_dict_in_model

    def count(state_dict, **kwargs):
        read.extend(state_dict)
        return load(state_dict=state_dict, **kwargs)

    monkeypatch.setattr(streaming, "convert_and_load_state_dict_in_model", count)
    for layer in model.decoder_layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(tuple(real_layers(model))))
    scorer = passes.Scorer(model, some_data(), resident=resident)
    in_layers = sorted(key for key in load_file(tiny / "model.safetensors") if ".layers." in key)
    others = [[NONE, *plan[1:]] for plan in all_plans()[:3:2]]
    for plans in (all_plans(), [[FULL, window(4), FULL, NONE], *others]):  # the teacher is known from the first call on
        read.clear(), seen.clear()
        scorer(plans)
        assert sorted(read) == in_layers
        assert set(seen) == {(0,), (1,), (2,), (3,)}
        assert seen == sorted(seen)
        assert real_layers(model) == []


def test_a_layer_is_on_disk_again_after_an_error(tiny):
    model, resident = stream_original(tiny)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), resident(2):
        model.decoder_layers[2].mlp(torch.ones(1, 1, 7))
    assert real_layers(model) == []


def test_what_is_resident_is_what_the_checkpoint_holds(tiny):
    model, resident = stream_original(tiny)
    tensors = load_file(tiny / "model.safetensors")
    for index in range(4):
        with resident(index):
            with model.mixed({index: NONE}):
                pass
            for name, tensor in model.decoder_layers[index].named_parameters(prefix=f"model.layers.{index}"):
                assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "mixtral"])
def test_shards_and_names_without_the_prefix(checkpoints, tmp_path, family):
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    bare = shutil.copytree(checkpoints[family], tmp_path / "bare")
    prefix = f"{stock.base_model_prefix}."
    save_file(
        {key.removeprefix(prefix): tensor for key, tensor in load_file(bare / "model.safetensors").items()},
        bare / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    expected = numbers(load_original(checkpoints[family]))
    assert numbers(*stream_original(tmp_path / "shards")) == expected
    assert numbers(load_original(bare)) == expected
    assert numbers(*stream_original(bare)) == expected


def test_families_without_contract_tests_prove_themselves_layer_by_layer(tiny, monkeypatch):
    monkeypatch.setattr(selfcheck, "VERIFIED", ())
    model, resident = stream_original(tiny)
    assert real_layers(model) == []
    assert not any("forward" in vars(layer) for layer in model.decoder_layers)
    assert numbers(model, resident) == numbers(load_original(tiny))
    from layerboost.model import mixers

    monkeypatch.setattr(mixers, "sliding_window_attention", lambda q, k, v, **_: torch.zeros_like(q))
    with pytest.raises(CheckpointError, match="a window over the whole sequence is not the same"):
        stream_original(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "not there: model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.pop("model.norm.weight"), "not there: model.norm.weight"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(1)}), "no place for: model.layers.4.mlp"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(1)}), "no place for: model.layers.1.extra"),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(7)}),
            "another shape .*layers.3.input",
        ),
        (lambda t: t["model.norm.weight"].view(-1)[3].fill_(float("nan")), "tensor model.norm.weight holds values"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_before_any_layer_is_read(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        stream_original(folder)


def test_layers_that_are_not_finite(folder):
    edit_weights(folder, lambda t: t["model.layers.2.mlp.up_proj.weight"].view(-1)[3].fill_(float("nan")))
    model, resident = stream_original(folder)
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.up_proj.weight holds values that are not finite"):
        numbers(model, resident)
    assert real_layers(model) == []


def test_weights_that_are_gone_or_changed_meanwhile(folder):
    model, resident = stream_original(folder)
    edit_weights(folder, lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"model.layers.1.input_layernorm.weight can no longer be read"):
        numbers(model, resident)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded as"):
        numbers(model, resident)


def test_a_checkpoint_that_names_layers_in_its_own_way_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(streaming, "re", SimpleNamespace(compile=lambda _: re.compile(r"blocks\.(\d+)")))
    with pytest.raises(CheckpointError, match=r"qwen3 checkpoints name their layers in another way"):
        stream_original(tiny)


def test_a_hybrid_is_refused(tiny, tmp_path):
    from layerboost import convert
    from layerboost.artifacts import Plan

    out = convert.run(tiny, Plan(layers=[NONE, FULL, FULL, FULL]), out=tmp_path / "hybrid")
    with pytest.raises(CheckpointError, match="is a hybrid already"):
        stream_original(out)


def test_layers_that_get_their_mask_by_position(tmp_path):
    """As gpt2's do: entering must hand on all that a layer is given."""
    model = load_original(make_checkpoint(tmp_path, "gpt2", n_layer=4))
    model.set_attn_implementation("eager")  # others are causal without a mask
    tokens = some_tokens(2, 24)
    found = {p: final for _, p, final in passes.finals(model, [tokens], all_plans())}
    for p, plan in enumerate(all_plans()):
        with torch.no_grad(), model.mixed(dict(enumerate(plan))):
            assert torch.equal(found[p], model.base_model(tokens).last_hidden_state)


def score_in_processes(folder, out, stream):
    """What each process of `torchrun` does with this file."""
    model, resident = stream_original(Path(folder)) if stream == "stream" else (load_original(Path(folder)), None)
    passes.batch_rows = lambda *_: 2
    found = [numbers(model, resident), numbers(model, resident, all_plans()[3:])]  # and fewer plans than processes
    rank, world = passes.ranks()
    Path(f"{out}.{rank}").write_text(json.dumps({"world": world, "found": found}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stream", ["memory", "stream"])
def test_two_processes_share_the_plans(tiny, tmp_path, stream):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.test_streaming", str(tiny), str(tmp_path / "scores"), stream],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = load_original(tiny)
    expected = {"world": 2, "found": [numbers(model), numbers(model, plans=all_plans()[3:])]}
    for rank in range(2):  # all get the same answer
        assert json.loads((tmp_path / f"scores.{rank}").read_text()) == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    score_in_processes(*sys.argv[1:])


def test_hidden_states_stay_within_memory(checkpoints, monkeypatch):
    """With room for two plans at once, layers are read again for each two of them, and nothing else changes."""
    model, resident = stream_original(checkpoints["qwen3"])
    read = []

    def counted(index):
        read.append(index)
        return resident(index)

    plans = [[NONE if i == layer else FULL for i in range(4)] for layer in range(4)]
    data = {
        "text": Sequences(
            some_tokens(3, 20), torch.ones(3, 20, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
        )
    }
    whole = passes.Scorer(model, data, resident)(plans)
    monkeypatch.setattr(passes, "_memory", lambda _: 8 * 2 * 3 * 20 * model.config.hidden_size * 4)
    parts = passes.Scorer(model, data, counted)(plans)
    assert read == [*range(4)] * 2
    for one, other in zip(whole, parts, strict=True):
        assert all((one[metric] == other[metric]).all() for metric in one)
