"""Mixers: what mixes tokens in a layer, put into a family's own attention in place and undone exactly.

A family's attention keeps its projections, norms, rotary embedding and cache; only the function that transformers'
attention interface would call on queries, keys and values becomes the mixer's.

B batch, T query length, S key length, H heads, G key/value heads, D head size, E hidden size, F features.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerboost.errors import CheckpointError, PlanError
from layerboost.layer_plan import LayerPlan
from layerboost.model.cache import FixedLayer, LengthOnlyLayer
from layerboost.model.families import Anatomy
from layerboost.model.operators import (
    LOG_DECAY_MIN,
    PADDING,
    gated_sum,
    sliding_window_attention,
    window_and_kernel_attention,
)

INTERFACE = "layerboost"  # our name among transformers' attention implementations
MIXER = "mixer"  # of the module with a mixer's own parameters, inside the attention
SINK_START = -10.0  # exp(-10) of a softmax share: what a fresh sink takes from a score of 0
SHARE_START = 6.0  # sigmoid(6) = 0.9975: the kernel's many small weights start as a small part of the whole


@dataclass
class Sequences:
    """What a forward pass is told of its sequences; every layer gets it.

    Attributes:
        padding: `[B, seen + T]`, 0 where a token is padding; None is no padding.
        packed: `[B, T]` number of the packed sequence that a token belongs to; None is one sequence per row.
    """

    padding: Tensor | None = None
    packed: Tensor | None = None


@dataclass
class Call:
    """What one attention is told beside queries, keys and values; travels in place of a mask."""

    sequences: Sequences
    hidden: Tensor
    cache: Any
    attention: Any
    used: bool = False

    def segments(self, queries: int, keys: int) -> Tensor | None:
        """`[B or 1, S]` segment of every key, PADDING where there is none; None if all are of one."""
        device = self.hidden.device
        if self.sequences.packed is not None and keys == queries:
            return self.sequences.packed.to(device)
        padding = self.sequences.padding
        unfilled = isinstance(self.cache, FixedLayer) and self.cache.slots > 0
        if padding is None and not unfilled:
            return None
        # columns of the padding that the keys stand for; with a static cache it may reach beyond the last token
        total = keys if self.cache is None else self.cache.get_seq_length()
        position = torch.arange(keys, device=device) + (total - keys)
        there = (position >= 0)[None]
        if padding is not None:
            columns = position.clamp(0, padding.shape[1] - 1)
            there = there & padding.to(device).bool().index_select(1, columns)
        return torch.where(there, 0, PADDING)


class NoAttention(nn.Module):
    """Stands where an attention was: adds nothing to the residual stream, and keeps the cache's count of tokens.

    Source: arXiv 2604.22050, equation 3 (the attention sub-block replaced by the identity on the residual stream).
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """`[B, T, E]` to a zero scalar of the same dtype, which broadcasts into the residual sum."""
        layer = _cache_layer(kwargs, self.layer_idx)
        if isinstance(layer, LengthOnlyLayer):
            layer.advance(hidden_states.shape[1])
        return hidden_states.new_zeros(()), None


# what a cache is called: in most of transformers 5, since 5.2x, and in gpt_neox
_CACHE_ARGUMENTS = ("past_key_values", "cache", "layer_past")


def cache_argument(forward: Any) -> str:
    """The name under which this function takes a cache."""
    known = inspect.signature(forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in known), _CACHE_ARGUMENTS[0])


def take_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among keyword arguments, taken out of them."""
    found = [kwargs.pop(name, None) for name in _CACHE_ARGUMENTS]
    return next((cache for cache in found if cache is not None), None)


def _cache_layer(kwargs: dict[str, Any], index: int) -> Any:
    found = take_cache(dict(kwargs))
    if found is None:
        return None
    if not isinstance(found, Cache):
        raise ValueError("a hybrid does not run on transformers' paged cache; use generate, or serve it on vLLM")
    return found.layers[index]


@dataclass(frozen=True)
class HeadShape:
    """Sizes that a mixer's parameters depend on."""

    heads: int
    groups: int
    head_dim: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> "HeadShape":
        heads = config.num_attention_heads
        return cls(
            heads,
            1 if getattr(config, "multi_query", False) else _declared(config, "num_key_value_heads") or heads,
            _declared(config, "head_dim") or config.hidden_size // heads,
            config.hidden_size,
        )


