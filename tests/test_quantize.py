"""Frozen weights in few bits: near the original, with gradients, and never what is published."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from layerboost import convert, heal
from layerboost.artifacts import Plan
from layerboost.data.corpus import open_corpus
from layerboost.data.sequences import text_sequences
from layerboost.errors import EnvironmentTrouble
from layerboost.heal.sharding import quantize
from layerboost.heal.student import Counts, Healer
from layerboost.model.loading import find_model, load_original, load_tokenizer
from layerboost.scoring import kl_divergence
from tests.test_heal import SETTINGS, gradients, scored, settings_with
from tests.tiny import FULL, NONE, make_checkpoint, some_tokens, window

LAYERS = [FULL, window(8), NONE, FULL]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_key_value_heads": 4,
}  # 4 bits come in blocks of 16,384 weights
BITS = ("int8", "int4")
FAR = {"int8": 0.02, "int4": 0.3}  # of a matrix product, relative


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("quantize") / "base", "qwen3", dtype=torch.bfloat16, **SIZES)


def make_healer(base, bits=None, **changes):
    model = load_original(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    healer = Healer(model, LAYERS, settings_with(**changes))
    if bits is not None:
        quantize(healer, bits)
    return healer.to("cpu")


def frozen(healer):
    """Weights of linear modules in the decoder layers, but for adapters."""
    found = dict(healer.model.decoder_layers.named_parameters())
    return {name: p for name, p in found.items() if "_proj" in name and "lora_" not in name and "norm" not in name}


def test_the_share_in_few_bits_is_said(base, capfd):
    healer = make_healer(base)
    total = sum(p.numel() for p in healer.model.decoder_layers.parameters() if not p.requires_grad)
    held = sum(p.numel() for p in frozen(healer).values())
    assert 0.5 < held / total < 1
    quantize(healer, "int8")
    assert f"quantize: {held / total:.0%} of the layers' weights are held in int8" in capfd.readouterr().err


def test_without_torchao_the_fix_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(EnvironmentTrouble, match=r"quantize=int8: .*pip install 'layerboost\[quantize\]'"):
        make_healer(base, "int8")


def test_whole_weights_are_what_is_spread():
    with pytest.raises(ValueError, match="leave quantize or shard out"):
        settings_with(quantize="int8", shard=True)


@pytest.fixture
def _torchao():
    pytest.importorskip("torchao.quantization")


needs_torchao = pytest.mark.usefixtures("_torchao")


@needs_torchao
@pytest.mark.parametrize(("bits", "near"), [("int8", 0.002), ("int4", 0.1)])
def test_the_teacher_is_near_the_original(bits, near):
    """Of a trained model, on text; KL in nats."""
    folder = find_model("reference")
    original = load_original(folder).float()
    documents = open_corpus(None).split("validation")
    tokens = text_sequences(documents, load_tokenizer(folder), count=4, length=128, seed=0).tokens
    healer = Healer(load_original(folder).float(), [FULL, NONE, *[FULL] * 6], SETTINGS)
    quantize(healer, bits)
    with torch.no_grad(), healer.teacher():
        found = healer.model(tokens).logits.log_softmax(-1)
        wanted = original(tokens).logits.log_softmax(-1)
    assert 0 < kl_divergence(wanted, found).mean() < near


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_and_its_gradient(base, bits, dtype):
    """Near those of the whole weight, and no copy of it is kept for the backward pass."""
    healer = Healer(load_original(base).to(dtype), LAYERS, SETTINGS)
    module = healer.model.decoder_layers[1].mlp.up_proj.base_layer
    whole = module.weight.detach().clone()
    quantize(healer, bits)
    given = torch.randn(3, 5, 128).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = module(given)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, given, upstream)
    wanted = functional.linear(given, whole)
    (wanted_gradient,) = torch.autograd.grad(wanted, given, upstream)
    for found, exact in ((out, wanted), (gradient, wanted_gradient)):
        assert found.dtype == dtype
        assert (found - exact).norm() < FAR[bits] * exact.norm()
    assert not saved


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_the_bits_are_few_and_what_is_trained_is_float32(base, bits):
    plain, healer = make_healer(base, norms=True), make_healer(base, bits, norms=True)
    assert {p.dtype for p in healer.parameters.values()} == {torch.float32}
    assert healer.parameters.keys() == plain.parameters.keys()
    for name, weight in frozen(healer).items():
        inner = [getattr(weight, key) for key in weight.__tensor_flatten__()[0]]
        used = sum(tensor.numel() * tensor.element_size() for tensor in inner if tensor is not None)
        assert used < {"int8": 0.3, "int4": 0.15}[bits] * frozen(plain)[name].nbytes


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("settings", [{}, {"train": "full"}, {"gradient_checkpointing": True}], ids=str)
def test_gradients_are_near_those_of_whole_weights(base, bits, settings):
    losses = {"forward_kl": 1.0, "hidden": 5.0}
    batch = scored(some_tokens(4, 40))
    _, wanted = gradients(make_healer(base, losses=losses, **settings), batch)
    _, found = gradients(make_healer(base, bits, losses=losses, **settings), batch)
    assert found.keys() == wanted.keys()
    ours, theirs = (torch.cat([grad.flatten() for grad in of.values()]) for of in (found, wanted))
    assert functional.cosine_similarity(ours, theirs, dim=0) > {"int8": 0.98, "int4": 0.4}[bits]


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_healing_lowers_the_distance(base, bits):
    healer = make_healer(base, bits, losses={"forward_kl": 1.0})
    optimizer = torch.optim.AdamW(healer.parameters.values(), lr=3e-3)
    batch, found = scored(some_tokens(4, 32)), []
    for _ in range(12):
        optimizer.zero_grad()
        found.append(healer.backward(batch, Counts.of(batch)).item())
        optimizer.step()
    assert found[-1] < 0.8 * found[0]


@needs_torchao
@pytest.mark.parametrize("bits", BITS)
def test_what_is_published_is_whole(base, tmp_path, bits):
    """The original's own weights, in its dtype, and what was trained; whatever the teacher looked like."""
    hybrid = convert.run(base, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    config = settings_with(quantize=bits, tokens=8_192)
    found = heal.run(hybrid, base, config, out=tmp_path / "healed")
    best = next(point for point in found.curve if point.step == found.published)
    assert found.published > 0
    assert best.kl < 0.97 * found.curve[0].kl
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hybrid", "healed"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    untouched = [name for name in before if ".layers.0." in name or "norm" in name or "embed" in name]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    changed = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(before[changed], after[changed])
    assert (before[changed].float() - after[changed].float()).norm() < 0.5 * before[changed].float().norm()
