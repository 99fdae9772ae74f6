"""vLLM's scheduler, played through for a load: who runs in each step, on how many tokens, and who has to start again.

The rules are those of vLLM 0.32: chunked prefill, requests in work first, a new one only if the whole of what it knows
fits, the youngest loses its cache when blocks run out.
"""

from collections import deque
from dataclasses import dataclass, field

from layerboost.artifacts import Load
from layerboost.errors import DataError
from layerboost.vllm.kv import KVLayout


@dataclass
class Step:
    """One step: `(start, length)` of every chunk of prompt, and the context of every sequence that decodes."""

    chunks: list[tuple[int, int]] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    sampled: int = 0
    running: int = 0
    preempted: int = 0

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.chunks) + len(self.contexts)

    def pairs(self, window: int | None) -> int:
        """Query and key pairs of the chunks in one layer."""
        return sum(_pairs(start, length, window) for start, length in self.chunks)

    def reads(self, window: int | None) -> int:
        """Keys that decoding sequences look at in one layer."""
        return sum(self.contexts) if window is None else sum(min(context, window) for context in self.contexts)


def _pairs(start: int, length: int, window: int | None) -> int:
    """Sum of min(position + 1, window) over the chunk."""
    end = start + length
    if window is None or end <= window:
        return (end * (end + 1) - start * (start + 1)) // 2
    if start >= window:
        return length * window
    return _pairs(start, window - start, None) + (end - window) * window


@dataclass
class _Request:
    known: int  # tokens: the prompt and what was sampled
    computed: int = 0  # tokens whose keys and values are in the cache
    sampled: int = 0
    held: int = 0  # blocks


def schedule(layout: KVLayout, blocks: int, load: Load, max_batched_tokens: int) -> list[Step]:
    """Every step from the first request to the last token.

    Args:
        blocks: of the cache; one of them is vLLM's own.

    Raises:
        DataError: a request does not fit the cache alone.
    """
    _check_fits(layout, blocks, load, max_batched_tokens)
    unsent, free = load.requests, blocks - 1
    waiting: deque[_Request] = deque()
    running: list[_Request] = []
    steps: list[Step] = []
    while unsent or waiting or running:
        while unsent and len(waiting) + len(running) < load.concurrency:
            waiting.append(_Request(known=load.prompt_tokens))
            unsent -= 1
        step, budget = Step(), max_batched_tokens
        planned: list[tuple[_Request, int]] = []
        index = 0
        while index < len(running) and budget:
            request = running[index]
            new = min(request.known - request.computed, budget)
            needed = layout.blocks(request.computed, request.computed + new) - request.held
            while needed > free:
                loser = running.pop()
                free += loser.held
                loser.held = loser.computed = 0
                waiting.appendleft(loser)
                step.preempted += 1
                if loser is request:
                    break
            if index == len(running):  # it lost its own cache
                break
            request.held += needed
            free -= needed
            budget -= new
            planned.append((request, new))
            index += 1
        while waiting and budget and not step.preempted and len(running) < load.concurrency:
            request = waiting[0]
            new = min(request.known, budget)
            if layout.admission_blocks(request.known, max_batched_tokens) > free or layout.blocks(0, new) > free:
                break
            waiting.popleft()
            running.append(request)
            request.held = layout.blocks(0, new)
            free -= request.held
            budget -= new
            planned.append((request, new))
        _advance(step, planned, running)
        for request in [r for r in running if r.sampled == load.output_tokens]:
            free += request.held
            running.remove(request)
        steps.append(step)
    return steps


def _check_fits(layout: KVLayout, blocks: int, load: Load, max_batched_tokens: int) -> None:
    """Raises DataError if one request alone needs more blocks than there are."""
    tokens = load.prompt_tokens + load.output_tokens
    needed = max(
        layout.blocks(max(0, load.prompt_tokens - max_batched_tokens), tokens),
        layout.admission_blocks(tokens - 1, max_batched_tokens),  # again, with all that it has, if it lost its own
    )
    if needed > blocks - 1:
        raise DataError(
            f"one request of {tokens} tokens needs {needed} blocks of {layout.block_bytes:,} bytes, the cache has "
            f"{blocks - 1}; give it more memory or shorten the request"
        )


def _advance(step: Step, planned: list[tuple[_Request, int]], running: list[_Request]) -> None:
    step.running = len(running)
    for request, new in planned:
        if new == 1:
            step.contexts.append(request.computed + 1)
        else:
            step.chunks.append((request.computed, new))
        request.computed += new
        if request.computed == request.known:
            request.known += 1
            request.sampled += 1
            step.sampled += 1
