"""Estimates of healing against what models really hold and compute; those of whole runs are in test_pipeline."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from layerboost import heal
from layerboost.cost.device import known_device
from layerboost.estimate import estimate, healing_flops, healing_memory, healing_seconds
from layerboost.heal.student import Counts, Healer
from layerboost.model.loading import find_model, load_original, read_config
from layerboost.recipe import load_recipe
from tests.conftest import FAMILIES
from tests.test_heal import scored
from tests.tiny import make_checkpoint, some_tokens, window

REFERENCE = find_model("reference")
BATCH, LENGTH = 2, 64
SETTINGS = {"tokens": BATCH * LENGTH, "length": LENGTH, "batch": BATCH, "rank": 4, "targets": ["changed"]}
SIZES = {"hidden_size": 128, "intermediate_size": 448, "head_dim": 32, "num_key_value_heads": 1, "vocab_size": 512}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("estimate") / "base", "llama", **SIZES)


def make_healer(folder, dtype=torch.float32, **changes):
    model = load_original(folder).to(dtype)
    return Healer(model, [window(16)] * 4, heal.Config(**SETTINGS | changes))


def memory(folder, *, dtype=torch.float32, devices=1, **changes):
    return healing_memory(read_config(folder), heal.Config(**SETTINGS | changes), dtype=dtype, devices=devices)


def bytes_of(parameters):
    return sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted(checkpoints, family):
    """Frozen ones to the byte, and what is trained with its gradients and two moments."""
    native = family in ("gemma2", "gemma3_text", "cohere2")  # whose own windows are narrower than ours
    for train in ("lora", "full"):
        layers = [window(4 if native else 16)] * 4
        healer = Healer(load_original(checkpoints[family]), layers, heal.Config(**SETTINGS | {"train": train}))
        found = memory(checkpoints[family], train=train)
        assert found.trained == 4 * bytes_of(healer.parameters.values())
        frozen = {id(p): p for p in healer.model.parameters() if not p.requires_grad}
        assert found.frozen == bytes_of(frozen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("losses", [{"forward_kl": 1.0}, {"forward_kl": 1.0, "hidden": 5.0}], ids=len)
def test_activations_are_near_what_is_kept_for_the_backward_pass(llama, dtype, losses):
    healer = make_healer(llama, dtype, losses=losses)
    own = {p.untyped_storage().data_ptr() for p in healer.model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = scored(some_tokens(BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        healer.backward(batch, Counts.of(batch))
    held = sum(size for size, _ in kept.values())
    found = memory(llama, dtype=dtype, losses=losses).activations
    assert found == pytest.approx(held, rel=0.3)


class Operations(TorchDispatchMode):
    """Floating-point operations; FlopCounterMode follows modules too, which gradients inside a forward pass confuse."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"train": "full"}], ids=str)
def test_operations_are_near_what_is_computed(llama, changes):
    healer = make_healer(llama, **changes)
    batch = scored(some_tokens(BATCH, LENGTH))
    with Operations() as counted:
        healer.backward(batch, Counts.of(batch))
    config = heal.Config(**SETTINGS | changes)
    assert healing_flops(read_config(llama), config) == pytest.approx(counted.total, rel=0.1)


def test_what_saves_memory(llama):
    plain, saving = memory(llama), memory(llama, gradient_checkpointing=True)
    assert saving.activations < 0.5 * plain.activations
    assert saving.frozen == plain.frozen
    sizes = [memory(llama, quantize=bits).frozen - 16 * 128 * 448 for bits in ("int4", "int8")]
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.7 * plain.frozen
    one, eight = memory(llama, devices=8), memory(llama, devices=8, shard=True)
    assert one.frozen == plain.frozen
    assert eight.frozen < one.frozen
    assert one.activations == plain.activations / 2  # one of the two sequences
    assert memory(llama, micro_batch=1).activations == plain.activations / 2
    assert memory(llama, length=128).activations == 2 * plain.activations


def test_time_is_shared_by_devices(llama):
    config, settings, device = read_config(llama), heal.Config(**SETTINGS), known_device("h100")
    alone = healing_seconds(config, settings, device)
    assert alone == pytest.approx(healing_flops(config, settings) / (0.36 * 989e12))
    assert healing_seconds(config, settings, device, 8) == pytest.approx(alone / 8)


def test_times_are_of_sequences_as_long_as_windows_make_them():
    """Windows of 64 and 512 in a context of 8,192: probes get 2,048 tokens long."""
    config = read_config(REFERENCE)
    config.max_position_embeddings = 8_192
    by_default, written, short = (
        estimate(config, load_recipe("default", ["device=cpu", *words]), 1.0).seconds
        for words in (
            [], [f"{verb}.length=2048" for verb in ("analyze", "plan.measuring", "evaluate")], ["analyze.windows=[64]"]
        )
    )  # fmt: skip
    for verb in ("analyze", "plan", "evaluate"):
        assert by_default[verb] == written[verb] > 3 * short[verb]
    more = estimate(config, load_recipe("default", ["device=cpu", "analyze.long_answers=1000"]), 1.0).seconds
    assert more["analyze"] > 2 * by_default["analyze"]


def test_a_run_holds_two_models_or_a_healing(llama):
    """Evaluation compares two models, the converted one has the original's weights; healing writes and reads back."""
    config, weights = read_config(llama), bytes_of(load_original(llama).parameters())
    light = estimate(config, load_recipe("default", ["device=cpu", "heal.length=64", "heal.batch=1", "heal.rank=1"]))
    heavy = estimate(config, load_recipe("default", ["device=cpu", "heal.length=128", "heal.batch=64"]))
    settings = heal.Config(length=128, batch=64)
    assert light.memory_bytes >= 3 * weights + 2**30  # what was healed, beside the model, is read back
    found = healing_memory(config, settings, dtype=torch.float32)
    best = found.trained / 4  # without gradients and the optimiser's two moments
    assert heavy.memory_bytes == round(found.total + best) + 2**30
    assert light.seconds == {}