def _declared(config: Any, key: str) -> int | None:
    """The value of a key that the family knows; a configuration keeps any other key too, and nothing reads it."""
    kind = type(config)
    known = hasattr(kind, key) or key in inspect.signature(kind.__init__).parameters
    return getattr(config, key, None) if known else None


class SlidingAttention(nn.Module):
    """Softmax over the last tokens, with a learned sink per head if the plan asks for one.

    Where the model runs on flash attention or flex attention, their own windows are used; with sinks, which not every
    flash attention has, only flex attention's.
    """

    def __init__(self, plan: LayerPlan, shape: HeadShape) -> None:
        super().__init__()
        assert plan.window is not None
        self.window = plan.window
        self.sink = nn.Parameter(torch.full((shape.heads,), SINK_START)) if plan.sink else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, *, native_sink: Tensor | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """`[B, H, T, D]`, `[B, G, S, D]` twice, to `[B, T, H, D]`."""
        sink = self.sink if native_sink is None else native_sink
        segments = call.segments(q.shape[2], k.shape[2])
        implementation = call.attention.layerboost_config._attn_implementation or "eager"
        if implementation.startswith("flash_attention") and call.sequences.packed is None and sink is None:
            mask = None if segments is None else (segments != PADDING).expand(q.shape[0], -1)
            stock = ALL_ATTENTION_FUNCTIONS[implementation]
            with _own_config(call.attention) as attention:
                return stock(attention, q, k, v, mask, sliding_window=self.window, **options)[0]
        if implementation == "flex_attention":
            mask = flex_mask(q, k, self.window, segments)
            return ALL_ATTENTION_FUNCTIONS[implementation](call.attention, q, k, v, mask, s_aux=sink, **options)[0]
        out = sliding_window_attention(
            q, k, v, window=self.window, scale=options["scaling"], softcap=options["softcap"],
            dropout=options["dropout"], segments=segments, sink=sink,
        )  # fmt: skip
        return out.transpose(1, 2)


@contextmanager
def _own_config(attention: Any) -> Iterator[Any]:
    """With the model's own configuration: flash attention looks up there which kernel it is."""
    ours = attention.config
    attention.config = attention.layerboost_config
    try:
        yield attention
    finally:
        attention.config = ours


