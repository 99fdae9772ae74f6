"""Exports: what leaves LayerBoost opens without it and computes the same; what cannot is refused with the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerboost import convert, export, heal, verify
from layerboost.artifacts import Plan
from layerboost.errors import CheckpointError, UsageError
from layerboost.export import RUNTIME, portable_code
from layerboost.model.loading import load_model
from layerboost.verify import probe
from tests.tiny import FAMILIES, FULL, NONE, linear, make_checkpoint, native_windows, some_tokens, window

MIXED = [NONE, window(7, sink=True), linear("lolcats", 5), window(3)]
W7 = [window(7)] * 4
# an interpreter that has another transformers and no layerboost; `make portable` makes it, CI does
OTHER = Path(__file__).parents[1] / ".venv-portable" / "bin" / "python"


def some_slow(rows, quick):
    return [row if row in quick else pytest.param(row, marks=pytest.mark.slow) for row in rows]


def hybrid_of(folder, layers, out):
    from transformers import AutoConfig

    native = native_windows(AutoConfig.from_pretrained(folder), 4)
    fitting = [FULL if p.mixer == "linear_attention" and n else p for p, n in zip(layers, native, strict=True)]
    return convert.run(folder, Plan(layers=fitting), out=out)


@pytest.fixture(scope="module")
def portables(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("portable")
    made = {}

    def get(family):
        if family not in made:
            hybrid = hybrid_of(checkpoints[family], MIXED, root / family)
            made[family] = (hybrid, export.run(hybrid, "portable", out=root / f"{family}-portable"))
        return made[family]

    return get


def run_probe(python, folder, tmp_path, *flags):
    """What the folder computes for another interpreter; None and the last line of its errors if it does not open."""
    prompts = {str(length): some_tokens(1, length) for length in (6, 7, 8, 40)}
    given, out = tmp_path / "prompts.safetensors", tmp_path / "out.safetensors"
    save_file(prompts, given)
    done = subprocess.run(
        [str(python), "-I", probe.__file__, str(folder), str(given), str(out), "float32", *flags],
        capture_output=True, text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    return load_file(out), probe.measure(load_model(folder), prompts)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_portable_checkpoint_opens_bit_equal_without_layerboost(portables, tmp_path, family):
    _, portable = portables(family)
    found, wanted = run_probe(sys.executable, portable, tmp_path, "--trust-remote-code")
    assert found is not None, wanted
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.skipif(not OTHER.exists(), reason="`make portable` makes an environment with another transformers")
@pytest.mark.parametrize("family", some_slow(FAMILIES, quick=("llama", "gpt_neox", "gemma3_text", "qwen3_moe")))
def test_a_portable_checkpoint_opens_on_another_transformers(portables, tmp_path, family):
    _, portable = portables(family)
    found, wanted = run_probe(OTHER, portable, tmp_path, "--trust-remote-code")
    assert found is not None, wanted
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=5e-5, rtol=2e-4)


def test_without_the_flag_stock_loaders_refuse_it(portables, tmp_path):
    _, portable = portables("qwen3")
    found, last = run_probe(sys.executable, portable, tmp_path)
    assert found is None
    assert "trust_remote_code" in last
    assert "trust_remote_code=True" in (portable / "README.md").read_text()


def test_a_portable_checkpoint_saved_again_by_stock_transformers_opens(portables, tmp_path):
    _, portable = portables("qwen3")
    code = f"""
