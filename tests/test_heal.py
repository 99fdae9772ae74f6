"""Healing: losses against float64, one set of weights as teacher and student, and what is trained."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost import convert, heal
from layerboost.artifacts import CurvePoint, Plan
from layerboost.data.probes import PROBES
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, DataError, UsageError
from layerboost.heal import training
from layerboost.heal.losses import (
    LOSSES,
    kl_over_teacher,
    mixed_logits_loss,
    relative_error,
    top_k_kl,
    value_relations,
)
from layerboost.heal.recovery import Look, Recovery, looks
from layerboost.heal.student import Counts, Healer, merge
from layerboost.heal.targets import check_modules, find_targets
from layerboost.heal.training import schedule
from layerboost.model.loading import digest, load_model, load_original, read_config
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, linear, make_checkpoint, native_windows, some_tokens, tokenizer, window

LAYERS = [NONE, window(8), FULL, NONE]
SETTINGS = heal.Config(tokens=3_072, length=64, batch=4, rank=4, texts=2, answers=2, learning_rate=3e-3)
LOGITS = [name for name, loss in LOSSES.items() if loss.needs == "logits"]


def settings_with(**changes):
    return heal.Config(**SETTINGS.model_dump() | changes)


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    return convert.run(tiny, Plan(layers=LAYERS), out=tmp_path_factory.mktemp("heal") / "hybrid")


def scored(tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return Sequences(tokens, mask)


# ---------------------------------------------------------------------------------------------------------- losses


def written_out(name, s, t, targets):
    """`[K, V]` logits in float64 to the mean loss, from the definitions."""
    p, q = t.softmax(-1), s.softmax(-1)
    if name == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if name == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    if name == "jensen_shannon":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    return -q.log()[torch.arange(len(targets)), targets]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 23), vocabulary=st.integers(2, 70), hidden=st.integers(1, 9), chunk=st.integers(1, 30),
    seed=st.integers(0, 10_000), names=st.sets(st.sampled_from(LOGITS), min_size=1), scale=st.sampled_from([0.1, 1, 5]),
)  # fmt: skip
def test_losses_on_logits_against_float64(tokens, vocabulary, hidden, chunk, seed, names, scale):
    torch.manual_seed(seed)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    student = (scale * torch.randn(tokens, hidden)).requires_grad_()
    teacher, targets = scale * torch.randn(tokens, hidden), torch.randint(vocabulary, (tokens,))
    weights = {name: 0.5 + i for i, name in enumerate(sorted(names))}
    loss = mixed_logits_loss(weights, student, teacher, targets, head, chunk=chunk)
    (3 * loss).backward()
    exact = student.detach().double().requires_grad_()
    matrix = head.weight.double().T
    wanted = sum(
        weight * written_out(name, exact @ matrix, teacher.double() @ matrix, targets).sum()
        for name, weight in weights.items()
    )
    (3 * wanted).backward()
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_kl_as_it_is_written_down(dtype):
    """Against autograd in float64, and when a compiler has made one kernel of it."""
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(17, 301) for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact = student.double().requires_grad_()
    wanted = written_out("forward_kl", exact, teacher.double(), None)
    wanted.sum().backward()
    for function in (kl_over_teacher, torch.compile(kl_over_teacher, dynamic=True, backend="aot_eager")):
        gradient = teacher.clone()
        found = function(student, gradient)
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
        close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(gradient.double(), exact.grad, **close)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 12), vocabulary=st.integers(3, 60), kept=st.integers(1, 60), seed=st.integers(0, 10_000))
def test_what_is_kept_of_a_teacher(tokens, vocabulary, kept, seed):
    """KL over the kept tokens and the rest as one: as in float64, and never above the whole."""
    torch.manual_seed(seed)
    kept = min(kept, vocabulary)
    student, teacher = (torch.randn(tokens, vocabulary).double().log_softmax(-1) for _ in range(2))
    top = teacher.topk(kept)
    found = top_k_kl(student.float(), top.indices, top.values.float())
    p, q = top.values.exp(), student.gather(-1, top.indices).exp()
    rest, own_rest = 1 - p.sum(-1), 1 - q.sum(-1)
    wanted = (p * (p / q).log()).sum(-1)
    if kept < vocabulary:
        wanted = wanted + rest * (rest / own_rest).log()
    whole = (teacher.exp() * (teacher - student)).sum(-1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    assert (found.double() <= whole + 1e-4).all()
    if kept == vocabulary:
        torch.testing.assert_close(found.double(), whole, rtol=1e-3, atol=1e-4)


def test_logits_are_never_whole():
    """No more than a chunk's worth of tokens reaches the head at once, and each of them once per model."""
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return hidden @ torch.eye(8)

    student = torch.randn(50, 8, requires_grad=True)
    mixed_logits_loss(
        {"forward_kl": 1.0}, student, torch.randn(50, 8), torch.zeros(50).long(), head, chunk=7
    ).backward()
    assert max(seen) == 7
    assert sum(seen) == 2 * 50


