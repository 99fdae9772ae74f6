"""serve: what is checked before vLLM starts, and what it is started with."""

import json
import os

import pytest
from typer.testing import CliRunner

from layerboost import serve
from layerboost.cli import app
from layerboost.errors import CheckpointError, EnvironmentTrouble, PlanError
from layerboost.model.loading import load_original
from layerboost.model.saving import save_hybrid
from tests.tiny import FULL, NONE, linear, make_checkpoint, window

SIZES = {"head_dim": 32, "hidden_size": 128}


def make_hybrid(root, layers):
    base = make_checkpoint(root / "base", "llama", **SIZES)
    model = load_original(base)
    model.convert(layers)
    save_hybrid(model, root / "healed", original=base, inputs={}, what="test")
    return root / "healed"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return make_hybrid(tmp_path_factory.mktemp("serve"), [NONE, window(64), FULL, window(200)])


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM were installed, on CPU."""
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    monkeypatch.setattr(serve, "_on_cpu", lambda: True)


def flags_of(command):
    assert command[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    return dict(zip(command[2::2], command[3::2], strict=True))


def test_defaults(hybrid, with_vllm, monkeypatch):
    flags = flags_of(serve.server_command(hybrid, []))
    assert flags == {
        "--model": str(hybrid), "--host": "127.0.0.1", "--served-model-name": "healed", "--block-size": "32",
        "--gpu-memory-utilization": "0.4",
    }  # fmt: skip
    monkeypatch.setattr(serve, "_on_cpu", lambda: False)
    assert set(flags_of(serve.server_command(hybrid, []))) == {"--model", "--host", "--served-model-name"}


@pytest.mark.parametrize("flag", [["--block-size", "64"], ["--block_size=64"], ["--block-size=64"]])
def test_flags_of_the_user_win(hybrid, with_vllm, flag):
    command = serve.server_command(hybrid, [*flag, "--port", "9000"])
    assert command[-2:] == ["--port", "9000"]
    assert sum("block" in part for part in command) == 1


def test_a_model_that_is_no_hybrid_is_served_as_it_is(hybrid, with_vllm):
    flags = flags_of(serve.server_command(hybrid.parent / "base", []))
    assert flags["--block-size"] == "128"
    assert flags["--served-model-name"] == "base"


def test_what_was_fetched_has_the_name_it_was_asked_for_by(hybrid, with_vllm, monkeypatch):
    monkeypatch.setattr(serve, "find_model", lambda _: hybrid)
    assert flags_of(serve.server_command("owner/name", []))["--served-model-name"] == "owner/name"


def test_quantised_weights_are_for_vllm_to_judge(tmp_path, with_vllm):
    folder = make_checkpoint(tmp_path / "small", "llama", **SIZES)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert str(folder) in serve.server_command(folder, [])


def test_what_is_wrong_is_said_before_anything_starts(hybrid, tmp_path, with_vllm, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        serve.server_command(tmp_path / "nowhere", [])
    with pytest.raises(PlanError, match="layer 2: linear_attention has no state cache in vLLM"):
        serve.server_command(make_hybrid(tmp_path / "linear", [FULL, FULL, linear("gla"), FULL]), [])
    with pytest.raises(PlanError, match="no layer has attention"):
        serve.server_command(make_hybrid(tmp_path / "none", [NONE] * 4), [])
    spoilt = make_hybrid(tmp_path / "spoilt", [FULL] * 4)
    raw = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="is missing or not as it was written"):
        serve.server_command(spoilt, [])
    (hybrid.parent / "base" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        serve.server_command(hybrid.parent / "base", [])
    (tmp_path / "tokenizer.json").rename(hybrid.parent / "base" / "tokenizer.json")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EnvironmentTrouble, match="leaves LayerBoost out; add layerboost to it, or unset it"):
        serve.server_command(hybrid, [])


def test_the_command_becomes_the_server(hybrid, with_vllm, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(command))
    done = CliRunner().invoke(app, ["serve", str(hybrid), "--max-model-len", "128", "--enforce-eager"])
    assert done.exit_code == 0, done.output
    assert ran[0][-3:] == ["--max-model-len", "128", "--enforce-eager"]
    assert "127.0.0.1" in ran[0]


def test_without_vllm(hybrid, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve", str(hybrid)])
    assert done.exit_code == 6
    assert "vLLM is not installed; pip install 'layerboost[vllm]'" in done.output
