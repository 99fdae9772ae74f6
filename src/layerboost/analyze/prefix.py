"""Exact prefix reuse: what a model computes below a layer does not depend on that layer's mixer.

B sequences, T tokens, E hidden size, L layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerboost.artifacts import LayerPlan
from layerboost.model.hybrid import Hybrid


@dataclass
class Prefix:
    """One batch as every layer of the untouched model sees it.

    Attributes:
        inputs: L tensors `[B, T, E]`, each layer's input.
        arguments: what every layer gets besides: masks, positions, rotary embedding.
        final: `[B, T, E]` final hidden states, normed.
    """

    inputs: list[Tensor]
    arguments: dict[str, Any]
    final: Tensor


@torch.no_grad()
def capture(model: Hybrid, tokens: Tensor, windows: set[int | None]) -> Prefix:
    """Run the untouched model once on `[B, T]` tokens and keep what the suffixes need, masks for these windows too."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.decoder_layers]
    try:
        with model.base_model.also_masking(windows):
            final = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    arguments.pop("attention_mask", None)  # layers take theirs from the masks of all windows
    return Prefix(inputs, arguments, final)


@torch.no_grad()
def suffix(model: Hybrid, prefix: Prefix, layer: int, plan: LayerPlan) -> Tensor:
    """`[B, T, E]` final hidden states with one layer's mixer replaced; bit-equal to running the whole model so."""
    hidden = prefix.inputs[layer]
    with model.mixed({layer: plan}):
        for block in model.decoder_layers[layer:]:
            hidden = block(hidden, **prefix.arguments)
    return model.base_model.norm(hidden)