def test_losses_on_hidden_states():
    teacher, student = torch.randn(2, 30, 8) * 3, torch.randn(2, 30, 8)
    assert relative_error(teacher, teacher).abs().max() == 0
    assert torch.allclose(relative_error(torch.zeros_like(teacher), teacher), torch.ones(2, 30))
    teacher[:, 0] *= 1_000  # as the first token's are in pretrained models
    assert relative_error(student, teacher)[:, 1:].mean() > 0.5
    found = LOSSES["cosine"].function(student, teacher)
    wanted = 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_value_relations_pair_by_pair():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    visible = torch.rand(2, 5, 5) > 0.4
    visible |= torch.eye(5, dtype=torch.bool)
    found = value_relations(student, teacher, visible)
    for b in range(2):
        for t in range(5):
            keys = visible[b, t].nonzero()[:, 0]
            total = 0.0
            for g in range(3):
                p, q = ((v[b, g, t] @ v[b, g, keys].T / 2.0).softmax(-1) for v in (teacher, student))
                total += (p * (p / q).log()).sum().item() / 3
            assert found[b, t].item() == pytest.approx(total, abs=1e-5)


# ------------------------------------------------------------------------------------------- one set of weights

OWN = [window(8, sink=True), linear("lolcats", 8), linear("gla"), FULL]  # mixers with parameters of their own


def make_healer(folder, layers, config=SETTINGS):
    model, other = load_original(folder), load_original(folder)
    other.convert(layers)
    return Healer(model, layers, config, other.own_mixers())


