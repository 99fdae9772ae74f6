"""Exact prefix reuse: what a model computes below a layer does not depend on that layer's mixer.

B sequences, T tokens, E hidden size, L layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerboost.errors import CheckpointError
from layerboost.layer_plan import LayerPlan
from layerboost.model.families import first_tensor
from layerboost.model.hybrid import Hybrid
from layerboost.model.mixers import Sequences


@dataclass
class Prefix:
    """One batch as every layer of the untouched model sees it.

    Attributes:
        inputs: L tensors `[B, T, E]`, each layer's input.
        arguments: per layer, what it gets besides: mask, positions, rotary embedding.
        final: `[B, T, E]` final hidden states, normed.
    """

    inputs: list[Tensor]
    arguments: list[dict[str, Any]]
    final: Tensor


@torch.no_grad()
def capture(model: Hybrid, tokens: Tensor) -> Prefix:
    """Run the untouched model once on `[B, T]` tokens and keep what the suffixes need.

    Raises:
        CheckpointError: the family computes more than a norm after its last layer.
    """
    inputs: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.append(kwargs)

    outputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.decoder_layers]
    hooks.append(model.decoder_layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output)))
    try:
        final = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.equal(model.final_norm(first_tensor(outputs[0])), final):
        raise CheckpointError(f"{model.config.model_type} computes more than a norm after its last layer")
    return Prefix(inputs, arguments, final)


@torch.no_grad()
def suffix(model: Hybrid, prefix: Prefix, layer: int, plan: LayerPlan) -> Tensor:
    """`[B, T, E]` final hidden states with one layer's mixer replaced; bit-equal to running the whole model so."""
    hidden = prefix.inputs[layer]
    with model.mixed({layer: plan}):
        for block, arguments in zip(model.decoder_layers[layer:], prefix.arguments[layer:], strict=True):
            hidden = first_tensor(block(hidden, **arguments, layerboost=Sequences()))
    return model.final_norm(hidden)
