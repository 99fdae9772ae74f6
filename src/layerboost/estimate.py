"""What a run will take, before it starts: rough time, memory and disk, from the model's configuration alone."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from layerboost import analyze, bench, evaluate, heal, plan
from layerboost.analyze import looking
from layerboost.cost.device import Device
from layerboost.cost.work import work_of
from layerboost.data.probes import PROBES
from layerboost.data.samples import probe_lengths, sequence_length
from layerboost.heal.losses import LOSSES
from layerboost.layer_plan import full_plan
from layerboost.model.config import empty_model
from layerboost.model.families import anatomy_of
from layerboost.model.loading import pick_device
from layerboost.pilot import brief
from layerboost.recipe import Recipe
from layerboost.scoring import CHUNK_ELEMENTS

_FLOAT32 = 4
# what small and middle-sized models reach of a plain matrix product's speed, forward and backward (docs/run.md)
_EFFICIENCY = 0.35
# of what a device reaches in cost/device.py, which is 60 % of its data sheet: training comes to 36 % of the sheet
_TRAINING = 0.6
_BYTES = {"int8": 1.0, "int4": 0.52}  # per weight, with its scales
_UNPACKED = 16  # per weight of a matrix in few bits while it is in use, torchao's intermediate steps included
_LOGITS = 6  # float32 arrays of this size that a loss on logits comes to: both models', and work on blocks of them


@dataclass(frozen=True)
class Estimate:
    """Of a whole run: seconds by verb; memory and disk in bytes."""

    parameters: int
    seconds: dict[str, float]
    memory_bytes: int
    disk_bytes: int


def estimate(config: PreTrainedConfig, recipe: Recipe, flops_per_second: float | None = None) -> Estimate:
    """Rough, and on the high side.

    Args:
        flops_per_second: of this machine; None leaves the times out.
    """
    parameters, embedding = count_parameters(config)
    layers, longest = config.num_hidden_layers, config.max_position_embeddings
    analyzed, healing = recipe.section(analyze.Config, "analyze"), recipe.section(heal.Config, "heal")
    windows = analyze.windows_of(analyzed, longest)
    tried = looking.all_windows(analyzed, windows)
    length, _ = heal.sequences(healing, longest, tried)  # if the plan has the widest, here and below
    healing = healing.model_copy(update={"length": length})
    evaluated, benched = recipe.section(evaluate.Config, "evaluate"), recipe.section(bench.Config, "bench")
    forward = 2 * (parameters - embedding + config.vocab_size * config.hidden_size)
    mixers = 1 + len(analyzed.mixers) + len(windows)
    suffixes = (layers + 1) / 2 * mixers + 6  # the cheap estimates take six passes
    looked_at = looking.tokens(analyzed, windows, longest)
    scored = (evaluated.texts + len(PROBES) * evaluated.answers) * evaluate.lengths(evaluated, longest, tried)[0]
    planned = recipe.section(plan.Config, "plan")
    searched = planned.planner in (None, "greedy")
    measuring = planned.measuring
    stretched, _ = probe_lengths(sequence_length(measuring, longest), measuring.distance, tried, longest)
    measured = (measuring.texts + len(PROBES) * measuring.answers) * stretched
    context = benched.context or min(longest, 1_024)
    work = {
        "analyze": forward * looked_at * (1 + suffixes),
        "plan": forward * measured * measuring.naive_passes * (1 + layers * mixers) * searched
        + planned.pilots * healing_flops(config, brief(healing, planned)),
        "convert": 0.0,
        "heal": healing_flops(config, healing),
        "evaluate": forward * scored * 3,
        "bench": forward * context * benched.batch * 2 * (benched.repeats + 1),
    }
    on_cpu = pick_device(recipe.device) == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    healed = healing_memory(config, healing, dtype=dtype)
    evaluating = 2 * parameters * dtype.itemsize  # the converted model has the original's weights
    stored = parameters * _stored(config)
    return Estimate(
        parameters=parameters,
        seconds={verb: flops / flops_per_second for verb, flops in work.items()} if flops_per_second else {},
        memory_bytes=round(max(evaluating, healing_on_cpu(config, healing) if on_cpu else healed.total)) + 2**30,
        # states, thrice: trained weights, the best of them, and two moments, where `trained` counts gradients
        disk_bytes=round(2 * stored + 3 * healed.trained + 2**22),
    )


@dataclass(frozen=True)
class HealingMemory:
    """What each device holds while a model is healed, in bytes.

    Attributes:
        frozen: the model's weights, teacher and student in one.
        trained: what is trained, in float32, with gradients and the optimiser's two moments.
        activations: of one pass, until its backward pass is done.
        logits: of the chunk of tokens whose loss is computed.
    """

    frozen: float
    trained: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.activations + self.logits


def healing_memory(
    config: PreTrainedConfig, settings: heal.Config, *, devices: int = 1, dtype: torch.dtype = torch.bfloat16
) -> HealingMemory:
    """Memory of healing, from the model's configuration alone, as if every layer were changed and trained.

    Args:
        settings: `micro_batch` sequences, or all that a device gets of a step, are in a pass.
        devices: processes that share the work, with a device each; only `shard` spreads weights over them.
        dtype: of the frozen weights; float32 on CPU.
    """
    shape, width = _Shape.of(config), dtype.itemsize
    linear = shape.linear * _BYTES.get(settings.quantize or "", width)
    inside = linear + (shape.inside - shape.linear) * width
    if settings.shard:  # the layer in use is whole, and so is the next
        inside = inside / devices + 2 * inside / config.num_hidden_layers
    if settings.quantize:
        inside += _UNPACKED * max(ins * outs for ins, outs in shape.sizes)
    full = settings.train == "full"
    trained = shape.inside if full else settings.rank * sum(map(sum, shape.sizes))
    copies = 4 + (devices > 1)  # weight, gradient, two moments; and all gradients in a row, to be added up
    stand_ins = trained * width if full and width < _FLOAT32 else 0
    tokens = (settings.length or heal.DEFAULT_LENGTH) * (settings.micro_batch or -(-settings.batch // devices))
    logits = CHUNK_ELEMENTS * (1 if dtype == torch.float32 else 2)  # on a GPU, losses work on whole chunks
    return HealingMemory(
        frozen=inside + (shape.parameters - shape.inside) * width,
        trained=trained * copies * _FLOAT32 + stand_ins,
        activations=tokens * _token_bytes(config, settings, shape, width),
        logits=_LOGITS * _FLOAT32 * min(logits, tokens * config.vocab_size),
    )


def healing_on_cpu(config: PreTrainedConfig, settings: heal.Config) -> float:
    """Bytes at the peak of all of heal on a CPU: of a pass, or of writing the result, when the result and what is read
    back of it stand beside the model."""
    found, shape = healing_memory(config, settings, dtype=torch.float32), _Shape.of(config)
    best = found.trained / 4  # of trained weights, gradients and two moments
    return best + max(found.total, found.frozen + found.trained + 2 * shape.parameters * _stored(config))


def _stored(config: PreTrainedConfig) -> int:
    """Bytes per weight on disk."""
    return (torch.float32 if config.dtype is None else config.dtype).itemsize


def _token_bytes(config: PreTrainedConfig, settings: heal.Config, shape: "_Shape", width: int) -> float:
    """Kept for the backward pass per token: adapters take inputs in float32, what follows a matrix keeps its output.

    Half of another output stands for attention, norms and activation functions (tests/test_estimate.py).
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    whole = sum(_FLOAT32 * ins + (width + 2) * outs for ins, outs in shape.sizes)
    inner = any(weight and LOSSES[name].needs == "layers" for name, weight in settings.losses.items())
    compared = layers * hidden * (width + _FLOAT32) if inner else 0  # the teacher's outputs, and the differences
    if settings.gradient_checkpointing:  # every layer's input, and the inside of the one that runs again
        return layers * hidden * width + whole / layers + compared
    return whole + compared


