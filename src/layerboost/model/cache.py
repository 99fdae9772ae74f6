"""What each layer of a hybrid keeps of the past: everything, a window, a state of fixed size, or nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from layerboost.layer_plan import LayerPlan

# transformers sizes the masks of full layers by the first cache layer that is not sliding, and those of sliding ones by
# the first that equals True; ours see by themselves, and must be neither
_OWN_MASK: Any = "layerboost"


class WindowLayer(DynamicSlidingWindowLayer):
    """Keeps the last `window - 1` tokens, in memory of their own."""

    def __init__(self, window: int, *, native: bool = False) -> None:
        super().__init__(sliding_window=window)
        self.is_sliding = True if native else _OWN_MASK

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not getattr(self, "record_past", False):  # older versions of transformers record nothing
            # Upstream keeps a view, which keeps a whole prompt's keys alive; and [-0:] would keep all of a window of 1.
            kept = min(self.sliding_window - 1, keys.shape[-2])
            start = keys.shape[-2] - kept
            self.keys, self.values = keys[:, :, start:].clone(), values[:, :, start:].clone()
        return keys, values


class FixedLayer(CacheLayerMixin):
    """Keeps the last `slots` tokens in buffers that never move or grow, the newest last; and a state, for some mixers.

    Slots that nothing was stored in yet come first; `get_seq_length` tells how many.

    Attributes:
        state: what linear attention keeps of everything before the slots; None before the first token.
    """

    is_sliding = _OWN_MASK
    is_croppable = False

    def __init__(self, slots: int, *, compileable: bool = False) -> None:
        super().__init__()
        self.slots = slots
        self.is_compileable = compileable
        self.state: Tensor | None = None
        self.seen: Any = torch.tensor(0) if compileable else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (t.new_zeros(*t.shape[:2], self.slots, t.shape[3]) for t in (key_states, value_states))
        if self.is_compileable:
            self.seen = self.seen.to(self.device)
            for tensor in (self.keys, self.values, self.seen):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The slots and the new tokens, `[B, G, slots + T, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        self.keys.copy_(keys[:, :, tokens:])
        self.values.copy_(values[:, :, tokens:])
        self.seen += tokens
        return keys, values

    def store(self, state: Tensor) -> None:
        if self.state is None:
            self.state = state.detach().clone()
            if self.is_compileable and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.state)
        else:
            self.state.copy_(state)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a cache of linear attention, or a static one, cannot take tokens back; decode without an assistant"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_seq_length(self) -> Any:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def reset(self) -> None:
        self.seen *= 0
        if not self.is_compileable:  # what comes next may be another batch
            self.state, self.is_initialized = None, False
            return
        for tensor in (self.keys, self.values, self.state):
            if tensor is not None:
                tensor.zero_()

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._pick(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._pick(lambda tensor: tensor[indices, ...])

    def _pick(self, pick: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = pick(self.keys), pick(self.values)
        if self.state is not None:
            self.state = pick(self.state)


class LengthOnlyLayer(CacheLayerMixin):
    """The cache layer of a removed attention: counts tokens, stores nothing.

    transformers reads the length of the whole cache from its first layer, whatever that layer's mixer is.
    """

    is_sliding = _OWN_MASK
    is_croppable = True

    def __init__(self, *, compileable: bool = False) -> None:
        super().__init__()
        self.is_compileable = compileable
        self.seen: Any = torch.tensor(0) if compileable else 0
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        self.seen += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a removed attention has no keys and values to store")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.seen) + query_length, 0

    def get_seq_length(self) -> Any:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove that many tokens; positive: the older spelling, keep that many."""
        kept = min(self.seen, tokens_to_remove) if tokens_to_remove > 0 else self.seen + tokens_to_remove
        self.seen = max(0, kept)

    def reset(self) -> None:
        self.seen *= 0

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...


def fit_cache(cache: Cache, config: Any, layers: list[LayerPlan]) -> None:
    """Give a cache that has seen nothing yet the layers that the plan needs, in place.

    A cache made by `generate`, by a user or by the model itself is built from the stock configuration; which of them
    made it makes no difference here.
    """
    if cache.layers and (len(cache.layers) != len(layers) or any(_in_use(layer) for layer in cache.layers)):
        return
    stock = cache.layers or DynamicCache(config=config).layers
    if len(stock) != len(layers):  # a stock configuration without a word on layers
        stock = [DynamicLayer() for _ in layers]
    cache.layers = [_layer_for(plan, old) for plan, old in zip(layers, stock, strict=True)]
    cache.layer_class_to_replicate = None


def _layer_for(plan: LayerPlan, stock: CacheLayerMixin) -> CacheLayerMixin:
    static = isinstance(stock, StaticLayer)
    if plan.mixer == "no_attention":
        return LengthOnlyLayer(compileable=static)
    if plan.mixer == "linear_attention":
        return FixedLayer(plan.window or 0, compileable=static)
    if plan.mixer == "full_attention":
        native = type(stock) is DynamicSlidingWindowLayer
        return WindowLayer(stock.sliding_window, native=True) if native else stock
    assert plan.window is not None
    if type(stock) in (StaticLayer, StaticSlidingWindowLayer):
        return FixedLayer(plan.window - 1, compileable=True)
    if type(stock) in (DynamicLayer, DynamicSlidingWindowLayer):
        return WindowLayer(plan.window)
    return stock  # a user's own, quantised for instance: it may keep more than the window, which sees no more of it


def _in_use(layer: CacheLayerMixin) -> bool:
    if isinstance(layer, (LengthOnlyLayer, FixedLayer, WindowLayer)):
        return True  # fitted already
    return bool(layer.is_initialized and int(layer.get_seq_length()) > 0)


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys, values and states that the cache really holds on to, unused capacity included."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, name, None) for name in ("keys", "values", "state")):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
