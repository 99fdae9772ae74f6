"""Healing: losses against float64, one set of weights as teacher and student, and resuming to the same bytes."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from layerboost import convert, heal
from layerboost.artifacts import Plan
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, DataError, TrainingError, UsageError
from layerboost.heal import trainer
from layerboost.heal.checkpoint import save_step, steps
from layerboost.heal.losses import chunked_kl, hidden_loss
from layerboost.heal.trainer import Healer, adapted_modules, schedule
from layerboost.model.loading import load_model, load_original
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, linear, make_checkpoint, native_windows, some_tokens, window

LAYERS = [NONE, window(8), FULL, NONE]
SETTINGS = heal.Config(tokens=3_072, length=64, batch=4, rank=4, texts=2, answers=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    return convert.run(tiny, Plan(layers=LAYERS), out=tmp_path_factory.mktemp("heal") / "hybrid")


def scored(tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return Sequences(tokens, mask)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
def test_chunked_kl_against_float64(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 50, bias=False)
    student = torch.randn(7, 6, requires_grad=True)
    teacher = torch.randn(7, 6)
    loss = chunked_kl(student, teacher, head, chunk=chunk)
    loss.backward()
    exact = student.detach().double().requires_grad_()
    weight = head.weight.detach().double()
    p, q = ((hidden @ weight.T).log_softmax(-1) for hidden in (teacher.double(), exact))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_chunked_kl_of_nothing_is_zero():
    student = torch.randn(0, 6, requires_grad=True)
    loss = chunked_kl(student, torch.randn(0, 6), torch.nn.Linear(6, 50))
    loss.backward()
    assert loss.item() == 0


def test_hidden_loss_is_a_share_of_the_variance():
    teacher = torch.randn(2, 30, 8) * 3
    assert hidden_loss([teacher], [teacher]).item() == 0
    assert hidden_loss([torch.zeros_like(teacher)], [teacher]).item() == pytest.approx(1, abs=0.1)


OWN = [window(8, sink=True), linear("lolcats", 8), linear("gla"), FULL]  # mixers with parameters of their own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [LAYERS, OWN], ids=["none and window", "own parameters"])
@torch.no_grad()
def test_teacher_and_student_share_weights(checkpoints, family, layers):
    """The teacher stays bit-equal to the original, whatever the adapter holds; merged equals unmerged."""
    original, model = load_original(checkpoints[family]), load_original(checkpoints[family])
    native = native_windows(model.config, 4)
    layers = [FULL if p.mixer == "linear_attention" and n else p for p, n in zip(layers, native, strict=True)]
    other = load_original(checkpoints[family])
    other.convert(layers)
    healer = Healer(model, layers, SETTINGS, other.own_mixers())
    assert bool(healer.mixing) == any(p.sink or p.mixer == "linear_attention" for p in layers)
    for parameter in healer.parameters.values():
        parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = some_tokens(2, 40)
    with healer.teacher():
        assert torch.equal(
            healer.model.base_model(tokens).last_hidden_state, original.base_model(tokens).last_hidden_state
        )
    with healer.student():
        student = healer.model(tokens).logits
    with original.mixed(dict(enumerate(layers))):
        assert (student - original(tokens).logits).abs().max() > 0.01
    merged = healer.merged(torch.float32)
    merged.convert(layers, mixers=healer.mixers)
    torch.testing.assert_close(merged(tokens).logits, student, atol=5e-5, rtol=1e-4)


def test_attention_transfer_trains_the_mixers_alone(tiny):
    model, other = load_original(tiny), load_original(tiny)
    layers = [linear("lolcats", 4), FULL, linear("lolcats", 4, "elu"), NONE]
    other.convert(layers)
    healer = Healer(model, layers, SETTINGS, other.own_mixers())
    optimizer = torch.optim.Adam(healer.parameters.values(), lr=5e-2)
    before = {name: p.detach().clone() for name, p in healer.adapter.items()}
    held_out = scored(some_tokens(8, 64, seed=99))
    first = healer.transfer_loss(held_out).item()
    for step in range(60):
        optimizer.zero_grad(set_to_none=True)
        healer.transfer_loss(scored(some_tokens(4, 64, seed=step))).backward()
        optimizer.step()
    assert healer.transfer_loss(held_out).item() < 0.9 * first
    assert all(torch.equal(p, before[name]) for name, p in healer.adapter.items())
    assert all(p.grad is not None for p in healer.mixing.values())


def test_only_what_is_left_is_adapted(tiny):
    names = adapted_modules(load_original(tiny), LAYERS)
    assert len(names) == 2 * 7 + 2 * 3
    assert not [name for name in names if ".0.self_attn" in name or ".3.self_attn" in name]


def test_the_student_gets_closer(tiny, hybrid, tmp_path):
    longer = SETTINGS.model_dump() | {"tokens": 20_000, "learning_rate": None, "rank": 16}
    found = heal.run(hybrid, tiny, heal.Config(**longer), out=tmp_path / "healed")
    assert found.curve[0].step == 0
    assert found.curve[-1].step == found.steps
    assert found.curve[-1].kl < 0.7 * found.curve[0].kl
    assert not (tmp_path / "healed-steps").exists()
    again = load_model(tmp_path / "healed")
    assert again.plan == LAYERS
    assert again.config.layerboost["provenance"]["healing"]["tokens"] == found.tokens == 20_000 // 64 * 64
    assert json.loads((tmp_path / "healed" / "healing.json").read_text())["steps"] == found.steps
    assert (tmp_path / "healed" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("variant", ["linear", "performer"])
def test_linear_attention_without_parameters_needs_no_transfer(tiny, tmp_path, variant):
    hybrid = convert.run(tiny, Plan(layers=[linear(variant), FULL, FULL, FULL]), out=tmp_path / "hybrid")
    found = heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "healed")
    assert found.curve[-1].kl < found.curve[0].kl


@pytest.mark.parametrize(
    ("layers", "at"),
    [(LAYERS, 5), pytest.param(OWN, 2, id="in the transfer"), pytest.param(OWN, 9, id="after it")],
)
def test_an_interrupted_healing_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, layers, at):
    hybrid = convert.run(tiny, Plan(layers=layers), out=tmp_path / "hybrid")
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    seen = []

    def counted(step):
        def interrupted(self, batch):
            seen.append(batch)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch)

        return interrupted

    for name in ("loss", "transfer_loss"):
        monkeypatch.setattr(Healer, name, counted(getattr(Healer, name)))
    with pytest.raises(KeyboardInterrupt):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    assert len(seen) == at
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts")
    assert len(seen) == 12
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    curves = [json.loads((tmp_path / out / "healing.json").read_text())["curve"] for out in ("whole", "parts")]
    assert curves[0] == curves[1]
    learned = [name for name in load_file(tmp_path / "whole" / "model.safetensors") if ".mixer." in name]
    fresh, trained = (load_file(folder / "model.safetensors") for folder in (hybrid, tmp_path / "whole"))
    assert all(not torch.equal(fresh[name], trained[name]) for name in learned)
    assert all((trained[name] - fresh[name]).abs().max() > 0.1 for name in learned if name.endswith(".sink"))


def stop_after_six_steps(monkeypatch, hybrid, teacher, out, steps):
    """A healing that saved a state at every step, and was stopped after the sixth."""
    real = trainer.save_step

    def save_then_stop(folder, step, *args):
        real(folder, step, *args)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_SAVE_SECONDS", 0.0)
        patch.setattr(trainer, "_SAVE_SHARE", 0.0)
        patch.setattr(trainer, "save_step", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            heal.run(hybrid, teacher, SETTINGS, out=out, steps_folder=steps)


def test_a_damaged_state_is_passed_over(tiny, hybrid, tmp_path, monkeypatch):
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    stop_after_six_steps(monkeypatch, hybrid, tiny, tmp_path / "parts", tmp_path / "steps")
    assert sorted(path.name for path in (tmp_path / "steps").glob("step-*")) == ["step-000005", "step-000006"]
    newest = tmp_path / "steps" / "step-000006" / "adapter.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts", steps_folder=tmp_path / "steps")
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


def test_states_of_other_settings_are_passed_over(tiny, hybrid, tmp_path, monkeypatch):
    other = heal.Config(**SETTINGS.model_dump() | {"seed": 1})
    heal.run(hybrid, tiny, other, out=tmp_path / "fresh")
    stop_after_six_steps(monkeypatch, hybrid, tiny, tmp_path / "beside", tmp_path / "steps")
    heal.run(hybrid, tiny, other, out=tmp_path / "beside", steps_folder=tmp_path / "steps")
    fresh, beside = (tmp_path / name / "model.safetensors" for name in ("fresh", "beside"))
    assert beside.read_bytes() == fresh.read_bytes()


def test_states_of_other_settings_make_room(tmp_path, monkeypatch):
    """They would have higher step numbers, and be kept in place of the new ones."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    for step, inputs in ((500, {"a": "old"}), (600, {"a": "old"}), (50, {"a": "new"})):
        save_step(tmp_path, step, {"p": parameter}, optimizer, {"curve": []}, inputs)
    assert [step for step, _ in steps(tmp_path)] == [50]
    for step in (60, 70, 80):
        save_step(tmp_path, step, {"p": parameter}, optimizer, {"curve": []}, {"a": "new"})
    assert [step for step, _ in steps(tmp_path)] == [70, 80]


