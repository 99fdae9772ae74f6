"""How vLLM lays out the key/value cache of a plan: groups of layers that share one pool of blocks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from layerboost.layer_plan import LayerPlan
from layerboost.vllm import check_servable

CPU_BLOCK = 128  # tokens in a block of vLLM's cache unless told otherwise
GPU_BLOCK = 16


@dataclass(frozen=True)
class KVLayout:
    """The cache of one plan.

    Attributes:
        block_size: tokens in a block.
        block_bytes: of one block: keys and values of `block_size` tokens in each layer of a group, padding included.
        windows: of each group; None keeps everything. Every sequence holds blocks of its own in every group.
        used_share: share of a block's bytes that layers use; the rest is padding, because groups must be equally large.
    """

    block_size: int
    block_bytes: int
    windows: tuple[int | None, ...]
    used_share: float

    def blocks(self, computed: int, upto: int) -> int:
        """Blocks that a sequence holds while its tokens from `computed` to `upto` are worked on."""
        return sum(_blocks(window, computed, upto, self.block_size) for window in self.windows)

    def admission_blocks(self, known: int, max_batched_tokens: int) -> int:
        """Blocks that must be free before a request of `known` tokens is taken in."""
        whole = -(-known // self.block_size)
        total = 0
        for window in self.windows:
            reach = whole if window is None else -(-(window - 1 + max_batched_tokens) // self.block_size) + 1
            total += min(whole, reach)
        return total

    def sequence_bytes(self, tokens: int) -> int:
        """Cache of one sequence at its end; the last token is sampled, and never enters the cache."""
        return self.blocks(max(0, tokens - 2), max(1, tokens - 1)) * self.block_bytes


def _blocks(window: int | None, computed: int, upto: int, block_size: int) -> int:
    gone = 0 if window is None else max(0, computed - window + 1) // block_size
    return -(-upto // block_size) - gone


def layers_by_window(layers: list[LayerPlan], native_windows: list[int | None]) -> Counter[int | None]:
    """How many layers with a cache look how far back; None is everything."""
    return Counter(
        native if plan.window is None else plan.window
        for plan, native in zip(layers, native_windows, strict=True)
        if plan.mixer != "no_attention"
    )


def kv_layout(layers: list[LayerPlan], native_windows: list[int | None], layer_bytes: int, block_size: int) -> KVLayout:
    """The cache of a plan.

    Args:
        layer_bytes: keys and values of one token in one layer.

    Raises:
        PlanError: vLLM cannot run the plan.
    """
    check_servable(layers)
    return grouped(layers_by_window(layers, native_windows), layer_bytes, block_size)


def grouped(kinds: Mapping[int | None, int], layer_bytes: int, block_size: int) -> KVLayout:
    """vLLM's grouping (0.32, `_get_kv_cache_groups_uniform_page_size`) of so many layers of each window."""
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    windows = tuple(window for window, count in kinds.items() for _ in range(-(-count // size)))
    return KVLayout(
        block_size=block_size,
        block_bytes=size * block_size * layer_bytes,
        windows=windows,
        used_share=sum(kinds.values()) / (size * len(windows)),
    )


def padded_bytes(
    counts: np.ndarray, windows: list[int | None], layer_bytes: int, block: int, tokens: int
) -> np.ndarray:
    """Cache of one sequence at its end under many plans at once, in bytes: `grouped` and `sequence_bytes` for each.

    Args:
        counts: `[M, K]`, per plan how many layers have each of the windows; rows of nothing cost nothing.
    """
    fewest = np.where(counts > 0, counts, np.iinfo(counts.dtype).max).min(1)
    most = counts.max(1)
    size = np.maximum(np.where(most < 1.5 * fewest, most, np.minimum(fewest, most)), 1)
    blocks = np.array([_blocks(window, max(0, tokens - 2), max(1, tokens - 1), block) for window in windows])
    return (-(-counts // size[:, None]) * blocks).sum(1) * size * block * layer_bytes


def good_block_size(layers: list[LayerPlan], on_cpu: bool) -> int:
    """vLLM's own block, or a smaller one that its kernels know and a narrow window does not leave mostly empty."""
    own, least = (CPU_BLOCK, 32) if on_cpu else (GPU_BLOCK, GPU_BLOCK)
    narrowest = min((plan.window for plan in layers if plan.window), default=2 * own)
    return max(size for size in (16, 32, 64, 128) if least <= size <= max(least, min(own, narrowest // 2)))