def flex_mask(q: Tensor, k: Tensor, window: int, segments: Tensor | None) -> Any:
    """The block mask of a window for flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    past = k.shape[2] - q.shape[2]
    of_keys = None if segments is None else segments.expand(q.shape[0], -1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here = query + past
        seen = (key <= here) & (key > here - window)
        return seen if of_keys is None else seen & (of_keys[batch, here] == of_keys[batch, key])

    return create_block_mask(visible, q.shape[0], None, q.shape[2], k.shape[2], device=str(q.device))


class LinearAttention(nn.Module):
    """Kernel attention with a state of fixed size: variants `lolcats`, `linear` and `performer`.

    Sources: arXiv 2410.10254 (lolcats), 2006.16236 (linear), 2009.14794 (performer), 2402.04347 (the hedgehog map).
    """

    def __init__(self, plan: LayerPlan, shape: HeadShape, seed: int) -> None:
        super().__init__()
        self.window = plan.window or 0
        size = shape.head_dim
        self.map_q: nn.Module
        self.map_k: nn.Module | None = None  # the same as for queries
        if plan.feature_map == "favor":
            self.map_q = FavorMap(size, seed)
        else:
            made = {"hedgehog": Hedgehog, "elu": EluMap}[plan.feature_map or ""]
            self.map_q, self.map_k = made(shape.heads, size), made(shape.groups, size)
        self.scaled = plan.feature_map == "favor"  # it stands for the softmax kernel, and that is of scaled scores
        self.share = nn.Parameter(torch.full((shape.heads,), SHARE_START)) if self.window else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **options: Any) -> Tensor:
        """`[B, H, T, D]`, `[B, G, S, D]` twice, to `[B, T, H, D]`."""
        segments = _one_sequence(call, q, k)
        state = call.cache.state if isinstance(call.cache, FixedLayer) else None
        root = options["scaling"] ** 0.5 if self.scaled else 1.0
        map_k = self.map_k or self.map_q
        out, state = window_and_kernel_attention(
            q, k, v, self.map_q(q.float() * root), map_k(k.float() * root), window=self.window,
            share=None if self.share is None else self.share.float().sigmoid(), scale=options["scaling"],
            softcap=options["softcap"], segments=segments, state=state,
        )  # fmt: skip
        if isinstance(call.cache, FixedLayer):
            call.cache.store(state)
        return out.transpose(1, 2)


class GatedLinearAttention(nn.Module):
    """Kernel attention whose state decays by a learned, data-dependent gate per feature: variant `gla`.

    Queries and keys pass a softmax and the sum has a normaliser, as in Liger, so that outputs start as averages of
    values, which is what the pretrained output projection expects.

    Sources: arXiv 2312.06635 (the recurrence and its gate), 2503.01496 (softmax on queries and keys).
    """

    RANK, TEMPERATURE = 16, 16.0

    def __init__(self, plan: LayerPlan, shape: HeadShape, seed: int) -> None:
        super().__init__()
        self.groups = shape.groups
        generator = torch.Generator().manual_seed(seed)
        self.gate_down = nn.Parameter(torch.randn(self.RANK, shape.hidden, generator=generator) / shape.hidden**0.5)
        self.gate_up = nn.Parameter(torch.zeros(shape.groups * shape.head_dim, self.RANK))
        # sigmoid(6) ** (1 / 16): a state that forgets half of itself in 4,500 tokens
        self.gate_bias = nn.Parameter(torch.full((shape.groups * shape.head_dim,), 6.0))

    def log_decay(self, hidden: Tensor) -> Tensor:
        """`[B, T, E]` to `[B, G, T, D]` float32, in [LOG_DECAY_MIN, 0]."""
        gate = F.linear(F.linear(hidden.float(), self.gate_down.float()), self.gate_up.float(), self.gate_bias.float())
        decay = (F.logsigmoid(gate) / self.TEMPERATURE).clamp(min=LOG_DECAY_MIN)
        return decay.unflatten(-1, (self.groups, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **options: Any) -> Tensor:
        """`[B, H, T, D]`, `[B, G, T, D]` twice, to `[B, T, H, D]`."""
        segments = _one_sequence(call, q, k)
        heads = q.shape[1]
        features_q = q.float().softmax(-1).unflatten(1, (self.groups, heads // self.groups))
        features_k, decay = k.float().softmax(-1), self.log_decay(call.hidden)
        if segments is not None:
            there = (segments >= 0)[:, None, :, None]
            features_k, decay = features_k * there, decay * there
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        cached = isinstance(call.cache, FixedLayer)
        total, state = gated_sum(features_q, features_k, values, decay, state=call.cache.state if cached else None)
        if cached:
            call.cache.store(state)
        total = total.flatten(1, 2)
        found, normaliser = total[..., :-1], total[..., -1:]
        return (found / torch.where(normaliser > 0, normaliser, 1.0)).to(q.dtype).transpose(1, 2)


def _one_sequence(call: Call, q: Tensor, k: Tensor) -> Tensor | None:
    if call.used:
        raise CheckpointError(
            f"{type(call.attention).__name__} attends more than once per layer, which linear attention's state cannot "
            "follow; use sliding_attention"
        )
    call.used = True
    if call.sequences.packed is not None:
        raise ValueError(
            "linear_attention takes one sequence per row, found position_ids of packed ones; pad them instead, or "
            "pass them one by one"
        )
    return call.segments(q.shape[2], k.shape[2])


class EluMap(nn.Module):
    """elu(x) + 1, `[B, H, T, D]` to the same. Source: arXiv 2006.16236 equation 7."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class Hedgehog(nn.Module):
    """softmax(Wx) and softmax(-Wx) over the head, `[B, H, T, D]` to `[B, H, T, 2 D]`; each W starts as the identity.

    Source: arXiv 2402.04347 section 4.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight.float()
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


class FavorMap(nn.Module):
    """Positive random features of exp(q . k), `[B, H, T, D]` to `[B, H, T, 2 D]`; fixed, orthogonal.

    Source: arXiv 2009.14794 (Performer) lemma 1 and section 2.4.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        blocks = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2)]
        lengths = torch.randn(2 * size, size, generator=generator).norm(dim=-1, keepdim=True)
        self.directions: Tensor
        # rounded, so that a checkpoint of any precision holds the same
        self.register_buffer("directions", (torch.cat(blocks) * lengths).bfloat16().float())

    def forward(self, x: Tensor) -> Tensor:
        directions = self.directions.float()
        return (x @ directions.T - x.square().sum(-1, keepdim=True) / 2).exp()