def test_a_loss_that_is_not_finite_names_the_step(tiny, hybrid, tmp_path, monkeypatch):
    train_step, calls = Healer.loss, []

    def broken(self, batch):
        calls.append(1)
        return train_step(self, batch) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Healer, "loss", broken)
    with pytest.raises(TrainingError, match="not finite at step 3 of 12; nothing was published"):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


def test_bf16_models_are_healed_in_float32_and_stored_as_they_were(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    converted = convert.run(folder, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    heal.run(converted, folder, SETTINGS, out=tmp_path / "healed")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hybrid", "healed"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])


def test_wrong_partners_are_refused(tiny, hybrid, checkpoints, tmp_path):
    stranger = make_checkpoint(tmp_path / "stranger", "qwen3", seed=1)
    with pytest.raises(CheckpointError, match="is not that of the teacher"):
        heal.run(hybrid, stranger, SETTINGS, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a hybrid; convert it first"):
        heal.run(tiny, tiny, SETTINGS, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a hybrid already"):
        heal.run(hybrid, hybrid, SETTINGS, out=tmp_path / "out")
    with pytest.raises(DataError, match="63 tokens are less than one sequence of 64"):
        heal.run(hybrid, tiny, heal.Config(**SETTINGS.model_dump() | {"tokens": 63}), out=tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not written by layerboost"):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "taken")
    assert (tmp_path / "taken" / "precious.txt").read_text() == "mine"


def test_a_plan_that_keeps_everything_heals_to_itself(tiny, tmp_path):
    same = convert.run(tiny, Plan(layers=[FULL] * 4), out=tmp_path / "same")
    found = heal.run(same, tiny, SETTINGS, out=tmp_path / "healed")
    assert (found.steps, found.tokens, found.curve[-1].kl) == (0, 0, 0)
    assert (tmp_path / "healed" / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


def test_schedule_warms_up_and_decays():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 4
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert schedule(0, 1) == 1


@pytest.mark.parametrize(
    ("written", "tokens"), [("200k", 200_000), ("10M", 10_000_000), (5, 5), ("1_000", 1_000), ("0.5M", 500_000)]
)
def test_token_counts_as_people_write_them(written, tokens):
    assert heal.Config(tokens=written).tokens == tokens


@pytest.mark.parametrize("written", ["many", "10MB", "-5", 0, "nan", "k"])
def test_wrong_token_counts(written):
    with pytest.raises(ValueError, match="tokens"):
        heal.Config(tokens=written)
