"""What each layer of a hybrid keeps of the past: everything, a window, or nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from layerboost.artifacts import LayerPlan


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps the last `window - 1` tokens, in memory of their own."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            # Upstream keeps a view, which keeps a whole prompt's keys alive; and [-0:] would keep all of a window of 1.
            kept = min(self.sliding_window - 1, keys.shape[-2])
            start = keys.shape[-2] - kept
            self.keys, self.values = keys[:, :, start:].clone(), values[:, :, start:].clone()
        return keys, values


class LengthOnlyLayer(CacheLayerMixin):
    """The cache layer of a removed attention: counts tokens, stores nothing.

    transformers reads the length of the whole cache from its first layer, whatever that layer's mixer is.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.length = 0
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a removed attention has no keys and values to store")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove that many tokens; positive: the older spelling, keep that many."""
        kept = min(self.length, tokens_to_remove) if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = max(0, kept)

    def reset(self) -> None:
        self.length = 0

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...


_STOCK_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def fit_cache(cache: Cache, layers: list[LayerPlan], windows: list[int | None]) -> None:
    """Give a cache that has seen nothing yet the layers that the plan needs, in place.

    A cache made by `generate`, by a user or by the model itself is built from the stock configuration; which of them
    made it makes no difference here.

    Args:
        windows: per layer, what it sees in tokens, native windows included; None is everything.
    """
    if cache.layers and (len(cache.layers) != len(layers) or any(_holds_tokens(layer) for layer in cache.layers)):
        return
    if any(type(layer) not in _STOCK_LAYERS for layer in cache.layers):
        cache.layers = [
            LengthOnlyLayer() if plan.mixer == "no_attention" else old
            for plan, old in zip(layers, cache.layers, strict=True)
        ]
        return
    longest = max((getattr(layer, "max_cache_len", 0) for layer in cache.layers), default=0) or None
    cache.layers = [_layer_for(plan, window, longest) for plan, window in zip(layers, windows, strict=True)]
    cache.layer_class_to_replicate = None


def _layer_for(plan: LayerPlan, window: int | None, longest: int | None) -> CacheLayerMixin:
    if plan.mixer == "no_attention":
        return LengthOnlyLayer(longest)
    if longest is not None:
        return StaticLayer(longest) if window is None else StaticSlidingWindowLayer(longest, sliding_window=window)
    return DynamicLayer() if window is None else WindowLayer(sliding_window=window)


def _holds_tokens(layer: CacheLayerMixin) -> bool:
    if isinstance(layer, (LengthOnlyLayer, WindowLayer)):
        return True  # ours already
    return bool(layer.is_initialized and int(layer.get_seq_length()) > 0)


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that the cache really holds on to, unused capacity included."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
