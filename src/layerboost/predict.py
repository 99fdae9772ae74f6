"""predict: what a plan will give under load on a device; and how well that was foretold where it was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from layerboost import cost
from layerboost.artifacts import (
    Bench,
    Load,
    Record,
    ServingCell,
    WholeBytes,
    check_output_file,
    load,
    to_json,
    write_text,
)
from layerboost.cost.device import Device, find_device
from layerboost.cost.work import Work, work_of
from layerboost.errors import UsageError
from layerboost.layer_plan import LayerPlan, full_plan, parse_layers
from layerboost.model.config import base_config_class, check_plan, native_windows
from layerboost.model.loading import find_config, is_hybrid, plan_of
from layerboost.model.mixers import HeadShape
from layerboost.model.shapes import Shape, named_plan
from layerboost.progress import say
from layerboost.vllm.kv import KVLayout, good_block_size, kv_layout

_MOST_FITTED = 4


class Config(Record):
    """What `predict` is told.

    Attributes:
        concurrency: requests at once.
        prompt_tokens, output_tokens: of every request.
        rounds: requests per place.
        kv_memory: bytes for keys and values over all devices; None is what the weights leave of 90 % of the memory.
        dtype: of weights and cache.
        block_size: tokens per block of the cache; None is vLLM's, or less for narrow windows.
        max_batched_tokens: most tokens of one step.
    """

    concurrency: int = Field(200, ge=1)
    prompt_tokens: int = Field(1_024, ge=1)
    output_tokens: int = Field(256, ge=1)
    rounds: int = Field(1, ge=1)
    kv_memory: WholeBytes | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    block_size: int | None = Field(None, ge=1)
    max_batched_tokens: int = Field(8_192, ge=1)


@dataclass(frozen=True)
class Outlook:
    model: str
    layers: list[LayerPlan]
    device: Device
    load: Load
    kv_memory: dict[str, int]
    base: cost.Prediction
    hybrid: cost.Prediction


def run(
    model: str | Path, config: Config | None = None, *, plan: str | None = None, window: int | None = None,
    device: str = "h100", devices: int = 1,
) -> Outlook:  # fmt: skip
    """Estimate a hybrid, or an original under a plan; nothing but its configuration is read.

    Args:
        plan: plan file, or shares in percent.

    Raises:
        CheckpointError, PlanError, UsageError, DataError: as they say.
    """
    found = find_config(model)
    if plan is None and not is_hybrid(found):
        raise UsageError(f"{model} is no hybrid: name a plan for it, a file or shares such as --plan 25/50/25")
    if plan is None:
        layers = plan_of(found, Path(model))
    elif is_hybrid(found):
        raise UsageError(f"{model} is a hybrid and has a plan; leave --plan out, or name its original")
    else:
        layers = named_plan(plan, found.num_hidden_layers, window)
    return outlook(str(model), found, layers, config or Config(), find_device(device).times(devices))


def run_shape(shape: Shape, config: Config | None = None, *, device: str = "h100", devices: int = 1) -> Outlook:
    """Estimate a plan on a well-known shape."""
    found = shape.config()
    layers = shape.layer_plan(found.num_hidden_layers)
    return outlook(shape.label, found, layers, config or Config(), find_device(device).times(devices))


def outlook(name: str, model: PreTrainedConfig, layers: list[LayerPlan], config: Config, device: Device) -> Outlook:
    check_plan(layers, model)
    dtype = getattr(torch, config.dtype)
    block = config.block_size or good_block_size(layers, on_cpu=device.name.startswith("cpu"))
    asked = Load(
        concurrency=config.concurrency, prompt_tokens=config.prompt_tokens, output_tokens=config.output_tokens,
        requests=config.concurrency * config.rounds,
    )  # fmt: skip
    if (tokens := asked.prompt_tokens + asked.output_tokens) > model.max_position_embeddings:
        say(
            f"requests of {tokens:,} tokens are longer than the {model.max_position_embeddings:,} that the model was "
            "made for, and engines refuse them"
        )
    found: dict[str, cost.Prediction] = {}
    memory: dict[str, int] = {}
    for which, plan in (("base", full_plan(len(layers))), ("hybrid", layers)):
        work, layout = _counted(model, plan, dtype, block)
        memory[which] = config.kv_memory or cost.cache_memory(work, device)
        found[which] = cost.predict(work, layout, memory[which], asked, device, config.max_batched_tokens)
    return Outlook(name, layers, device, asked, memory, found["base"], found["hybrid"])


def _counted(
    model: PreTrainedConfig, layers: list[LayerPlan], dtype: torch.dtype, block_size: int
) -> tuple[Work, KVLayout]:
    work = work_of(model, layers, dtype)
    return work, kv_layout(layers, native_windows(model), int(work.kv_bytes), block_size)


@dataclass(frozen=True)
class Row:
    """A measured load beside what the calibrated device says of it; rates in output tokens per second."""

    name: str
    fitted: bool
    base: float
    hybrid: float
    predicted_base: float
    predicted_hybrid: float
    shares: dict[str, float]  # of the base's predicted time

    @property
    def ratio(self) -> float:
        return self.hybrid / self.base

    @property
    def predicted_ratio(self) -> float:
        return self.predicted_hybrid / self.predicted_base

    @property
    def ratio_error(self) -> float:
        return self.predicted_ratio / self.ratio - 1

    @property
    def base_error(self) -> float:
        return self.predicted_base / self.base - 1


def calibrate_on(benches: Sequence[Path], cells: str | None, clock: str, *, out: Path) -> list[Row]:
    """Fit a device to at most four measured loads, write it, and set every load's prediction beside its measurement.

    Args:
        cells: numbers of the loads to fit, counted over all files; None spreads four over them.
        clock: `seconds` or `cpu_seconds`.

    Raises:
        UsageError: files that are not benches of vLLM, or numbers that are not theirs; something else than a device
            stands in the place.
    """
    if clock not in ("seconds", "cpu_seconds"):
        raise UsageError(f"clock must be seconds or cpu_seconds, found {clock!r}")
    check_output_file(out, Device)
    here = find_device("here")
    measured = [
        (f"{path.stem}: {_cell_name(cell)}", cell, _both(bench, cell, clock))
        for path, bench in ((path, _bench(path, here)) for path in benches)
        for cell in bench.serving
    ]
    chosen = _chosen(cells, len(measured))
    device = cost.calibrate([one for n in chosen for one in measured[n][2]], here)
    write_text(out, to_json(device))
    rows = []
    for number, (name, cell, (base, hybrid)) in enumerate(measured):
        tokens = cell.load.requests * cell.load.output_tokens
        rows.append(
            Row(
                name=name, fitted=number in chosen, base=tokens / base.seconds, hybrid=tokens / hybrid.seconds,
                predicted_base=tokens / base.predicted(device), predicted_hybrid=tokens / hybrid.predicted(device),
                shares=base.shares(device),
            )
        )  # fmt: skip
    return rows


def summary(rows: list[Row]) -> str:
    """Median and largest error over the loads that were not fitted."""
    others = [row for row in rows if not row.fitted]
    if not others:
        return "every load was fitted: nothing is left to check the prediction on"
    ratios, rates = ([abs(getattr(row, key)) for row in others] for key in ("ratio_error", "base_error"))
    return (
        f"{len(others)} loads that were not fitted: error of the ratio {median(ratios):.1%} in the median, at most "
        f"{max(ratios):.1%}; of the base's tokens per second {median(rates):.1%}, at most {max(rates):.1%}"
    )


def _bench(path: Path, here: Device) -> Bench:
    bench = load(Bench, path, UsageError)
    if not bench.serving:
        raise UsageError(f"{path} is not a bench of vLLM; run bench with --engine vllm")
    if (bench.settings["device"] == "cpu") != here.name.startswith("cpu"):
        raise UsageError(
            f"{path} was measured on {bench.settings['device']}, and the device here is {here.name}, whose memory the "
            "file would give; calibrate on the machine that was measured"
        )
    return bench


def _chosen(cells: str | None, count: int) -> set[int]:
    if cells is None:
        return {round(n * (count - 1) / (_MOST_FITTED - 1)) for n in range(_MOST_FITTED)}
    try:
        chosen = {int(number) for number in cells.split(",")}
    except ValueError:
        raise UsageError(f"cells must be numbers such as 0,5,9, found {cells!r}") from None
    if len(chosen) > _MOST_FITTED or not chosen <= set(range(count)):
        raise UsageError(f"cells must be at most {_MOST_FITTED} numbers from 0 to {count - 1}, found {cells}")
    return chosen


def _cell_name(cell: ServingCell) -> str:
    return f"KV {cell.kv}, {cell.load.concurrency} at once, {cell.load.prompt_tokens}+{cell.load.output_tokens}"


def _both(bench: Bench, cell: ServingCell, clock: str) -> tuple[cost.Measured, cost.Measured]:
    settings: dict[str, Any] = bench.settings
    raw = dict(settings["base_config"])
    model = base_config_class(raw.pop("model_type"))(**raw)
    layers = parse_layers(settings["plan"], "bench")
    devices = min(settings["serving"]["tensor_parallel"], HeadShape.of(model).groups)  # that keys are spread over
    found = []
    for name, plan in (("base", full_plan(len(layers))), ("healed", layers)):
        work, layout = _counted(model, plan, getattr(torch, settings["dtype"]), settings["block_size"])
        steps = cost.schedule(
            layout, devices * cell.kv_memory // layout.block_bytes, cell.load, settings["max_num_batched_tokens"]
        )
        found.append(cost.Measured(name, work, cost.Counts.of(work, steps), cell.median(name, clock)))
    return found[0], found[1]