def shaken(healer, by=0.05):
    """With all that is trained moved away from where it starts."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in healer.parameters.values():
            parameter.add_(by * torch.randn_like(parameter))
    return healer


def gradients(healer, batch, size=None):
    for parameter in healer.parameters.values():
        parameter.grad = None
    counts = Counts.of(batch)
    loss = sum(healer.backward(part, counts) for part in batch.batches(size or len(batch)))
    return loss, {name: p.grad.clone() for name, p in healer.parameters.items() if p.grad is not None}


def assert_same(found, wanted, **tolerance):
    assert torch.allclose(found[0], wanted[0], rtol=1e-4, atol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        torch.testing.assert_close(found[1][name], wanted[1][name], **({"rtol": 1e-3, "atol": 1e-6} | tolerance))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [LAYERS, OWN], ids=["none and window", "own parameters"])
def test_teacher_and_student_share_weights(checkpoints, family, layers):
    """The teacher stays bit-equal to the original, whatever is trained; merged equals unmerged."""
    original = load_original(checkpoints[family])
    native = native_windows(original.config, 4)
    layers = [FULL if p.mixer == "linear_attention" and n else p for p, n in zip(layers, native, strict=True)]
    config = settings_with(norms=True, gradient_checkpointing=True)
    healer = shaken(make_healer(checkpoints[family], layers, config))
    assert bool(healer.mixing) == any(p.sink or p.mixer == "linear_attention" for p in layers)
    tokens = some_tokens(2, 40)
    wanted = original.base_model(tokens).last_hidden_state
    for _ in range(2):
        with healer.teacher():
            assert torch.equal(healer.model.base_model(tokens).last_hidden_state, wanted)
        healer.backward(scored(tokens), Counts.of(scored(tokens)))  # and a step in between leaves nothing behind
    with torch.no_grad(), healer.student():
        student = healer.model(tokens).logits
    with torch.no_grad(), original.mixed(dict(enumerate(layers))):
        assert (student - original(tokens).logits).abs().max() > 0.01
    merged = merge(load_original(checkpoints[family]), healer.parameters, healer.targets)
    merged.convert(layers, mixers=healer.mixers)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, student, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(checkpoints, family):
    layers = [NONE, window(8), FULL, window(4)]
    batch = scored(some_tokens(3, 24))
    plain, saving = (
        gradients(shaken(make_healer(checkpoints[family], layers, settings_with(gradient_checkpointing=on))), batch)
        for on in (False, True)
    )
    assert_same(saving, plain)


def test_gradient_checkpointing_runs_layers_again(tiny):
    """And a layer that is not run again holds what it computed: the test above must not pass by doing nothing."""
    counts = {}
    for on in (False, True):
        healer = make_healer(tiny, LAYERS, settings_with(gradient_checkpointing=on))
        calls = []
        healer.model.decoder_layers[2].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients(healer, scored(some_tokens(2, 24)))
        counts[on] = len(calls)
    assert counts == {False: 2, True: 3}  # teacher and student, and the student again


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[FULL, FULL, window(4), NONE], [FULL, FULL, FULL, NONE]])
def test_layers_before_the_first_change_run_once(checkpoints, family, layers):
    batch = scored(some_tokens(3, 24))
    packed = layers[2] == FULL and family in ("qwen3_moe", "mixtral")  # nothing is left there that takes adapters
    healer = shaken(make_healer(checkpoints[family], layers, settings_with(train="full" if packed else "lora")))
    assert make_healer(checkpoints[family], layers).shared == (0 if packed else healer.shared)
    assert healer.shared == [plan.mixer for plan in layers].index(next(p.mixer for p in layers if p != FULL))
    calls = []
    hook = healer.model.decoder_layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    mlp = next(
        m for name, m in healer.model.decoder_layers[0].named_children() if "mlp" in name.lower() or "ff" in name
    )
    inner = []
    mlp.register_forward_hook(lambda *_: inner.append(1))
    found = gradients(healer, batch)
    assert len(inner) == 1
    hook.remove()
    healer.shared = 0
    assert_same(found, gradients(healer, batch))


def test_nothing_is_shared_where_something_before_is_trained(tiny):
    layers = [FULL, FULL, window(4), NONE]
    healer = make_healer(tiny, layers, settings_with(targets=["before.mlp", "changed"]))
    assert healer.shared == 0
    _, found = gradients(shaken(healer), scored(some_tokens(2, 24)))
    assert any(".layers.0." in name for name in found)


@pytest.mark.parametrize("layers", [LAYERS, OWN], ids=["none and window", "own parameters"])
def test_a_step_in_parts_is_the_step(tiny, layers):
    config = settings_with(losses={"forward_kl": 1, "hidden": 5, "cosine": 1, "attention": 1, "cross_entropy": 0.5})
    healer, tokens = shaken(make_healer(tiny, layers, config)), some_tokens(5, 24)
    batch = scored(tokens)
    batch.scored[1, 5:] = False  # rows that count for less
    whole = gradients(healer, batch)
    for size in (1, 2, 4):
        assert_same(gradients(healer, batch, size), whole)


def test_packed_documents_do_not_see_one_another(tiny):
    """A row of three documents has the losses and gradients of the three by themselves."""
    config = settings_with(losses={"forward_kl": 1, "hidden": 5, "values": 1, "attention": 1})
    healer = shaken(make_healer(tiny, [NONE, window(8), FULL, window(4)], config))
    lengths, tokens = (20, 9, 11), some_tokens(1, 40)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = Sequences(tokens, positions > 0, positions)
    counts = Counts.of(packed)
    assert counts == Counts(scored=37, real=40)
    wanted = 0.0
    for parameter in healer.parameters.values():
        parameter.grad = None
    for part in tokens.split(lengths, 1):
        wanted = wanted + healer.backward(scored(part), counts)
    apart = {name: p.grad.clone() for name, p in healer.parameters.items() if p.grad is not None}
    assert_same(gradients(healer, packed), (wanted, apart))


@pytest.mark.parametrize("layers", [LAYERS, OWN], ids=["none and window", "own parameters"])
def test_padding_counts_for_nothing(tiny, layers):
    values = {"values": 1} if layers == LAYERS else {}  # which needs a full attention behind the first change
    config = settings_with(losses={"forward_kl": 1, "hidden": 5, "cosine": 1, "attention": 1} | values)
    healer, tokens = shaken(make_healer(tiny, layers, config)), some_tokens(2, 24)
    positions = torch.arange(24).repeat(2, 1)
    positions[:, 15:] = -1
    padded = Sequences(tokens, positions > 0, positions)
    assert_same(gradients(healer, padded), gradients(healer, scored(tokens[:, :15])), atol=1e-5)


def test_attention_transfer_trains_the_mixers_alone(tiny):
    healer = make_healer(tiny, [linear("lolcats", 4), FULL, linear("lolcats", 4, "elu"), NONE])
    optimizer = torch.optim.Adam(healer.parameters.values(), lr=5e-2)
    before = {name: p.detach().clone() for name, p in healer.adapter.items()}
    held_out = scored(some_tokens(8, 64, seed=99))
    first = healer.transfer(held_out, Counts.of(held_out)).item()
    for step in range(60):
        optimizer.zero_grad(set_to_none=True)
        batch = scored(some_tokens(4, 64, seed=step))
        healer.transfer(batch, Counts.of(batch))
        optimizer.step()
    assert all(p.grad is not None for p in healer.mixing.values())
    assert healer.transfer(held_out, Counts.of(held_out)).item() < 0.9 * first
    assert all(torch.equal(p, before[name]) for name, p in healer.adapter.items())


# --------------------------------------------------------------------------------------------- what is trained


def names(healer):
    return {target.name.removeprefix("layers.") for target in healer.targets if target.adapted}


def test_only_what_is_left_is_adapted(tiny):
    found = names(make_healer(tiny, LAYERS))
    assert len(found) == 2 * 7 + 2 * 3
    assert not [name for name in found if name.startswith(("0.self_attn", "3.self_attn"))]


def test_targets_by_role_part_and_name(tiny):
    layers = [FULL, NONE, window(4), FULL]
    for targets, wanted in (
        (["removed.mlp"], {"1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"}),
        (["kept.attention.q_proj", "changed.attention.o_proj"], {"3.self_attn.q_proj", "2.self_attn.o_proj"}),
        (["before.attention.v_proj"], {"0.self_attn.v_proj"}),
        (["kept.attention"], {f"3.self_attn.{n}_proj" for n in "qkvo"}),
    ):
        assert names(make_healer(tiny, layers, settings_with(targets=targets))) == wanted
    with pytest.raises(UsageError, match=r"kept\.attention\.qkv names nothing that could be trained"):
        make_healer(tiny, layers, settings_with(targets=["changed", "kept.attention.qkv"]))
    with pytest.raises(ValueError, match="must be a role"):
        settings_with(targets=["mlp"])


@pytest.mark.parametrize("family", FAMILIES)
def test_module_names_are_known_without_weights(checkpoints, family):
    folder = checkpoints[family]
    config = read_config(folder)
    everything = settings_with(train="full", learning_rate=None)
    found = find_targets(load_original(folder), [NONE, window(4), FULL, FULL], everything)
    known = {target.name.rpartition(".")[2] for target in found}
    parts = {name: [p for p in ("attention", "mlp") if accepted(config, f"changed.{p}.{name}")] for name in known}
    assert all(parts.values())
    assert {"attention", "mlp"} == {part for own in parts.values() for part in own}
    assert not accepted(config, "changed.mlp.nonsense")


def accepted(config, target):
    try:
        check_modules(config, [target])
    except UsageError:
        return False
    return True


def test_targets_that_the_plan_does_not_have_train_nothing_else(tiny):
    windows = [FULL, FULL, window(4), window(4)]
    for train in ("lora", "full"):
        config = settings_with(targets=["removed", "kept.mlp"], train=train, learning_rate=None)
        with pytest.raises(
            UsageError, match="no layer of this plan is kept or removed; its layers are before, changed"
        ):
            make_healer(tiny, windows, config)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_models_that_do_not_name_the_width_of_their_mlp(tmp_path, family):
    """Their linear modules are transformers' own Conv1D, or their keys have names of their own."""
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 258, "n_positions": 256}
    config = CONFIG_MAPPING[family](**sizes, bos_token_id=0, eos_token_id=0)
    assert getattr(config, "intermediate_size", None) is None
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    convert.run(base, Plan(layers=[FULL, NONE, window(8), FULL]), out=tmp_path / "hybrid")
    healing = heal.run(tmp_path / "hybrid", base, SETTINGS, out=tmp_path / "healed")
    assert healing.curve[-1].kl < healing.curve[0].kl
    before, after = (load_model(tmp_path / name).state_dict() for name in ("hybrid", "healed"))
    changed = {name.split(".", 3)[-1] for name in after if not torch.equal(before[name], after[name])}
    assert {"mlp.c_fc.weight", "mlp.c_proj.weight", "attn.c_attn.weight", "attn.c_proj.weight"} == changed


