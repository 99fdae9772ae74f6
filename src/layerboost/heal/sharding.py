"""Frozen weights that take less room: spread over processes, or in fewer bits."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layerboost.errors import EnvironmentTrouble, UsageError
from layerboost.heal.student import Healer
from layerboost.passes import ranks
from layerboost.progress import say

_BLOCK, _SCALES = 64, 256  # numbers per scale in 4 bits, and scales that are held in 8 bits together
_BLOCKS = _BLOCK * _SCALES


def shard(healer: Healer) -> None:
    """Spread the decoder layers' frozen weights over all processes (FSDP2); each is whole only while it is used.

    Embedding, head and all that is trained stay whole everywhere: they are small, and the loss reads the head directly.

    Raises:
        UsageError: there is one process.
    """
    if ranks()[1] == 1:
        raise UsageError("shard=true spreads weights over several processes, and this is one; start it with torchrun")
    from torch.distributed.fsdp import fully_shard

    base = healer.model.base_model
    inside = {parameter for layer in healer.model.decoder_layers for parameter in layer.parameters()}
    trained = {p for p in healer.parameters.values() if isinstance(p, nn.Parameter)}
    for layer in healer.model.decoder_layers:
        fully_shard(layer, ignored_params=trained)
    fully_shard(base, ignored_params=trained | (set(base.parameters()) - inside))


def quantize(healer: Healer, bits: Literal["int8", "int4"]) -> None:
    """Hold the decoder layers' frozen linear weights in few bits, in place; teacher and student both see them so.

    `int8` has one scale per row. `int4` is 4-bit NormalFloat in blocks of 64, as in QLoRA (arXiv 2305.14314): torchao's
    kernels for 4-bit integers have neither a gradient nor a version for CPU, and this has both. Experts that are packed
    into one tensor stay as they are, and in 4 bits so do matrices whose size is no multiple of 16,384.

    Raises:
        EnvironmentTrouble: torchao is not there, or too old.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, NF4Tensor, quantize_
    except ImportError as trouble:
        raise EnvironmentTrouble(f"quantize={bits}: {trouble}; pip install 'layerboost[quantize]'") from None
    trained = set(healer.parameters.values())
    total, held = sum(p.numel() for p in healer.model.decoder_layers.parameters() if p not in trained), 0
    for module in (module for layer in healer.model.decoder_layers for module in layer.modules()):
        if not isinstance(module, nn.Linear) or module.weight in trained:
            continue
        if bits == "int8":
            held += module.weight.numel()
            quantize_(module, Int8WeightOnlyConfig())
        elif module.weight.numel() % _BLOCKS == 0:
            held += module.weight.numel()
            weight = NF4Tensor.from_tensor(module.weight.detach(), _BLOCK, _SCALES)
            module.weight = nn.Parameter(weight, requires_grad=False)
        module.forward = partial(_linear, module)  # type: ignore[method-assign]
    say(f"quantize: {held / total:.0%} of the layers' weights are held in {bits}, the others as they were")


def _linear(module: nn.Linear, given: Tensor) -> Tensor:
    """`[..., in]` to `[..., out]`; whole weights that are trained stand in for the frozen ones now and then."""
    if is_traceable_wrapper_subclass(module.weight):
        return _FewBits.apply(given, module.weight, module.bias)
    return functional.linear(given, module.weight, module.bias)


class _FewBits(torch.autograd.Function):
    """A linear map whose backward pass keeps the few bits alone: torchao's int8 keeps a whole copy of every weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, given: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # type: ignore[attr-defined]
        return functional.linear(given, _whole(weight, given.dtype), bias)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = upstream
        return gradient @ _whole(ctx.weight, gradient.dtype), None, None  # type: ignore[attr-defined]


def _whole(weight: Any, dtype: torch.dtype) -> Tensor:
    """Both of torchao's tensors as `[out, in]`."""
    whole = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    return whole.to(dtype)
