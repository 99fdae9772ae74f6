"""Checkpoints from anywhere: missing, truncated, foreign, pickled, with code of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerboost import convert, export, verify
from layerboost.artifacts import KVShape, Plan
from layerboost.errors import CheckpointError, EnvironmentTrouble, PlanError, UsageError
from layerboost.model.loading import (
    describe,
    digest,
    find_model,
    load_model,
    load_original,
    load_tokenizer,
    pick_device,
    read_config,
    tokenizer_digest,
    tokenizer_files,
)
from tests.tiny import FULL, NONE, make_checkpoint, some_tokens, window


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_models_that_are_not_there(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", ""):
        with pytest.raises(CheckpointError, match=r"does not exist|is neither"):
            find_model(name)
    with pytest.raises(CheckpointError, match="not a local folder, and the hub cannot be"):
        find_model("nobody/nothing-of-this-name")
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        find_model(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt3"}, "model_type 'gpt3' is not a causal language model .*supported are llama, mistral"),
        ({"model_type": "bloom"}, "bloom models cannot be converted: its attention does not go through"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3 models cannot be converted: .*latent"),
        ({"model_type": None}, "key model_type is missing"),
        ({"model_type": ["llama"]}, "key model_type is missing"),
        ({"model_type": "layerboost_gpt3"}, "model_type 'gpt3' is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_size": "many"}, "is not a valid qwen3 configuration"),
        ({"num_hidden_layers": 0}, "is not a valid qwen3 configuration"),
        ({"num_hidden_layers": 5, "layer_types": None}, "not there: model.layers.4"),
        ({"num_hidden_layers": 3, "layer_types": None}, "no place for: model.layers.3"),
        ({"num_hidden_layers": 5}, "is not a valid qwen3 configuration"),
        ({"hidden_size": 64}, "another shape"),
        ({"hidden_act": "foo"}, "is not a valid qwen3 configuration"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number of at least 1, found 0"),
        ({"head_dim": 0}, "head_dim must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"intermediate_size": -5}, "intermediate_size must be"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "is not a valid qwen3 configuration"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "is not a valid qwen3 configuration"),
        ({"pad_token_id": 9_999}, "is not a valid qwen3 configuration"),
        ({"vocab_size": 300}, "another shape.*embed_tokens"),
    ],
)
def test_configurations_that_do_not_fit(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_original(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_damaged_configurations(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_original(folder)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    for size in (0, 4, 100, weights.stat().st_size - 1):
        weights.write_bytes(weights.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            load_original(folder)


def test_missing_shards_and_shards_elsewhere(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors does not exist"):
        load_original(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_original(folder)


def test_sharded_checkpoints_open(tiny, tmp_path):
    model = load_original(tiny)
    stock = make_checkpoint(tmp_path / "whole", "qwen3")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(stock).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tokens = some_tokens(1, 20)
    assert torch.equal(load_original(tmp_path / "shards")(tokens).logits, model(tokens).logits)


def test_whole_weights_win_over_shards_as_they_do_in_transformers(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "stale.safetensors"}}))
    first = digest(folder)
    edit_weights(folder, lambda t: t["model.norm.weight"].add_(1))
    assert digest(folder) != first
    load_original(folder)


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_original(folder)


def test_a_device_that_is_not_there():
    with pytest.raises(EnvironmentTrouble, match="device mps is not available; use cpu"):
        pick_device("mps")


def test_generation_settings_that_transformers_refuses_to_write(folder, tmp_path):
    odd = json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    (folder / "generation_config.json").write_text(odd)
    out = convert.run(folder, Plan(layers=[NONE, FULL, FULL, FULL]), out=tmp_path / "hybrid")
    assert (out / "generation_config.json").read_text() == odd


class Boom:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle was run')",))


def test_pickles_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"boom": Boom()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        load_original(folder)


def test_code_in_a_checkpoint_is_never_run(folder):
    canary = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\nclass Evil: pass\n")
    edit_config(
        folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"}
    )
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    load_original(folder)
    load_tokenizer(folder)
    assert not canary.exists()


def test_weights_that_are_not_finite(folder):
    edit_weights(folder, lambda t: t["model.layers.2.mlp.up_proj.weight"].view(-1)[3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.up_proj.weight holds values that are not finite"):
        load_original(folder)


def test_a_folder_without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer; copy"):
        load_tokenizer(folder)


def test_the_digest_is_that_of_the_weights_and_configuration(folder):
    first = digest(folder)
    (folder / "README.md").write_text("something else")
    assert digest(folder) == first
    edit_weights(folder, lambda t: t["model.norm.weight"].add_(1))
    second = digest(folder)
    assert second != first
    edit_config(folder, rms_norm_eps=1e-5)
    assert digest(folder) != second


def test_what_an_artifact_says_of_a_model(folder):
    record = describe(folder, folder, read_config(folder))
    assert record.name == "model"
    assert record.kv_shape == KVShape(num_key_value_heads=2, head_dim=8, bytes_per_value=4)
    assert (record.num_layers, record.context, record.native_windows) == (4, 256, [None] * 4)


def test_convert_writes_surviving_tensors_byte_for_byte(tiny, tmp_path):
    out = convert.run(tiny, Plan(layers=[NONE, window(8), FULL, NONE]), out=tmp_path / "hybrid")
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    gone = set(before) - set(after)
    assert gone == {n for n in before for i in (0, 3) if f".{i}.self_attn." in n or f".{i}.input_layernorm." in n}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "layerboost_qwen3"
    assert config["layerboost"]["layers"] == [
        {"mixer": "no_attention"}, {"mixer": "sliding_attention", "window": 8}, {"mixer": "full_attention"},
        {"mixer": "no_attention"},
    ]  # fmt: skip
    assert config["layerboost"]["provenance"]["base"]["digest"] == digest(tiny)
    again = convert.run(tiny, Plan(layers=[NONE, window(8), FULL, NONE]), out=tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_plan_for_another_model_is_refused(tiny, tmp_path):
    record = describe(tiny, tiny, read_config(tiny))
    other = make_checkpoint(tmp_path / "other", "qwen3", seed=5)
    with pytest.raises(PlanError, match=r"plan was made for qwen3 \(digest"):
        convert.run(other, Plan(layers=[FULL] * 4, model=record), out=tmp_path / "out")
    with pytest.raises(PlanError, match="plan has 2 layers, model has 4"):
        convert.run(tiny, Plan(layers=[FULL] * 2), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hybrid_is_not_converted_again(tiny, tmp_path):
    out = convert.run(tiny, Plan(layers=[NONE, FULL, FULL, FULL]), out=tmp_path / "hybrid")
    with pytest.raises(CheckpointError, match="is a hybrid already"):
        convert.run(out, Plan(layers=[NONE] * 4), out=tmp_path / "twice")


def test_a_model_without_any_attention_left_converts(tiny, tmp_path):
    model = load_model(convert.run(tiny, Plan(layers=[NONE] * 4), out=tmp_path / "none"))
    tokens = some_tokens(1, 9)
    other = tokens.flip(1)
    other[0, -1] = tokens[0, -1]
    assert torch.equal(model(tokens).logits[0, -1], model(other).logits[0, -1])  # a token sees nothing but itself


def test_a_model_is_not_replaced_by_its_own_hybrid(tiny, tmp_path):
    windows = convert.run(tiny, Plan(layers=[window(8)] * 4), out=tmp_path / "hybrid")
    native = export.run(windows, "native", out=tmp_path / "native")
    before = (native / "config.json").read_bytes()
    with pytest.raises(UsageError, match="is the model itself; name another --out"):
        convert.run(native, Plan(layers=[NONE] * 4), out=tmp_path / "hybrid" / ".." / "native")
    assert convert.run(native, Plan(layers=[NONE] * 4), out=native / "inside").exists()
    assert (native / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("family", "named", "opened"),
    [
        ("qwen2", "LlamaTokenizerFast", "Qwen2Tokenizer"), ("mistral", "LlamaTokenizer", "TokenizersBackend"),
        ("phi3", "GPT2Tokenizer", "TokenizersBackend"), ("olmo2", "GPT2TokenizerFast", "TokenizersBackend"),
        ("granite", None, "TokenizersBackend"),
    ],
)  # fmt: skip
def test_a_hybrid_cuts_text_as_its_original_does(tmp_path, family, named, opened):
    """transformers overrules the class that a tokenizer's files name, by the type of the model."""
    from transformers import AutoTokenizer

    base = make_checkpoint(tmp_path / "base", family)
    for path in tokenizer_files(base):
        (base / path).unlink()
    raw = json.loads((find_model("reference") / "tokenizer_config.json").read_text())
    raw |= {"tokenizer_class": named, "backend": "tokenizers"}
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    shutil.copyfile(find_model("reference") / "tokenizer.json", base / "tokenizer.json")
    wanted = AutoTokenizer.from_pretrained(base)
    assert type(wanted).__name__ == opened
    hybrid = convert.run(base, Plan(layers=[window(8), FULL, window(8), NONE]), out=tmp_path / "hybrid")
    portable = export.run(hybrid, "portable", out=tmp_path / "portable")
    text = "def read(self, n):\n    return n + 10000  # it's\t 2,024\r\n"
    for made in (hybrid, portable):
        found = AutoTokenizer.from_pretrained(made)
        assert type(found) is type(wanted)
        assert found(text) == wanted(text)
        assert found.decode(found(text)["input_ids"]) == text
    assert all(check.holds for check in verify.run(hybrid, base))