def make_mixer(plan: LayerPlan, shape: HeadShape, index: int) -> nn.Module:
    """A layer's mixer with fresh parameters, the same every time: whatever dtype and device transformers builds in."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            if plan.mixer == "sliding_attention":
                return SlidingAttention(plan, shape)
            return (GatedLinearAttention if plan.variant == "gla" else LinearAttention)(plan, shape, seed=index)
    finally:
        torch.set_default_dtype(usual)


class MixedAttention:
    """Mixin over a family's attention: hands what the mixer needs to it, in place of the family's mask."""

    layer_idx: int
    layerboost_config: Any  # the family's own, as it was

    def forward(self, *args: Any, layerboost: Sequences | None = None, **kwargs: Any) -> Any:
        if layerboost is None or len(args) > 1:
            raise RuntimeError(f"{type(self).__name__} is not told of padding: its layer hands on no further arguments")
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs["attention_mask"] = Call(layerboost, hidden, _cache_layer(kwargs, self.layer_idx), self)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Call, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers' attention interface calls for a mixed attention; `[B, H, T, D]` to `[B, T, H, D]`."""
    mixer = attention._modules[MIXER]
    return mixer(
        query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap,
        **({"native_sink": s_aux} if s_aux is not None else {}),
    ).contiguous(), None  # fmt: skip


ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attend)


@cache
def with_mixin(mixin: type, cls: Any) -> Any:
    """The class keeps its name: device maps and FSDP find modules by it."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def apply_mixer(layer: Any, index: int, plan: LayerPlan, anatomy: Anatomy, mixer: nn.Module | None = None) -> None:
    """Give a decoder layer the mixer that the plan asks for, in place.

    What is removed is gone: use `mixed` to borrow a layer. Needs a layer that still has its attention.

    Args:
        mixer: its module; None makes a fresh one.
    """
    layer.layerboost_plan = plan
    if plan.mixer == "full_attention":
        return
    if plan.mixer == "no_attention":
        layer._modules[anatomy.attention] = NoAttention(index)
        for norm in anatomy.norms:
            layer._modules[norm] = nn.Identity()
        return
    attention = layer._modules[anatomy.attention]
    own = attention.config
    if hasattr(attention, "sinks") and (plan.sink or plan.mixer == "linear_attention"):
        raise PlanError(f"layer {index} has sinks of its own already, which {plan.label} would not keep; leave it out")
    if mixer is None:
        like = next(attention.parameters())
        mixer = make_mixer(plan, HeadShape.of(own), index).to(device=like.device, dtype=like.dtype)
    attention.layerboost_config, attention.config = own, copy.copy(own)
    attention.config._attn_implementation = INTERFACE
    attention._modules[MIXER] = mixer
    attention.__class__ = with_mixin(MixedAttention, attention.__class__)


@contextmanager
def mixed(
    layers: Any, changes: dict[int, LayerPlan], anatomy: Anatomy, mixers: dict[int, nn.Module] | None = None
) -> Iterator[None]:
    """The decoder layers with some mixers replaced, as they were afterwards.

    The originals stay where they are in memory, so one set of weights is teacher outside and student inside.
    """
    saved = []
    try:
        for index, plan in changes.items():
            layer = layers[index]
            attention = layer._modules[anatomy.attention]
            for module in (attention, layer):
                saved.append((module, module.__class__, dict(vars(module)), dict(module._modules)))
            apply_mixer(layer, index, plan, anatomy, (mixers or {}).get(index))
        yield
    finally:
        for module, kind, state, children in reversed(saved):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            module._modules.clear()
            module._modules.update(children)
