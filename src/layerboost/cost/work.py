"""What one token costs under a plan, counted from the configuration."""

from dataclasses import dataclass
from typing import Any

import torch

from layerboost.layer_plan import LayerPlan
from layerboost.model.config import family_of, native_windows, stock_class
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


def work_of(config: Any, layers: list[LayerPlan], dtype: torch.dtype) -> Work:
    """Args:
    config: of the base model.
    dtype: of weights and cache.
    """
    with torch.device("meta"):
        model = stock_class(family_of(config))(config)
    anatomy = anatomy_of(model.base_model)
    stack = getattr(model.base_model, anatomy.layers)
    weights, active = 0, 0.0
    for layer, plan in zip(stack, layers, strict=True):
        removed = (anatomy.attention, *anatomy.norms) if plan.mixer == "no_attention" else ()
        for name, parameter in layer.named_parameters():
            if name.split(".")[0] not in removed:
                weights += parameter.numel()
                active += parameter.numel() * _share_of_experts(config, name)
    head = config.vocab_size * config.hidden_size
    shape = HeadShape.of(config)
    return Work(
        token_flops=2 * active,
        head_flops=2 * head,
        weight_bytes=(weights + head) * dtype.itemsize,
        attentions=dict(layers_by_window(layers, native_windows(config))),
        pair_flops=4 * shape.heads * shape.head_dim,
        kv_bytes=2 * shape.groups * shape.head_dim * dtype.itemsize,
    )


def _share_of_experts(config: Any, name: str) -> float:
    """The share of a parameter that one token meets."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return config.num_experts_per_tok / experts if experts and ".experts." in f".{name}" else 1.0