def test_packed_experts_are_refused_by_name_and_trained_whole(checkpoints):
    moe = next(family for family in FAMILIES if "moe" in family or "mixtral" in family)
    layers = [FULL, FULL, NONE, FULL]
    with pytest.raises(UsageError, match="experts that are packed into one tensor take train=full"):
        make_healer(checkpoints[moe], layers, settings_with(targets=["removed.mlp.experts"]))
    config = settings_with(targets=["removed.mlp.experts"], train="full", learning_rate=None)
    healer = make_healer(checkpoints[moe], layers, config)
    _, found = gradients(healer, scored(some_tokens(4, 32)))
    assert any("experts" in name and grad.abs().sum() > 0 for name, grad in found.items())


def test_full_training_leaves_the_teacher_alone(tiny):
    healer = make_healer(tiny, LAYERS, settings_with(train="full"))
    assert not healer.adapter
    optimizer = torch.optim.AdamW(healer.parameters.values(), lr=3e-3)
    batch = scored(some_tokens(4, 32))
    original, losses = load_original(tiny), []
    for _ in range(12):
        losses.append(gradients(healer, batch)[0].item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    with healer.teacher():
        found = healer.model.base_model(batch.tokens).last_hidden_state
    assert torch.equal(found, original.base_model(batch.tokens).last_hidden_state)
    with torch.no_grad(), healer.student():
        student = healer.model(batch.tokens).logits
    merged = merge(load_original(tiny), healer.parameters, healer.targets)
    merged.convert(LAYERS)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch.tokens).logits, student, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_small_updates_survive_a_low_precision_base(tmp_path, train):
    """What is trained is float32: two hundred updates of 1e-5 add up, which bf16 weights would swallow."""
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    healer = make_healer(folder, LAYERS, settings_with(train=train, norms=True))
    assert {p.dtype for p in healer.parameters.values()} == {torch.float32}
    assert {p.dtype for p in healer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    gradients(healer, scored(some_tokens(2, 24)))
    before = {name: p.detach().clone() for name, p in healer.parameters.items()}
    with torch.no_grad():
        for _ in range(200):
            for parameter in healer.parameters.values():
                parameter.add_(1e-5)
    for name, parameter in healer.parameters.items():
        torch.testing.assert_close(parameter - before[name], torch.full_like(parameter, 2e-3), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize(
    "losses",
    [{"reverse_kl": 1.0}, {"jensen_shannon": 1.0}, {"cross_entropy": 1.0}, {"cosine": 1.0, "forward_kl": 1.0},
     {"attention": 1.0, "forward_kl": 1.0}, {"values": 1.0, "forward_kl": 1.0}, {"hidden": 1.0}],
    ids=lambda losses: "+".join(losses),
)  # fmt: skip
def test_every_loss_heals(tiny, losses):
    healer = make_healer(tiny, LAYERS, settings_with(losses=losses))
    optimizer = torch.optim.AdamW(healer.parameters.values(), lr=3e-3)
    batch, found = scored(some_tokens(4, 32)), []
    for _ in range(10):
        found.append(gradients(healer, batch)[0].item())
        optimizer.step()
    assert found[-1] < 0.9 * found[0]


def test_cross_entropy_alone_asks_no_teacher(tiny, monkeypatch):
    healer = make_healer(tiny, LAYERS, settings_with(losses={"cross_entropy": 1.0}))
    monkeypatch.setattr(Healer, "teacher", lambda self: pytest.fail("the teacher was asked"))
    gradients(healer, scored(some_tokens(2, 24)))


def test_losses_that_do_not_fit_are_refused(checkpoints, tiny, tmp_path):
    with pytest.raises(UsageError, match="there is none; leave that loss out"):
        make_healer(tiny, [NONE, NONE, window(4), NONE], settings_with(losses={"values": 1.0}))
    fused = next(f for f in FAMILIES if f in ("gpt_neox", "phi3"))
    with pytest.raises(UsageError, match="this family has no v_proj"):
        make_healer(checkpoints[fused], LAYERS, settings_with(losses={"values": 1.0}))
    with pytest.raises(UsageError, match="compares the attentions of changed layers, and this plan leaves none"):
        make_healer(tiny, [NONE, FULL, NONE, FULL], settings_with(losses={"attention": 1.0}))
    with pytest.raises(ValueError, match="at least one needs a weight above 0"):
        settings_with(losses={"hidden": 0})
    with pytest.raises(ValueError, match="which hidden cannot be computed from"):
        settings_with(signals=tmp_path)


# --------------------------------------------------------------------------------------------------- whole runs


def test_the_student_gets_closer(tiny, hybrid, tmp_path):
    config = settings_with(tokens=40_000, learning_rate=None, rank=16)
    found = heal.run(hybrid, tiny, config, out=tmp_path / "healed")
    assert found.curve[0].step == 0
    assert found.curve[-1].step == found.steps
    assert found.best.kl < 0.7 * found.curve[0].kl
    assert not (tmp_path / "healed-steps").exists()
    again = load_model(tmp_path / "healed")
    assert again.plan == LAYERS
    assert again.config.layerboost["provenance"]["healing"]["tokens"] == found.tokens == 40_000 // 64 * 64
    assert json.loads((tmp_path / "healed" / "healing.json").read_text())["steps"] == found.steps
    assert (tmp_path / "healed" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_the_best_look_is_what_is_published(tiny, hybrid, tmp_path, monkeypatch):
    """A rate that wrecks the model after a good start: the start is what comes out, and not the end."""
    monkeypatch.setattr(training, "schedule", lambda step, *_: 1.0 if step < 6 else 1000.0)
    wild = settings_with(learning_rate=0.03, texts=8, answers=8)
    found = heal.run(hybrid, tiny, wild, out=tmp_path / "healed")
    best = found.best
    assert best.step == 6 < found.steps
    assert found.alarms[-1] == "the best look was at 1,536 tokens, and its weights are published"
    again = load_model(tmp_path / "healed")
    healer = make_healer(tiny, LAYERS)
    _, validation = heal._data(healer, tiny, wild, tmp_path, "")
    kl = []
    for kind, batch in validation.batches:
        if kind == "text":
            with torch.no_grad(), healer.teacher():
                p = healer.model(batch.tokens).logits[:, :-1].log_softmax(-1)
                q = again(batch.tokens).logits[:, :-1].log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).mean(1))
    assert torch.cat(kl).mean().item() == pytest.approx(best.kl, rel=1e-3)
    assert abs(best.kl - found.curve[-1].kl) > 0.01


@pytest.mark.parametrize("variant", ["linear", "performer"])
def test_linear_attention_without_parameters_needs_no_transfer(tiny, tmp_path, variant):
    hybrid = convert.run(tiny, Plan(layers=[linear(variant), FULL, FULL, FULL]), out=tmp_path / "hybrid")
    found = heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "healed")
    assert found.curve[-1].kl < found.curve[0].kl