def healing_flops(config: PreTrainedConfig, settings: heal.Config) -> float:
    """Operations of a whole healing: the teacher's pass, the student's, and one back through frozen weights, which is
    gradients of inputs alone. Layers before the first change, which run once for both, are counted twice."""
    shape = _Shape.of(config)
    work = work_of(config, full_plan(config.num_hidden_layers), torch.bfloat16)
    pairs = (settings.length or heal.DEFAULT_LENGTH) / 2 * config.num_hidden_layers
    layers = work.token_flops + work.pair_flops * pairs
    passes = 3 + settings.gradient_checkpointing + (settings.train == "full")
    adapters = 0 if settings.train == "full" else 6 * settings.rank * sum(map(sum, shape.sizes))
    return settings.tokens * (passes * layers + 3 * work.head_flops + adapters)


def healing_seconds(config: PreTrainedConfig, settings: heal.Config, device: Device, devices: int = 1) -> float:
    """Of a whole healing, at 60 % of the device's rate; what devices tell one another is not counted."""
    return healing_flops(config, settings) / (_TRAINING * device.flops * devices)


@dataclass(frozen=True)
class _Shape:
    """Parameters: all, those inside the layers, those of linear modules there; and the modules' `(in, out)` sizes."""

    parameters: int
    inside: int
    linear: int
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "_Shape":
        model = empty_model(config)
        layers = getattr(model.base_model, anatomy_of(model.base_model).layers)
        sizes = tuple((m.in_features, m.out_features) for m in layers.modules() if isinstance(m, nn.Linear))
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            inside=sum(p.numel() for p in layers.parameters()),
            linear=sum(ins * outs for ins, outs in sizes),
            sizes=sizes,
        )


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """All parameters, and those of the input embedding; nothing is loaded."""
    model = empty_model(config)
    return sum(p.numel() for p in model.parameters()), model.get_input_embeddings().weight.numel()


def measure_speed(device: str, hidden_size: int) -> float:
    """Floating-point operations per second that a model of this width should reach on this machine, now."""
    size = max(128, min(hidden_size, 2_048))
    a, b = torch.rand(2_048, size, device=device), torch.rand(size, size, device=device)
    for _ in range(3):
        a @ b
    started, repeats = time.perf_counter(), 0
    while time.perf_counter() - started < 0.3:
        (a @ b).sum().item()
        repeats += 1
    return _EFFICIENCY * repeats * 2 * 2_048 * size * size / (time.perf_counter() - started)
