"""Proof on a model's own weights that its layers can be converted faithfully, for families without contract tests."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layerboost.errors import CheckpointError
from layerboost.layer_plan import KEEP, LayerPlan
from layerboost.model.cache import cache_bytes
from layerboost.model.config import family_of, native_windows
from layerboost.model.families import VERIFIED, first_tensor
from layerboost.model.hybrid import Hybrid
from layerboost.model.mixers import HeadShape

_TOKENS, _WINDOW = 24, 5
_NONE = LayerPlan("no_attention")


@torch.no_grad()
def check_faithful(model: Hybrid) -> None:
    """Compare a few mixers with what the family's own code computes; verified families pass without.

    Raises:
        CheckpointError: they differ, or the family's code cannot run so.
    """
    family = family_of(model.config)
    if family in VERIFIED:
        return
    try:
        trouble = _trouble(model)
    except Exception as error:  # whatever code that was never tried so runs into
        trouble = f"its code fails ({(str(error).splitlines() or [type(error).__name__])[0][:160]})"
    if trouble:
        raise CheckpointError(
            f"{family} models cannot be converted: LayerBoost has no tests for this family, and tried on this model "
            f"{trouble}"
        )


def _trouble(model: Hybrid) -> str | None:
    tokens = (torch.arange(_TOKENS, device=model.device)[None] * 7 + 3) % model.config.vocab_size
    layers = len(model.decoder_layers)
    native = native_windows(model.config)
    base = model(tokens, use_cache=False).logits
    near = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.isfinite(base).all():
        return "it computes values that are not finite"

    def differs(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() > near * base.abs().max())

    with model.mixed({i: LayerPlan("sliding_attention", min(n or _TOKENS, _TOKENS)) for i, n in enumerate(native)}):
        if differs(model(tokens, use_cache=False).logits, base):
            return "a window over the whole sequence is not the same as its own attention"
    narrow = {i: LayerPlan("sliding_attention", min(n or _WINDOW, _WINDOW)) for i, n in enumerate(native)}
    for changes in (narrow, {0: _NONE}, {layers - 1: _NONE}, narrow | {0: _NONE}):
        with model.mixed(changes):
            whole = model(tokens, use_cache=False).logits
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in tokens.split([_TOKENS - 2, 1, 1], 1)]
            if differs(torch.cat(parts, 1), whole):
                return "cached decoding is not the same as the full forward pass"
            if changes == narrow and not differs(whole, base):
                return "a narrow window changes nothing"
            held, promised = cache_bytes(cache), _promised(model, changes)
            if held != promised:
                return f"its cache holds {held} bytes, where {promised} follow from its configuration"
    for index in (0, layers - 1):
        with model.mixed({index: _NONE}):
            removed = model(tokens, use_cache=False).logits
        if differs(removed, _silenced(model, index, tokens)):
            return "a removed attention is not the same as one that adds nothing"
    return None


def _promised(model: Hybrid, changes: dict[int, LayerPlan]) -> int:
    """Bytes of keys and values of all tokens, of which a window of W keeps W - 1."""
    shape = HeadShape.of(model.config)
    held = 0
    for index, native in enumerate(native_windows(model.config)):
        plan = changes.get(index, KEEP)
        window = native if plan.window is None else plan.window
        if plan.mixer != "no_attention":
            held += _TOKENS if window is None else min(_TOKENS, window - 1)
    return 2 * held * shape.groups * shape.head_dim * model.dtype.itemsize


def _silenced(model: Hybrid, index: int, tokens: Tensor) -> Tensor:
    """Logits with one attention's output, and that of the norms behind it, set to zero by hooks."""

    def zero(_: Any, __: Any, output: Any) -> Any:
        silent = torch.zeros_like(first_tensor(output))
        return (silent, *output[1:]) if isinstance(output, tuple) else silent

    layer = model.decoder_layers[index]
    names = [model.anatomy.attention, *model.anatomy.after]
    hooks = [getattr(layer, name).register_forward_hook(zero) for name in names]
    try:
        return model(tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