def test_signals_stand_in_for_the_teacher(tiny, hybrid, tmp_path, monkeypatch):
    """Written once; read by another plan and another order; equal to asking the teacher where all tokens are kept."""
    losses = {"forward_kl": 1.0, "cross_entropy": 0.2}
    online = settings_with(losses=losses, data_seed=5)
    kept = settings_with(losses=losses, data_seed=5, signals=tmp_path / "signals", top_k=258)
    asked = heal.run(hybrid, tiny, online, out=tmp_path / "online")
    found = heal.run(hybrid, tiny, kept, out=tmp_path / "kept")
    assert [p.kl for p in found.curve] == pytest.approx([p.kl for p in asked.curve], rel=2e-2, abs=2e-3)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "signals").glob("rows-*")}
    other = convert.run(tiny, Plan(layers=[window(4), FULL, FULL, NONE]), out=tmp_path / "other")
    heal.run(other, tiny, settings_with(**kept.model_dump() | {"seed": 3}), out=tmp_path / "again")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "signals").glob("rows-*")} == files
    few = heal.run(
        hybrid,
        tiny,
        settings_with(**kept.model_dump() | {"top_k": 16, "signals": tmp_path / "few"}),
        out=tmp_path / "few-out",
    )
    assert few.curve[-1].kl == pytest.approx(asked.curve[-1].kl, rel=0.1)
    with pytest.raises(UsageError, match="written for another teacher, other rows or another top_k"):
        heal.run(hybrid, tiny, settings_with(**kept.model_dump() | {"data_seed": 6}), out=tmp_path / "no")
    with pytest.raises(UsageError, match="top_k 999 is more than the vocabulary"):
        heal.run(
            hybrid,
            tiny,
            settings_with(**kept.model_dump() | {"top_k": 999, "signals": tmp_path / "x"}),
            out=tmp_path / "no",
        )