def test_verify_notices_other_tokens(tmp_path):
    base = make_checkpoint(tmp_path / "base", "mistral")
    hybrid = convert.run(base, Plan(layers=[window(8)] * 4), out=tmp_path / "hybrid")
    raw = json.loads((hybrid / "tokenizer_config.json").read_text())
    (hybrid / "tokenizer_config.json").write_text(json.dumps(raw | {"tokenizer_class": "LlamaTokenizer"}))
    assert [check.name for check in verify.run(hybrid, base) if not check.holds] == ["tokens of a sample"]


def test_a_copy_that_cuts_text_otherwise_is_not_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("layerboost.model.loading.same_tokens", lambda *_: False)
    with pytest.raises(CheckpointError, match="gives other tokens beside a hybrid"):
        convert.run(tiny, Plan(layers=[window(8)] * 4), out=tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()


def test_tokenizers_that_transformers_knows_by_name(tmp_path):
    """A model in the hub's cache is opened as under its name there, not as its files alone say."""
    base = make_checkpoint(tmp_path / "base", "llama")
    raw = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(raw))
    for name, opened in (("someone/model", "LlamaTokenizer"), ("deepseek-ai/DeepSeek-Coder-1B", "TokenizersBackend")):
        snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        shutil.copytree(base, snapshot)
        assert type(load_tokenizer(snapshot)).__name__ == opened


