"""Mixers: what mixes tokens in a layer, applied to a family's own decoder layer in place and undone exactly.

B batch, T query length, S key length, E hidden size, W window.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from layerboost.artifacts import LayerPlan
from layerboost.model.cache import LengthOnlyLayer


class NoAttention(nn.Module):
    """Stands where an attention was: adds nothing to the residual stream, and keeps the cache's count of tokens.

    Source: arXiv 2604.22050, equation 3 (the attention sub-block replaced by the identity on the residual stream).
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`[B, T, E]` to a zero scalar of the same dtype, which broadcasts into the residual sum."""
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            if isinstance(layer, LengthOnlyLayer):
                layer.advance(hidden_states.shape[1])
        return hidden_states.new_zeros(()), None


class MixedLayer:
    """Mixin over a family's decoder layer: attends under the mask of this layer's own mixer."""

    layerboost_plan: LayerPlan
    layerboost_window: int | None = None
    layerboost_window_argument = False

    def forward(
        self, hidden_states: Tensor, *args: Any, layerboost_masks: dict[int | None, Any] | None = None, **kwargs: Any
    ) -> Any:
        if layerboost_masks is not None:
            kwargs["attention_mask"] = layerboost_masks[self.layerboost_window]
        if self.layerboost_window_argument:
            kwargs["sliding_window"] = self.layerboost_window
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


ATTENTION = "self_attn"
ATTENTION_NORM = "input_layernorm"


def apply_mixer(layer: Any, index: int, plan: LayerPlan, native_window: int | None) -> None:
    """Give a decoder layer the mixer that the plan asks for, in place.

    What is removed is gone: use `mixed` to borrow a layer. Needs a layer that still has its attention.
    """
    layer.layerboost_plan = plan
    layer.layerboost_window = native_window
    if plan.mixer == "no_attention":
        layer._modules[ATTENTION] = NoAttention(index)
        layer._modules[ATTENTION_NORM] = nn.Identity()
    elif plan.mixer == "sliding_attention":
        _set_window(layer, plan.window)


def _set_window(layer: Any, window: int | None) -> None:
    """Masks carry the window on eager, SDPA and flex attention; flash attention wants it as an argument as well,
    which families take from three different places."""
    layer.layerboost_window = window
    attention = layer._modules[ATTENTION]
    if hasattr(attention, "sliding_window"):
        attention.sliding_window = window
    elif hasattr(type(attention.config), "sliding_window"):
        attention.config = copy.copy(attention.config)
        attention.config.sliding_window = window
    else:
        layer.layerboost_window_argument = True


@contextmanager
def mixed(layers: Any, changes: dict[int, LayerPlan], native_windows: list[int | None]) -> Iterator[None]:
    """The decoder layers with some mixers replaced, as they were afterwards.

    The originals stay where they are in memory, so one set of weights is teacher outside and student inside.
    """
    saved = []
    try:
        for index, plan in changes.items():
            layer = layers[index]
            attention = layer._modules[ATTENTION]
            saved.append((layer, dict(layer._modules), attention, dict(vars(attention)), dict(vars(layer))))
            apply_mixer(layer, index, plan, native_windows[index])
        yield
    finally:
        for layer, modules, attention, attention_state, layer_state in reversed(saved):
            vars(attention).clear()
            vars(attention).update(attention_state)
            vars(layer).clear()
            vars(layer).update(layer_state)
            layer._modules.clear()
            layer._modules.update(modules)