def test_the_data_seed_keeps_the_sequences_and_the_seed_their_order(tiny, hybrid, tmp_path, monkeypatch):
    seen = {}
    real = Healer.backward
    for seed in (0, 1):
        rows = seen[seed] = []

        def spy(self, batch, *rest, rows=rows):
            rows.extend(map(tuple, batch.tokens.tolist()))
            return real(self, batch, *rest)

        monkeypatch.setattr(Healer, "backward", spy)
        heal.run(hybrid, tiny, settings_with(seed=seed, data_seed=9, tokens=4_096), out=tmp_path / str(seed))
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1])
    assert len(seen[0]) == 64


def test_bf16_models_are_stored_as_they_were(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    converted = convert.run(folder, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    heal.run(converted, folder, SETTINGS, out=tmp_path / "healed")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hybrid", "healed"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])


# ----------------------------------------------------------------------------------------------------- recovery


def look(step, kl, loss=None, recall_kl=0.0, uneven=0.0):
    """A look whose sequences differ by `uneven` from one look to the next."""
    point = CurvePoint(step=step, tokens=64 * step, loss=loss, kl=kl, nll=kl, recall=0.5, recall_kl=recall_kl)
    turn = uneven if step % 2 else -uneven
    return Look(point=point, kl={"text": [kl + turn, kl - turn] * 8} | {probe: [recall_kl] * 4 for probe in PROBES})


def test_sequences_are_longer_than_the_windows():
    def length(context, *windows, **changes):
        return heal.sequences(heal.Config(**({"tokens": 1_000_000} | changes)), context, windows)[0]

    assert length(8_192) == length(8_192, 64) == length(8_192, 64, 256) == 512
    assert length(8_192, 64, 512) == 1_024
    assert length(768, 64, 512) == 768
    assert length(256, 64) == 256
    assert length(8_192, 512, tokens=800) == 512
    assert length(65_536, 512, tokens=100_000) == 781  # so that there are 32 steps of 4
    assert length(65_536, 4_096, tokens=10_000_000) == 8_192
    assert length(8_192, 512, length=128) == 128
    with pytest.raises(DataError, match="length 600 is more than the model's context of 512"):
        length(512, length=600)
    for written in (heal.Config(), heal.Config.model_validate(heal.Config().model_dump())):
        assert heal.sequences(written, 8_192, [512])[0] == 1_024  # a recipe that was written down says the same


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"train": "full"}, "rank has no effect here: it is of adapters"),
        ({"top_k": 5}, "top_k has no effect here: it is of signals"),
        ({"data": [{"kind": "text"}], "probe_share": 0.2}, "probe_share has no effect here"),
    ],
)
def test_settings_without_effect_are_told(tiny, hybrid, tmp_path, capsys, changes, told):
    heal.run(hybrid, tiny, settings_with(tokens=256, **changes), out=tmp_path / "out")
    said = capsys.readouterr().err
    assert told in said if told else "no effect" not in said


