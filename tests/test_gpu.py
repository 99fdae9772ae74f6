"""On a GPU everything is what it is on the CPU, in float32 within rounding. Skipped where there is none."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, DynamicCache

from layerboost import analyze, bench, convert, evaluate, heal
from layerboost.artifacts import Plan
from layerboost.cost.device import probe
from layerboost.heal.losses import LOSSES, fused_kl, kl_over_teacher, mixed_logits_loss
from layerboost.heal.sharding import quantize
from layerboost.heal.student import Counts, Healer
from layerboost.model import kernels
from layerboost.model.loading import load_model, load_original
from layerboost.model.mixers import flex_mask
from layerboost.model.operators import gated_kernel_sum, sliding_window_attention
from layerboost.passes import Scorer
from tests.test_heal import LAYERS, LOGITS, OWN, SETTINGS, gradients, make_healer, scored, settings_with, written_out
from tests.test_hybrid import PLANS, W, fitting, hybrid_of
from tests.test_operators import masked_softmax, qkv
from tests.tiny import FAMILIES, FULL, NONE, make_checkpoint, some_tokens, window

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CLOSE = {"atol": 2e-4, "rtol": 1e-3}
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # heads that flex attention and kernels take


def on_gpu(folder, name):
    """What `hybrid_of` gives, beside it."""
    model = load_original(folder)
    model.convert(fitting(folder, PLANS[name]))
    model.load_state_dict(hybrid_of(folder, name).state_dict())
    return model.cuda()


@pytest.mark.parametrize("size", [1, 7, 40, 64])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (1, 40), (130, 400), (700, 700)])
def test_windows_and_their_gradients(size, queries, keys):
    inputs = [t.detach().cuda().requires_grad_() for t in qkv(queries, keys, size=32)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, wanted = sliding_window_attention(*inputs, window=size), masked_softmax(*(t.cpu() for t in exact), size)
    torch.testing.assert_close(ours.double().cpu(), wanted, **CLOSE)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, upstream)
    for one, other in zip(found, torch.autograd.grad(wanted, exact, upstream.double().cpu()), strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
@torch.no_grad()
def test_flex_attention_compiled_sees_the_window(size):
    """As one kernel, which skips the blocks that no query sees."""
    q, k, v = (t.detach().cuda() for t in qkv(300, 300, size=32, values=32))
    found = torch.compile(flex_attention)(q, k, v, block_mask=flex_mask(q, k, size, None), enable_gqa=True)
    torch.testing.assert_close(found, sliding_window_attention(q, k, v, window=size), atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_a_hybrid_runs_on_flex_attention(tmp_path):
    model = load_original(make_checkpoint(tmp_path, "qwen3", **SIZES))
    model.convert([window(8), FULL, NONE, window(9)])
    model.cuda()
    tokens = some_tokens(2, 130).cuda()
    wanted = model(tokens).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(tokens).logits, wanted, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_the_gated_kernel_proves_itself():
    pytest.importorskip("fla.ops.gla")
    assert kernels.gated_kernel("cuda", gated_kernel_sum) is not None


@pytest.mark.parametrize("names", [[name] for name in LOGITS] + [LOGITS], ids=str)
def test_losses_against_float64(names):
    torch.manual_seed(0)
    tokens, vocabulary, hidden = 300, 1_000, 48
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False).cuda()
    student = torch.randn(tokens, hidden).cuda().requires_grad_()
    teacher, targets = torch.randn(tokens, hidden).cuda(), torch.randint(vocabulary, (tokens,)).cuda()
    loss = mixed_logits_loss(dict.fromkeys(names, 1.0), student, teacher, targets, head, chunk=64)
    loss.backward()
    exact, matrix = student.detach().double().requires_grad_(), head.weight.double().T
    wanted = sum(written_out(name, exact @ matrix, teacher.double() @ matrix, targets).sum() for name in names)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1_001, 151_936])
@torch.no_grad()
def test_the_fused_loss_is_that_of_plain_code(dtype, vocabulary):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(130, vocabulary, device="cuda", dtype=dtype) for _ in range(2))
    kernel, written, plain = fused_kl(dtype), teacher.clone(), teacher.clone()
    assert kernel is not None
    torch.testing.assert_close(kernel(student, written), kl_over_teacher(student, plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_healing(checkpoints, family):
    layers = fitting(checkpoints[family], OWN)
    losses = {name: 1.0 for name in LOSSES if name not in ("values", "attention")}
    config = settings_with(losses=losses, norms=True)
    (loss, wanted), (found_loss, found) = (
        gradients(make_healer(checkpoints[family], layers, config).to(device), scored(some_tokens(3, 40)))
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(found_loss.cpu(), loss, rtol=1e-3, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name].cpu(), wanted[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_teacher_is_the_original(tmp_path, dtype):
    folder = make_checkpoint(tmp_path, "qwen3", dtype=dtype, **SIZES)
    original, tokens = load_original(folder).cuda(), some_tokens(2, 64).cuda()
    healer = Healer(load_original(folder), LAYERS, SETTINGS).to("cuda")
    wanted = original(tokens).logits
    for _ in range(2):
        with healer.teacher():
            assert torch.equal(healer.model(tokens).logits, wanted)
        with torch.enable_grad():
            healer.backward(scored(tokens), Counts.of(scored(tokens)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model in bfloat16 and its hybrid."""
    root = tmp_path_factory.mktemp("gpu")
    folder = make_checkpoint(root / "base", "qwen3", dtype=torch.bfloat16, **SIZES)
    return folder, convert.run(folder, Plan(layers=LAYERS), out=root / "hybrid")


