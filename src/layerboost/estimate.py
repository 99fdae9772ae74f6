"""What a run will take, before it starts: rough time, memory and disk, from the model's configuration alone."""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from layerboost import analyze, bench, evaluate, heal, plan
from layerboost.model.config import family_of, stock_class
from layerboost.model.loading import pick_device
from layerboost.recipe import Recipe

_FLOAT32 = 4
# what small and middle-sized models reach of a plain matrix product's speed, forward and backward (docs/run.md)
_EFFICIENCY = 0.35


@dataclass(frozen=True)
class Estimate:
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
    layers = config.num_hidden_layers
    analyzed, healing = recipe.section(analyze.Config, "analyze"), recipe.section(heal.Config, "heal")
    evaluated, benched = recipe.section(evaluate.Config, "evaluate"), recipe.section(bench.Config, "bench")
    forward = 2 * (parameters - embedding + config.vocab_size * config.hidden_size)
    mixers = 1 + len(analyzed.mixers) + (2 if analyzed.windows is None else len(analyzed.windows))
    suffixes = (layers + 1) / 2 * mixers + 6  # the cheap estimates take six passes
    looked_at = (analyzed.texts + 3 * analyzed.answers) * analyzed.length
    scored = (evaluated.texts + 3 * evaluated.answers) * evaluated.length
    planned = recipe.section(plan.Config, "plan")
    searched = planned.planner in (None, "greedy")
    measured = (planned.measuring.texts + 3 * planned.measuring.answers) * planned.measuring.length
    context = benched.context or min(config.max_position_embeddings, 1_024)
    work = {
        "analyze": forward * looked_at * (1 + suffixes),
        "plan": forward * measured * planned.measuring.naive_passes * (1 + layers * mixers) if searched else 0.0,
        "convert": 0.0,
        "heal": forward * healing.tokens * 4.0,  # teacher, student, and a backward pass through frozen weights
        "evaluate": forward * scored * 3,
        "bench": forward * context * benched.batch * 2 * (benched.repeats + 1),
    }
    adapter = healing.rank * layers * 7 * (config.hidden_size + config.intermediate_size)
    on_cpu = pick_device(recipe.device) == "cpu"
    weights = parameters * (_FLOAT32 if on_cpu else 2)
    activations = healing.batch * healing.length * config.hidden_size * layers * 20 * _FLOAT32
    stored = parameters * (torch.float32 if config.dtype is None else config.dtype).itemsize
    return Estimate(
        parameters=parameters,
        seconds={verb: flops / flops_per_second for verb, flops in work.items()} if flops_per_second else {},
        memory_bytes=max(3 * weights, weights + 4 * adapter * _FLOAT32 + activations) + 2**30,
        disk_bytes=2 * stored + 3 * 3 * adapter * _FLOAT32 + 2**22,
    )


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """All parameters, and those of the input embedding; nothing is loaded."""
    with torch.device("meta"):
        model = stock_class(family_of(config))(config)
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