def test_windows_that_see_all_of_a_sequence_are_told(tiny, tmp_path, capsys):
    for width, told in ((63, False), (64, True)):
        made = convert.run(tiny, Plan(layers=[window(width), FULL, NONE, FULL]), out=tmp_path / f"hybrid{width}")
        heal.run(made, tiny, settings_with(tokens=512), out=tmp_path / f"healed{width}")
        said = capsys.readouterr().err
        assert ("a window of 64 hides nothing of sequences of 64 tokens" in said) == told
        assert "choose a length of at least 128" in said or not told


def test_looks_are_often_at_first():
    assert sorted(looks(640)) == [0, 10, 20, 40, 80, 160, 240, 320, 400, 480, 560, 640]
    assert looks(0) == {0}
    assert max(looks(3)) == 3


def test_flat_is_when_the_last_looks_brought_nothing():
    never, soon = Recovery(0), Recovery(2)
    for recovery in (never, soon):
        for step, kl in enumerate((1.0, 0.5, 0.4)):
            recovery.add(look(step, kl))
        assert not recovery.flat
        recovery.add(look(3, 0.399))
        assert not recovery.flat  # one look without a hundredth
        recovery.add(look(4, 0.41))
    assert soon.flat
    assert not never.flat
    soon.add(look(5, 0.3))
    assert not soon.flat


def test_a_curve_is_flat_when_neither_text_nor_answers_get_better():
    recovery = Recovery(2)
    for step, (kl, recall_kl) in enumerate([(1.0, 1.0), (0.5, 0.1), (0.4, 0.3), (0.3, 0.3)]):
        recovery.add(look(step, kl, recall_kl=recall_kl))
    assert not recovery.flat  # though no look's sum is below 0.6, once a lucky one's
    for step in (4, 5):
        recovery.add(look(step, 0.3, recall_kl=0.2))
    assert recovery.flat


def test_looks_count_once_the_rates_are_up(capsys):
    """Before that nothing much is learned, or something else: no reason to stop, nor to be alarmed."""
    recovery = Recovery(patience=2, since=4)
    for step, (kl, loss) in enumerate([(1.0, None), (1.0, 3.0), (1.0, 2.0), (1.2, 1.0)]):
        recovery.add(look(step, kl, loss))
        assert not recovery.flat
    assert not recovery.alarms
    for step, kl in ((4, 0.9), (5, 0.9), (6, 0.9)):
        assert not recovery.flat
        recovery.add(look(step, kl, 0.5))
    assert recovery.flat