def test_a_healing_that_was_stopped_ends_where_it_would_have(pair, tmp_path, monkeypatch):
    folder, hybrid = pair
    config = settings_with(tokens=6_144)
    whole = heal.run(hybrid, folder, config, out=tmp_path / "whole")
    assert whole.curve[-1].kl < whole.curve[0].kl
    monkeypatch.setattr(heal.training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(heal.training, "_SAVE_SHARE", 0)
    step = heal.training._Run._step

    def stop(self, asked):
        found, _ = step(self, asked)
        return found, self.done == 10

    with monkeypatch.context() as patch:
        patch.setattr(heal.training._Run, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            heal.run(hybrid, folder, config, out=tmp_path / "stopped")
    heal.run(hybrid, folder, config, out=tmp_path / "stopped")
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name in whole:  # attention's gradients are sums in no fixed order there
        torch.testing.assert_close(stopped[name].float(), whole[name].float(), atol=1e-3, rtol=8e-3)


@pytest.mark.parametrize("settings", [
    {"train": "full"}, {"gradient_checkpointing": True}, {"losses": {"forward_kl": 1.0}, "signals": "kept"},
    {"losses": {"forward_kl": 1.0, "values": 1.0, "attention": 1.0}}, {"quantize": "int8"}, {"quantize": "int4"},
], ids=str)  # fmt: skip
def test_every_way_of_healing(pair, tmp_path, settings):
    if "quantize" in settings:
        pytest.importorskip("torchao.quantization")
    if "signals" in settings:
        settings = settings | {"signals": tmp_path / "kept"}
    folder, hybrid = pair
    found = heal.run(hybrid, folder, settings_with(tokens=6_144, **settings), out=tmp_path / "healed")
    assert found.curve[-1].kl < found.curve[0].kl
    assert next(load_model(tmp_path / "healed").parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_few_bits_take_little_memory(tmp_path, bits):
    pytest.importorskip("torchao.quantization")
    folder = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048)
    used = []
    for quantized in (False, True):
        before = torch.cuda.memory_allocated()
        healer = Healer(load_original(folder), LAYERS, SETTINGS)
        if quantized:
            quantize(healer, bits)
        healer.to("cuda")
        used.append(torch.cuda.memory_allocated() - before)
        del healer
    assert used[1] < {"int8": 0.75, "int4": 0.6}[bits] * used[0]


def test_memory_that_runs_out_makes_passes_smaller(tmp_path, capsys):
    """A real shortage: what torch may take is little more than what the weights take."""
    folder = make_checkpoint(tmp_path / "base", "qwen3", dtype=torch.bfloat16, vocab_size=258, **SIZES)
    hybrid = convert.run(folder, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    config = settings_with(tokens=2**17, length=256, batch=256, texts=2, answers=2)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400 * 2**20) / total)
    try:
        found = heal.run(hybrid, folder, config, out=tmp_path / "healed")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory: " in capsys.readouterr().err
    assert found.steps == 2
    assert found.skipped == 0


@torch.no_grad()
def test_plans_score_as_on_the_cpu(checkpoints):
    plans = [[FULL] * 4, LAYERS, [window(8)] * 4, [NONE] * 4]
    batch = scored(some_tokens(5, 40))
    on_cpu, on_gpu = (
        Scorer(load_original(checkpoints["qwen3"]).to(device), {"text": batch})(plans) for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.keys() == theirs.keys()
        for metric in ("text.kl", "text.nll"):
            torch.testing.assert_close(torch.tensor(ours[metric]), torch.tensor(theirs[metric]), **CLOSE)


def test_the_steps_of_the_pipeline(pair, tmp_path):
    """`auto` is the GPU."""
    folder, hybrid = pair
    found = analyze.run(folder, analyze.Config(windows=[8], length=64, texts=4, answers=4), out=tmp_path / "sens.json")
    assert found.layers
    judged = evaluate.run(hybrid, folder, evaluate.Config(texts=4, answers=4, length=64, completions=2))
    assert judged.models["converted"].kl.mean > 0
    timed = bench.run(hybrid, folder, bench.Config(context=64, new_tokens=4, batch=2, repeats=2))
    assert timed.settings["device"] == "cuda"
    assert all(timed.settings["peak_bytes"].values())
    assert timed.kv_bytes_per_token["healed"] < timed.kv_bytes_per_token["base"]


def test_the_probe_of_this_machine():
    found = probe("cuda")
    assert found.memory == torch.cuda.get_device_properties(0).total_memory
    assert found.flops > 1e12
    assert 1e10 < found.bandwidth < 2e13


@torch.no_grad()
def test_all_full_is_the_stock_model(checkpoints):
    for family in ("qwen3", "llama", "gemma3_text"):
        base = AutoModelForCausalLM.from_pretrained(checkpoints[family]).cuda().eval()
        tokens = some_tokens(2, 40).cuda()
        assert torch.equal(load_original(checkpoints[family]).cuda()(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_hybrids_compute_what_they_do_on_the_cpu(checkpoints, family, name):
    """Whole, with a cache, and padded on the left."""
    model, tokens = on_gpu(checkpoints[family], name), some_tokens(2, 40)
    padding = torch.ones_like(tokens)
    padding[0, :W] = 0
    wanted = hybrid_of(checkpoints[family], name)(tokens).logits
    torch.testing.assert_close(model(tokens.cuda()).logits.cpu(), wanted, **CLOSE)
    cache = DynamicCache(config=model.config)
    found = [model(part, past_key_values=cache).logits for part in tokens.cuda().split([W, 1, 20, 1, 18 - W], 1)]
    torch.testing.assert_close(torch.cat(found, 1).cpu(), wanted, **CLOSE)
    wanted = hybrid_of(checkpoints[family], name)(tokens, attention_mask=padding).logits
    found = model(tokens.cuda(), attention_mask=padding.cuda()).logits.cpu()
    torch.testing.assert_close(found[padding.bool()], wanted[padding.bool()], **CLOSE)
