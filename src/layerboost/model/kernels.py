"""Kernels of flash-linear-attention, where it is installed and a GPU is present; proven on first use, or left alone.

B batch, T tokens, H heads, G key/value heads, R = H / G, F features, D value size.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Sum = Callable[..., tuple[Tensor, Tensor]]
_NEAR = 1e-2  # of the largest value: what the library's own tests allow between its kernels and plain code


@cache
def gated_kernel(device: str, reference: Sum) -> Sum | None:
    """A faster `operators.gated_kernel_sum` for this kind of device; None if there is none that computes the same.

    Source of the kernel: `chunk_gla` of github.com/fla-org/flash-linear-attention.
    """
    if device != "cuda" or importlib.util.find_spec("fla") is None:
        return None
    try:
        chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
        kernel = adapted(chunk_gla)
        _prove(kernel, reference, device)
    except Exception as trouble:  # a library of another version, or a compiler that is missing
        warnings.warn(f"flash-linear-attention is not used: {str(trouble)[:200]}", stacklevel=2)
        return None
    return kernel


def adapted(chunk_gla: Callable[..., tuple[Tensor, Tensor]]) -> Sum:
    """The library's layout, `[B, T, H, F]` and one state per head, behind the signature of `gated_kernel_sum`."""

    def gated(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shared = q.shape[2]
        k, v, log_decay = (x.repeat_interleave(shared, 1).transpose(1, 2) for x in (k, v, log_decay))
        first = None if state is None else state.repeat_interleave(shared, 1)
        out, last = chunk_gla(
            q.flatten(1, 2).transpose(1, 2), k, v, g=log_decay, scale=1.0, initial_state=first, output_final_state=True
        )
        return out.transpose(1, 2).unflatten(1, q.shape[1:3]), last[:, ::shared]

    return gated


@torch.inference_mode(False)
def _prove(kernel: Sum, reference: Sum, device: str) -> None:
    """Raises ValueError if the kernel computes something else, forward or backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 3, 70, 32), (2, 2, 70, 32), (2, 2, 70, 33), (2, 2, 70, 32), (2, 2, 32, 33))
    q, k, v, gate, state = (torch.rand(*s, generator=generator).to(device).requires_grad_() for s in shapes)
    results = []
    with torch.enable_grad():  # the first use may come while nothing is learned
        for function in (kernel, reference):
            out, last = function(q, k, v, -gate, state=state)
            gradients = torch.autograd.grad(out.sum() + last.sum(), (q, k, v, gate, state))
            results.append((out, last, *gradients))
    for ours, theirs in zip(*results, strict=True):
        if not (ours - theirs).abs().max() <= _NEAR * theirs.abs().max():
            raise ValueError("its gated kernel does not compute what plain code computes")