def test_chat_templates_with_names_go_along(tiny, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    named = Path("additional_chat_templates/tool_use.jinja")
    assert (folder / named).exists()
    hybrid = convert.run(folder, Plan(layers=[window(8)] * 4), out=tmp_path / "hybrid")
    for form in ("portable", "native"):
        made = export.run(hybrid, form, out=tmp_path / form)
        assert load_tokenizer(made).chat_template == tokenizer.chat_template
        assert all(check.holds for check in verify.run(made, hybrid))
        (made / named).write_text("other")
        assert [check.name for check in verify.run(made, hybrid) if not check.holds][:1] == ["files of the tokenizer"]
    assert tokenizer_digest(hybrid) == tokenizer_digest(folder) != tokenizer_digest(tiny)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_checkpoint_names_are_not_looked_for(tiny, tmp_path, key):
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: "attacker/kernel"}))
    assert torch.equal(load_original(folder)(some_tokens(1, 9)).logits, load_original(tiny)(some_tokens(1, 9)).logits)


def test_weights_tell_the_dtype_that_a_configuration_does_not(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert describe(folder, folder, read_config(folder)).kv_shape.bytes_per_value == 2
    assert load_original(folder).dtype == torch.bfloat16
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated"):
        describe(folder, folder, read_config(folder))


IMPORTS = (
    "from transformers import AutoModelForCausalLM", "from transformers import AutoConfig", "import peft",
    "from transformers import LlamaForCausalLM", "from transformers import pipeline", "import transformers",
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", IMPORTS[3]),
        (IMPORTS[0], ""),
        *[pytest.param("", code, marks=pytest.mark.slow) for code in IMPORTS],
        *[pytest.param(code, "", marks=pytest.mark.slow) for code in IMPORTS],
    ],
)
def test_registration_survives_every_order_of_imports(tiny, tmp_path, before, after):
    out = convert.run(tiny, Plan(layers=[NONE, window(8), FULL, NONE]), out=tmp_path / "hybrid")
    code = f"""{before}
import layerboost
{after}
from transformers import AutoConfig, AutoModelForCausalLM
AutoConfig.from_pretrained({str(out)!r})
AutoModelForCausalLM.from_pretrained({str(out)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
