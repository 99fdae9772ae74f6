"""What one token costs under a plan, counted from the configuration."""

from dataclasses import dataclass
from typing import Any

import torch

from layerboost.layer_plan import LayerPlan
from layerboost.model.config import empty_model, native_windows
from layerboost.model.families import anatomy_of
from layerboost.model.mixers import HeadShape
from layerboost.vllm.kv import layers_by_window


@dataclass(frozen=True)
class Work:
    """One model under one plan.

    Attributes:
        token_flops: of all layers' weights, per token; of experts only those that a token goes through.
        head_flops: of the head, per sampled token.
        weight_bytes: read in every step.
        attentions: number of layers by window; None looks at everything.
        pair_flops: of one query and one key, all heads, in one layer.
        kv_bytes: keys and values of one token in one layer.
    """

    token_flops: float
    head_flops: float
    weight_bytes: float
    attentions: dict[int | None, int]
    pair_flops: float
    kv_bytes: float


class Workload:
    """Counts a model's work once, and then that of any plan of it.

    Args:
        config: of the base model.
        dtype: of weights and cache.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        model = empty_model(config)
        anatomy = anatomy_of(model.base_model)
        removed = (anatomy.attention, *anatomy.norms)
        self.config, self.dtype = config, dtype
        self.native_windows = native_windows(config)
        self.shape = HeadShape.of(config)
        # per layer: all weights and those that a token meets, of what stays without attention and of the attention
        self.layers = [
            [_weights(config, layer, removed, inside) for inside in (False, True)]
            for layer in getattr(model.base_model, anatomy.layers)
        ]

    def under(self, layers: list[LayerPlan]) -> Work:
        weights, active = 0, 0.0
        for (rest, attention), plan in zip(self.layers, layers, strict=True):
            kept = (rest,) if plan.mixer == "no_attention" else (rest, attention)
            weights += sum(found[0] for found in kept)
            active += sum(found[1] for found in kept)
        head = self.config.vocab_size * self.config.hidden_size
        return Work(
            token_flops=2 * active,
            head_flops=2 * head,
            weight_bytes=(weights + head) * self.dtype.itemsize,
            attentions=dict(layers_by_window(layers, self.native_windows)),
            pair_flops=4 * self.shape.heads * self.shape.head_dim,
            kv_bytes=2 * self.shape.groups * self.shape.head_dim * self.dtype.itemsize,
        )


def work_of(config: Any, layers: list[LayerPlan], dtype: torch.dtype) -> Work:
    """The work of one plan."""
    return Workload(config, dtype).under(layers)


def _weights(config: Any, layer: Any, removed: tuple[str, ...], inside: bool) -> tuple[int, float]:
    found = [(n, p.numel()) for n, p in layer.named_parameters() if (n.split(".")[0] in removed) == inside]
    return sum(count for _, count in found), sum(count * _share_of_experts(config, name) for name, count in found)


def _share_of_experts(config: Any, name: str) -> float:
    """The share of a parameter that one token meets."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return config.num_experts_per_tok / experts if experts and ".experts." in f".{name}" else 1.0
