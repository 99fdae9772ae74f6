"""bench: how fast, and how much cache, against the original: on plain transformers, or on vLLM under load."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from layerboost.artifacts import Bench, Ratio, Record, save, text_digest
from layerboost.bench import transformers_engine, vllm_engine
from layerboost.bench.vllm_engine import Serving
from layerboost.errors import DataError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import check_plan, family_of, hybrid_config, stock_class
from layerboost.model.hybrid import model_class
from layerboost.model.loading import (
    check_pair,
    digest,
    find_model,
    is_hybrid,
    load_model,
    pick_device,
    plan_of,
    read_config,
)
from layerboost.model.shapes import Shape
from layerboost.progress import say
from layerboost.provenance import provenance

_TRANSFORMERS_ALONE = {"context", "new_tokens", "batch", "device"}


class Config(Record):
    """What `bench` is told.

    Attributes:
        engine: `transformers` times prefill and decode; `vllm` serves both models under load.
        context: tokens of a whole sequence; None is the model's context, at most 1,024.
        new_tokens: how many of them are decoded, the rest is the prompt.
        batch: sequences at once.
        repeats: measurements of each model, one after the other in turn, after one that does not count.
        serving: the loads, for vLLM.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    context: int | None = Field(None, ge=8)
    new_tokens: int = Field(64, ge=1)
    batch: int = Field(8, ge=1)
    repeats: int = Field(5, ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    serving: Serving = Serving()


@dataclass(frozen=True)
class Pair:
    """What is compared: two checkpoints, or two configurations whose weights are made up."""

    name: str
    base: Path
    hybrid: Path
    layers: list[LayerPlan]
    random_weights: bool
    digests: dict[str, str]


def inputs(hybrid: Path, against: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out, but for the machine."""
    return {
        "hybrid": digest(hybrid),
        "model": digest(against),
        "settings": text_digest(config.model_dump(mode="json", exclude={"device"})),
    }


def run(hybrid: str | Path, against: str | Path, config: Config | None = None, *, out: Path | None = None) -> Bench:
    """Measure a hybrid against its original.

    Raises:
        CheckpointError: a model cannot be read, is not as it was written, or the two do not belong together.
        DataError: a length does not fit the model.
        EnvironmentTrouble: vLLM is asked for and not installed, or does not start.
        PlanError: vLLM is asked for and cannot run the plan.
    """
    config = config or Config()
    hybrid_folder, folder = find_model(hybrid), find_model(against)
    hybrid_config_, base_config = read_config(hybrid_folder), read_config(folder)
    layers = plan_of(hybrid_config_, hybrid_folder)
    check_pair(hybrid_folder, hybrid_config_, folder, base_config)
    pair = Pair(
        hybrid_folder.resolve().name, folder, hybrid_folder, layers, False, inputs(hybrid_folder, folder, config)
    )
    return _measure(pair, base_config, config, out)


def run_shape(shape: Shape, config: Config | None = None, *, out: Path | None = None) -> Bench:
    """Measure a plan on a well-known shape with random weights; throughput does not depend on their values.

    Raises:
        UsageError, PlanError: the shape or the plan is not one.
        As `run` otherwise.
    """
    config = config or Config()
    base = shape.config()
    layers = shape.layer_plan(base.num_hidden_layers)
    check_plan(layers, base)
    with _configurations(base, layers) as (base_folder, hybrid_folder):
        settings = {"shape": shape.model_dump(mode="json"), "bench": config.model_dump(mode="json")}
        pair = Pair(shape.label, base_folder, hybrid_folder, layers, True, {"settings": text_digest(settings)})
        return _measure(pair, base, config, out)


@contextlib.contextmanager
def _configurations(base: PreTrainedConfig, layers: list[LayerPlan]) -> Iterator[tuple[Path, Path]]:
    """Two folders with nothing but a config.json."""
    hybrid = hybrid_config(base, layers)
    base.architectures = [stock_class(family_of(base)).__name__]
    hybrid.architectures = [model_class(family_of(base)).__name__]
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch) / "base", Path(scratch) / "hybrid"
        for folder, config in zip(folders, (base, hybrid), strict=True):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config.to_dict()))
        yield folders


def _measure(pair: Pair, base_config: PreTrainedConfig, config: Config, out: Path | None) -> Bench:
    unused = (_TRANSFORMERS_ALONE if config.engine == "vllm" else {"serving"}) & config.model_fields_set
    if unused:
        say(f"engine {config.engine} does not look at {', '.join(sorted(unused))}")
    on_engine = _on_vllm if config.engine == "vllm" else _on_transformers
    bench = on_engine(pair, base_config, config)
    if out is not None:
        save(bench, out)
    return bench


def _on_transformers(pair: Pair, base_config: PreTrainedConfig, config: Config) -> Bench:
    context = context_of(config, base_config.max_position_embeddings)
    device = pick_device(config.device)
    models = {"base": _model(pair, pair.base, device), "healed": _model(pair, pair.hybrid, device)}
    seconds = transformers_engine.measure(
        models, context - config.new_tokens, config.new_tokens, config.batch, config.repeats
    )
    peak = {name: transformers_engine.peak_bytes(model, context, config.batch) for name, model in models.items()}
    return Bench(
        settings={
            "model": pair.name, "engine": "transformers", "batch": config.batch,
            "prompt_tokens": context - config.new_tokens, "new_tokens": config.new_tokens, "repeats": config.repeats,
            "device": device, "dtype": str(models["base"].dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "peak_bytes": peak,
        },
        seconds=seconds,
        speed={
            phase: Ratio.of_times(seconds["base"][phase], seconds["healed"][phase]) for phase in ("prefill", "decode")
        },
        context=context,
        kv_bytes_per_token={name: transformers_engine.kv_bytes(m, context) / context for name, m in models.items()},
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        inputs=pair.digests,
        provenance=provenance(config),
    )  # fmt: skip


def _model(pair: Pair, folder: Path, device: str) -> Any:
    dtype = torch.float32 if device == "cpu" else None
    if not pair.random_weights:
        return load_model(folder, dtype=dtype, device=device)
    config = read_config(folder)
    with torch.device(device):
        return _class_of(config)._from_config(config, dtype=dtype or torch.bfloat16).eval()


def _on_vllm(pair: Pair, base_config: PreTrainedConfig, config: Config) -> Bench:
    cells, facts = vllm_engine.measure(
        {"base": pair.base, "healed": pair.hybrid}, base_config, pair.layers, config.serving,
        repeats=config.repeats, random_weights=pair.random_weights,
    )  # fmt: skip
    phases = {vllm_engine.label(cell): cell for cell in cells}
    first = cells[0]
    return Bench(
        settings={
            "model": pair.name, "engine": "vllm", "repeats": config.repeats,
            "plan": [layer.entry() for layer in pair.layers], "base_config": base_config.to_diff_dict(),
            "serving": config.serving.model_dump(mode="json"), **facts,
        },
        seconds={
            name: {phase: [served.seconds for served in cell.runs[name]] for phase, cell in phases.items()}
            for name in ("base", "healed")
        },
        speed={phase: cell.throughput for phase, cell in phases.items()},
        context=first.load.prompt_tokens + first.load.output_tokens,
        kv_bytes_per_token=first.kv_bytes_per_token,
        parameters=_parameters(pair),
        serving=cells,
        inputs=pair.digests,
        provenance=provenance(config),
    )  # fmt: skip


def _parameters(pair: Pair) -> dict[str, int]:
    counts = {}
    for name, folder in (("base", pair.base), ("healed", pair.hybrid)):
        config = read_config(folder)
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in _class_of(config)(config).parameters())
    return counts


def _class_of(config: PreTrainedConfig) -> Any:
    return (model_class if is_hybrid(config) else stock_class)(family_of(config))


def check(config: Config, longest: int) -> None:
    """Raises DataError for lengths that do not fit a model's context."""
    if config.engine == "vllm":
        vllm_engine.longest_of(config.serving, longest)
    else:
        context_of(config, longest)


def context_of(config: Config, longest: int) -> int:
    """Tokens of a whole sequence on transformers, for a model's context; raises DataError where it does not fit."""
    context = config.context or min(longest, 1_024)
    if context > longest or config.new_tokens >= context:
        raise DataError(
            f"context {context} with {config.new_tokens} new tokens does not fit a model of {longest} tokens; choose "
            "context <= the model's and new_tokens < context"
        )
    return context