import sys
sys.modules["layerboost"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(portable)!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, wanted = run_probe(sys.executable, tmp_path / "again", tmp_path, "--trust-remote-code")
    assert found is not None, wanted
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_code_that_travels_is_all_that_it_needs():
    files = portable_code("qwen3", "A", "B")
    assert len(files) == len(RUNTIME) + 1
    for name, text in files.items():
        assert "from layerboost" not in text, name
        assert "import layerboost" not in text, name
        for line in text.splitlines():
            if line.strip().startswith("from ."):
                assert f"{line.split()[1].removeprefix('.')}.py" in files, line


def test_a_portable_checkpoint_is_still_a_hybrid_here(portables):
    hybrid, portable = portables("qwen3")
    tokens = some_tokens(2, 20)
    assert torch.equal(load_model(portable)(tokens).logits, load_model(hybrid)(tokens).logits)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (portable / name).read_bytes() == (hybrid / name).read_bytes()


NATIVE = {  # plan to the stock model that expresses it, by family
    ("llama", "all"): "mistral", ("mistral", "all"): "mistral", ("qwen2", "all"): "qwen2", ("qwen3", "all"): "qwen3",
    ("gemma2", "all"): "gemma2", ("phi3", "all"): "phi3", ("starcoder2", "all"): "starcoder2",
    ("smollm3", "all"): "smollm3", ("qwen3_moe", "all"): "qwen3_moe", ("mixtral", "all"): "mixtral",
    ("qwen2", "some"): "qwen2", ("qwen3", "some"): "qwen3", ("smollm3", "some"): "smollm3",
    ("llama", "some"): "ministral", ("mistral", "some"): "ministral", ("olmo2", "all"): "olmo3",
    ("olmo2", "some"): "olmo3",
}  # fmt: skip


QUICK = (
    ("llama", "all"),
    ("llama", "some"),
    ("olmo2", "some"),
    ("gemma2", "all"),
    ("qwen3", "some"),
    ("mixtral", "all"),
)


@pytest.mark.parametrize("row", some_slow(NATIVE, QUICK), ids=str)
def test_native_exports_are_stock_models(checkpoints, tmp_path, row):
    family, which = row
    layers = W7 if which == "all" else [FULL, window(7), FULL, window(7)]
    hybrid = hybrid_of(checkpoints[family], layers, tmp_path / "hybrid")
    native = export.run(hybrid, "native", out=tmp_path / "native")
    config = json.loads((native / "config.json").read_text())
    assert config["model_type"] == NATIVE[row]
    assert config["sliding_window"] == 7
    assert "layerboost" not in config


@pytest.mark.parametrize(("family", "layers"), [("gemma3_text", [FULL] * 4), ("olmo3", [window(5)] * 4)])
def test_families_with_a_rotary_embedding_for_each_type_of_layer(tmp_path, family, layers):
    hybrid = convert.run(make_checkpoint(tmp_path / "base", family), Plan(layers=layers), out=tmp_path / "hybrid")
    native = export.run(hybrid, "native", out=tmp_path / "native")
    assert json.loads((native / "config.json").read_text())["model_type"] == family


def test_a_bf16_model_with_a_wide_window_is_exported_natively(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16, max_position_embeddings=2_048)
    hybrid = convert.run(folder, Plan(layers=[window(500)] * 4), out=tmp_path / "hybrid")
    assert export.run(hybrid, "native", out=tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("qwen3", [NONE, *W7[1:]], "layer 0 is no_attention: a stock class has only full and sliding"),
        ("qwen3", [window(7, sink=True), *W7[1:]], "layer 0 is sliding_attention 7 sink: stock classes .* no sinks"),
        ("qwen3", [window(3), *W7[1:]], r"several windows \(3, 7\), a stock class has one"),
        ("gemma2", [FULL, window(7), FULL, FULL], r"several windows \(7, 9\)"),
        ("gpt_neox", W7, r"no stock class computes this gpt_neox hybrid \(tried gpt_neox\); export it as portable"),
        ("cohere2", W7, "no stock class computes this cohere2 hybrid"),  # its rotary embedding follows the window
        ("mixtral", [FULL, *W7[1:]], "no stock class computes this mixtral hybrid"),
    ],
)
def test_what_no_stock_class_expresses_is_refused(checkpoints, tmp_path, family, layers, message):
    hybrid = hybrid_of(checkpoints[family], layers, tmp_path / "hybrid")
    with pytest.raises(CheckpointError, match=message):
        export.run(hybrid, "native", out=tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_base_models_and_damaged_hybrids_are_not_exported(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="not a hybrid; convert it first"):
        export.run(tiny, "portable", out=tmp_path / "out")
    hybrid = hybrid_of(tiny, MIXED, tmp_path / "hybrid")
    for inside in (hybrid, hybrid / "portable"):
        with pytest.raises(UsageError, match="is the hybrid itself, or inside it"):
            export.run(hybrid, "portable", out=inside)
    (hybrid / "README.md").write_text("a card of my own")
    export.run(hybrid, "portable", out=tmp_path / "out")
    (hybrid / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"generation_config.json is missing or not as it was written"):
        export.run(hybrid, "portable", out=tmp_path / "out")


def test_a_hybrid_is_not_replaced_even_if_it_is_damaged(tiny, tmp_path):
    hybrid, other = (hybrid_of(tiny, MIXED, tmp_path / name) for name in ("hybrid", "other"))
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a hybrid, and no export"):
        export.run(hybrid, "portable", out=other)
    with pytest.raises(UsageError, match="is no healed model, and would be replaced"):
        heal.run(hybrid, tiny, out=other)
    export.run(hybrid, "portable", out=tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    export.run(hybrid, "portable", out=tmp_path / "out")  # an export is soon made again


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_hybrid_is_verified_against_its_original(checkpoints, tmp_path, family):
    hybrid = hybrid_of(checkpoints[family], MIXED, tmp_path / "hybrid")
    checks = verify.run(hybrid, checkpoints[family])
    assert [check for check in checks if not check.holds] == []
    assert len(checks) == 7


def failing(checks):
    return [check.name for check in checks if not check.holds]


def test_verify_notices_what_is_wrong(tiny, tmp_path, portables):
    hybrid, _ = portables("qwen3")
    other = hybrid_of(tiny, MIXED, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert failing(verify.run(other, hybrid)) == ["logits against the hybrid here"]
    (other / "tokenizer_config.json").write_text("{}")
    assert failing(verify.run(other, hybrid))[0] == "files of the tokenizer"
    with pytest.raises(CheckpointError, match="another plan"):
        verify.run(hybrid_of(tiny, W7, tmp_path / "plan"), hybrid)
    with pytest.raises(CheckpointError, match=r"neither .* nor .* is a hybrid"):
        verify.run(tiny, tiny)
    with pytest.raises(CheckpointError, match=r"has num_hidden_layers 4, .* has 2"):
        verify.run(hybrid, make_checkpoint(tmp_path / "short", "qwen3", num_hidden_layers=2))


def test_verify_notices_a_cache_that_keeps_more(tiny, tmp_path, monkeypatch):
    from layerboost.model import cache

    hybrid = hybrid_of(tiny, [FULL, window(7), NONE, FULL], tmp_path / "hybrid")
    monkeypatch.setattr(cache.WindowLayer, "update", cache.DynamicLayer.update)
    assert "KV memory as the plan promises" in failing(verify.run(hybrid, tiny))


def test_code_of_a_checkpoint_runs_only_if_asked(portables, tmp_path):
    import shutil

    hybrid, portable = portables("qwen3")
    copy = shutil.copytree(portable, tmp_path / "copy")
    canary = tmp_path / "ran"
    entry = copy / "modeling_layerboost.py"
    entry.write_text(entry.read_text() + f"\nopen({str(canary)!r}, 'w').write('ran')\n")
    assert not failing(verify.run(copy, hybrid))
    assert not canary.exists()
    assert not failing(verify.run(copy, hybrid, trust_remote_code=True))
    assert canary.exists()