def test_the_alarm_rings_when_validation_turns_while_training_falls(capsys):
    recovery = Recovery(0)
    for step, (kl, loss) in enumerate([(1.0, None), (0.5, 1.4), (0.6, 2.1), (0.6, 1.9)]):
        recovery.add(look(step, kl, loss))
    recovery.add(look(4, 0.54, 1.2, uneven=0.1))
    assert recovery.alarms == []  # worse, but training was better before; or not by more than chance
    recovery.add(look(6, 0.6, 1.0))
    assert "overfitting: at 384 tokens the validation distance is 0.600, it was 0.500 at 64" in recovery.alarms[0]
    assert recovery.best.step == 4
    assert "overfitting" in capsys.readouterr().err


def test_a_lucky_look_does_not_hide_the_training_after_it():
    """The last that is no worse than the nearest is kept, and it never drifts away from the nearest."""
    recovery = Recovery(0)
    looks = [look(step, kl, 1.0, uneven=0.1) for step, kl in enumerate([1.0, 0.5, 0.53, 0.56, 0.59, 0.62, 0.52])]
    kept = [recovery.add(found) for found in looks]
    # sequences of even looks are 0.2 off those of odd ones: the difference's error is 0.2 * sqrt(16 / 15) / 4 = 0.052
    assert kept == [True, True, True, False, True, False, True]
    assert recovery.best.step == 6
    assert recovery.nearest == looks[1]
    again = Recovery(0)
    again.restore(json.loads(json.dumps(recovery.state())))
    assert again == recovery


def test_looks_are_told_apart_by_the_error_of_their_difference():
    def found(text, *answers):
        kl = {"text": text} | dict(zip(PROBES, answers, strict=True))
        means = {kind: sum(values) / len(values) for kind, values in kl.items()}
        recall_kl = sum(means[probe] for probe in PROBES) / 3
        return Look(point=CurvePoint(step=0, tokens=0, kl=means["text"], nll=0, recall=0, recall_kl=recall_kl), kl=kl)

    torch.manual_seed(0)
    for _ in range(50):
        first = [torch.rand(n, dtype=torch.float64) for n in (9, 4, 5, 6)]
        second = [values + 0.3 * torch.rand(len(values), dtype=torch.float64) - 0.1 for values in first]
        differences = [b - a for a, b in zip(first, second, strict=True)]
        mean = differences[0].mean() + sum(d.mean() for d in differences[1:]) / 3
        error = (differences[0].var() / 9 + sum(d.var() / len(d) for d in differences[1:]) / 9).sqrt()
        worse = found(*(v.tolist() for v in second)).worse_than(found(*(v.tolist() for v in first)))
        assert worse == (mean > 2 * error)


def test_what_was_closed():
    first = CurvePoint(step=0, tokens=0, kl=1.0, nll=3.0, recall=0.2, recall_kl=1.0)
    last = CurvePoint(step=9, tokens=9, kl=0.1, nll=2.1, recall=0.9, recall_kl=0.1)
    found = heal.Healing(
        tokens=9, steps=9, trained_parameters=1, curve=[first, last], published=9, base_nll=2.0, base_recall=1.0
    )
    assert found.closed(last) == pytest.approx({"kl": 0.9, "nll": 0.9, "recall": 0.875})
    assert found.closed(first) == {"kl": 0.0, "nll": 0.0, "recall": 0.0}


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


def test_a_healing_replaces_healings_alone(tiny, tmp_path):
    hybrid, other = (convert.run(tiny, Plan(layers=LAYERS), out=tmp_path / name) for name in ("hybrid", "other"))
    before = digest(hybrid)
    for out, message in ((hybrid, "is what is read"), (tiny, "is what is read"), (other, "is no healed model")):
        with pytest.raises(UsageError, match=message):
            heal.run(hybrid, tiny, SETTINGS, out=out)
    assert digest(hybrid) == digest(other) == before


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
    ("written", "tokens"),
    [
        ("200k", 200_000),
        ("10M", 10_000_000),
        (5, 5),
        ("1_000", 1_000),
        ("0.5M", 500_000),
        ("1,500,000", 1_500_000),
        ("1,500.5k", 1_500_500),
    ],
)
def test_token_counts_as_people_write_them(written, tokens):
    assert heal.Config(tokens=written).tokens == tokens


@pytest.mark.parametrize("written", ["many", "10MB", "-5", 0, "nan", "k", "1,5M", "10,5k", "1,0000"])
def test_wrong_token_counts(written):
    with pytest.raises(ValueError, match="tokens"):
        heal.Config(tokens=written)
