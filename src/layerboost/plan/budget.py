"""What a plan must meet, in the user's own words, and what it costs against that."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerboost import cost
from layerboost.artifacts import Load, ModelRecord
from layerboost.cost.device import Device, find_device
from layerboost.cost.work import Workload
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan, full_plan
from layerboost.vllm import check_servable
from layerboost.vllm.kv import GPU_BLOCK, KVLayout, good_block_size, grouped, kv_layout, layers_by_window, padded_bytes

if TYPE_CHECKING:
    from layerboost.plan import Config

_ROUNDING = 1e-9


class Budget:
    """Limits on KV cache, throughput and make-up of a plan.

    Args:
        model_config: of the base model, as transformers has it; only a throughput budget needs it.

    Attributes:
        fastest: of all plans asked about so far that meet every other limit, the most throughput over the base's.

    Raises:
        PlanError: a throughput budget without a model, or more layers or context asked for than there are.
    """

    def __init__(self, model: ModelRecord, config: "Config", model_config: Any = None) -> None:
        self.model, self.config = model, config
        self.context = config.context or model.usual_context
        if self.context > model.context:
            raise PlanError(
                f"context {self.context} is more than the {model.context} tokens that the model was made for; choose a "
                "shorter one"
            )
        self.on_vllm = config.engine == "vllm" or config.throughput is not None
        self.at_least: dict[str, int] = config.at_least.model_dump()
        self.most_full = config.full_layers
        self.throughput = config.throughput
        if self.throughput is not None and model_config is None:
            raise PlanError("a throughput budget counts the model's work; name the model with --model")
        self.model_config = model_config
        if sum(self.at_least.values()) > model.num_layers:
            raise PlanError(f"at_least asks for {sum(self.at_least.values())} layers, the model has {model.num_layers}")
        self.fastest: float | None = None
        self._speeds: dict[Any, float] = {}
        self._base_rates: dict[int, float] = {}

    @cached_property
    def base_bytes(self) -> int:
        return self.kv_bytes(full_plan(self.model.num_layers))

    @cached_property
    def kv_limit(self) -> float | None:
        """Most share of the base model's KV bytes; None is no limit."""
        config = self.config
        limits = []
        if config.kv_reduction is not None:
            limits.append(1 - config.kv_reduction)
        if config.kv_bytes is not None:
            limits.append(config.kv_bytes * self.context / max(self.base_bytes, 1))
        return min(limits, default=None)

    @property
    def saves(self) -> bool:
        """Whether the smallest cache is asked for, within `max_loss`, and not the least loss."""
        return self.config.max_loss is not None and self.kv_limit is None and self.throughput is None

    def kv_bytes(self, layers: list[LayerPlan]) -> int:
        """Cache of one sequence of `context` tokens: what it holds, or on vLLM with blocks and padded groups."""
        if not self.on_vllm:
            return self.model.kv_bytes(layers, self.context)
        kinds = layers_by_window(layers, self.model.native_windows)
        return int(self.made_up_bytes(np.array([list(kinds.values())]), list(kinds))[0]) if kinds else 0

    def layout(self, kinds: Mapping[int | None, int]) -> KVLayout:
        """vLLM's cache of so many layers of each window."""
        present = {window: count for window, count in kinds.items() if count}
        return grouped(present, self.model.kv_shape.bytes_per_token, self.config.block_size or GPU_BLOCK)

    def made_up_bytes(self, counts: np.ndarray, windows: list[int | None]) -> np.ndarray:
        """On vLLM, of plans with so many layers `[M, K]` of each window."""
        block = self.config.block_size or GPU_BLOCK
        return padded_bytes(counts, windows, self.model.kv_shape.bytes_per_token, block, self.context + 1)

    def kv_share(self, layers: list[LayerPlan]) -> float:
        return self.kv_bytes(layers) / max(self.base_bytes, 1)

    def speedup(self, layers: list[LayerPlan]) -> float:
        """Output tokens per second over the base's, under the load on the device, as `predict` foretells them."""
        make_up = tuple(sorted(layers_by_window(layers, self.model.native_windows).items(), key=str))
        if make_up not in self._speeds:
            block = self.config.block_size or good_block_size(layers, on_cpu=self._device.name.startswith("cpu"))
            if block not in self._base_rates:
                self._base_rates[block] = self._rate(full_plan(self.model.num_layers), block)
            self._speeds[make_up] = self._rate(layers, block) / self._base_rates[block]
        return self._speeds[make_up]

    @cached_property
    def _device(self) -> Device:
        return find_device(self.config.device_profile)

    @cached_property
    def _workload(self) -> Workload:
        return Workload(self.model_config, torch.bfloat16)

    def _rate(self, layers: list[LayerPlan], block: int) -> float:
        config, work = self.config, self._workload.under(layers)
        load = Load(
            concurrency=config.concurrency, prompt_tokens=config.prompt_tokens, output_tokens=config.output_tokens,
            requests=config.concurrency,
        )  # fmt: skip
        layout = kv_layout(layers, self.model.native_windows, int(work.kv_bytes), block)
        memory = config.kv_memory or cost.cache_memory(work, self._device)
        return cost.predict(work, layout, memory, load, self._device, max_batched_tokens=8_192).tokens_per_second

    def excess(self, layers: list[LayerPlan]) -> float:
        """How far a plan is from meeting the limits; 0 where it meets them all, infinite where vLLM cannot run it."""
        if self.on_vllm and not _servable(layers):
            return math.inf
        count = self.model.num_layers
        missing = [
            max(0, fewest - sum(plan.mixer == mixer for plan in layers)) / count
            for mixer, fewest in self.at_least.items()
        ]
        total = sum(missing)
        if self.kv_limit is not None:
            total += max(0.0, self.kv_share(layers) - self.kv_limit)
        if self.most_full is not None:
            total += max(0, sum(plan.mixer == "full_attention" for plan in layers) - self.most_full) / count
        if self.throughput is not None:
            speedup = self.speedup(layers)
            if total <= _ROUNDING:
                self.fastest = max(speedup, self.fastest or 0.0)
            total += max(0.0, self.throughput - speedup)
        return total

    def met(self, layers: list[LayerPlan]) -> bool:
        return self.excess(layers) <= _ROUNDING

    def unmet(self) -> str:
        """That no plan meets it, and how near one came."""
        near = "" if self.fastest is None else f": the fastest plan that meets the rest gives {self.fastest:.2f} times"
        return (
            f"{self.describe()} cannot be met with the candidates that were measured{near}; ask for less, measure "
            "narrower windows, or lower at_least"
        )

    def describe(self) -> str:
        config = self.config
        limits = {
            "kv_reduction": config.kv_reduction, "kv_bytes": config.kv_bytes, "full_layers": config.full_layers,
            "throughput": config.throughput, "max_loss": config.max_loss,
        }  # fmt: skip
        found = [f"{name} {limit}" for name, limit in limits.items() if limit is not None]
        found += [f"at_least.{mixer} {fewest}" for mixer, fewest in self.at_least.items() if fewest]
        return ", ".join(found)


def _servable(layers: list[LayerPlan]) -> bool:
    try:
        check_servable(layers)
    except PlanError:
        return False
    return True
