"""Many plans of one model, scored against the model itself, with every common beginning computed once.

What a model computes below a layer does not depend on that layer's mixer: plans form a tree, and each of its nodes is
one layer run once. It is exact for any set of plans, costs about half of one pass per plan for plans that change one
layer, and holds one layer's outputs at a time, so that the layers may come from disk one after the other.

B sequences, T tokens, E hidden size, L layers, K scored tokens.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, out_of_memory
from layerboost.layer_plan import LayerPlan, full_plan
from layerboost.measured import Measured, tensor_digest
from layerboost.model.config import family_of
from layerboost.model.families import first_tensor
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.mixers import Sequences as MixedSequences
from layerboost.progress import Advance, unheard
from layerboost.scoring import batch_rows, log_probabilities, scored_hidden, scored_targets, token_scores

T = TypeVar("T")
PerSequence = dict[str, np.ndarray]
Resident = Callable[[int], AbstractContextManager[Any]]  # what holds while a layer, by its number, is worked with
_STREAM_BYTES = 2**30  # hidden states of one layer under all plans that are computed together


@dataclass
class Entry:
    """How a batch enters the layers.

    Attributes:
        hidden: `[B, T, E]`, the first layer's input.
        arguments: per layer, what it gets besides, by position and by name: mask, positions, rotary embedding.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def enter(model: Hybrid, tokens: Tensor) -> Entry:
    """What `[B, T]` tokens are when they reach the layers; no layer runs.

    Raises:
        CheckpointError: the family computes something between its layers, or more than a norm after the last.
    """
    for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):  # families' layers return the one or the other
        entry = _record(model, tokens, wrap)
        if entry is not None:
            return entry
    raise CheckpointError(
        f"{family_of(model.config)} computes something between its layers, or more than a norm after the last"
    )


def _record(model: Hybrid, tokens: Tensor, wrap: Callable[[Tensor], Any]) -> Entry | None:
    inputs: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs.append(hidden)
        arguments.append((args, kwargs))
        return wrap(hidden)

    layers = list(model.decoder_layers)
    try:
        for layer in layers:
            layer.forward = stand_in
        final = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as trouble:
        if out_of_memory(trouble):
            raise
        return None
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
    handed_on = len(inputs) == len(layers) and all(hidden is inputs[0] for hidden in inputs)
    if not handed_on or not torch.allclose(model.final_norm(inputs[0]), final, rtol=0, atol=0, equal_nan=True):
        return None
    return Entry(inputs[0], arguments)


Plans = Sequence[Sequence[LayerPlan]]
Node = tuple[int, LayerPlan]  # the node one layer below, and what this layer gets


def tree(plans: Plans) -> tuple[list[list[Node]], list[int]]:
    """Per layer, its nodes; and every plan's node at the last layer. Reasons make no difference."""
    bare = [tuple(dataclasses.replace(layer, reason=None) for layer in plan) for plan in plans]
    levels: list[list[Node]] = []
    at = [0] * len(bare)
    for index in range(len(bare[0])):
        nodes: dict[Node, int] = {}
        at = [nodes.setdefault((parent, plan[index]), len(nodes)) for parent, plan in zip(at, bare, strict=True)]
        levels.append(list(nodes))
    return levels, at


def count_layers(plans: Plans) -> int:
    """Layers that one batch runs through under all these plans."""
    return sum(map(len, tree(plans)[0]))


def neighbours(plans: Plans, elements: int, room: int | None = None) -> Iterator[list[int]]:
    """Plans by their numbers, those with common beginnings together, as many as memory allows.

    Args:
        elements: of one plan's hidden states.
        room: bytes for one layer's outputs under all of them; its inputs take as much again. None is a gigabyte.
    """
    most = max(1, (_STREAM_BYTES if room is None else room) // (elements * 4))
    order = sorted(range(len(plans)), key=lambda i: [layer.label for layer in plans[i]])
    for start in range(0, len(order), most):
        yield order[start : start + most]


@torch.no_grad()
def finals(
    model: Hybrid,
    batches: Sequence[Tensor],
    plans: Plans,
    *,
    mixers: dict[int, nn.Module] | None = None,
    resident: Resident = nullcontext,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields batch, plan and `[B, T, E]` final hidden states, normed; equal to whole passes under each plan.

    Args:
        batches: `[B, T]` tokens each; a layer is done with all of them before the next.
        mixers: modules with mixers' own parameters, by layer; others get fresh ones.
        resident: what holds while a layer is worked with.
    """
    entries = [enter(model, tokens) for tokens in batches]
    levels, leaves = tree(plans)
    states = [[entry.hidden] for entry in entries]
    for index, nodes in enumerate(levels):
        layer = model.decoder_layers[index]
        with resident(index):
            for b, entry in enumerate(entries):
                found = []
                for parent, plan in nodes:
                    with model.mixed({index: plan}, mixers):
                        args, kwargs = entry.arguments[index]
                        kwargs = kwargs | {"layerboost": MixedSequences()}
                        found.append(first_tensor(layer(states[b][parent], *args, **kwargs)))
                states[b] = found
    for b in range(len(batches)):
        for p, leaf in enumerate(leaves):
            yield b, p, model.final_norm(states[b][leaf])


@dataclass
class Scorer:
    """Scores plans of a model on fixed data, against the untouched model.

    Several processes, started by torchrun or `accelerate launch`, share the plans, and all get the same answer.

    Attributes:
        data: sequences under the name of their kind.
        resident: for models whose layers come from disk: what holds while a layer is worked with. All batches then go
            through a layer together, under as many plans as a quarter of the memory holds.
        kept: what is known is not measured again.
        forwards: passes of all data through the whole model so far, in this process; a node of the tree is 1/L of one.
    """

    model: Hybrid
    data: dict[str, Sequences]
    resident: Resident | None = None
    kept: Measured = field(default_factory=Measured)
    forwards: float = 0.0
    _teacher: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.model.config
        length = max(sequences.tokens.shape[1] for sequences in self.data.values())
        self.rows = batch_rows(length, config.vocab_size, config.hidden_size, 1, self.model.device)
        self.batches = [(kind, batch) for kind, found in self.data.items() for batch in found.batches(self.rows)]
        self.digests = [tensor_digest(batch.tokens, batch.scored) for _, batch in self.batches]
        self.head = LogitsHead(self.model)
        self.tokens = sum(batch.tokens.numel() for _, batch in self.batches)

    def __call__(self, plans: Plans, advance: Advance = unheard) -> list[PerSequence]:
        """Per plan, per-sequence metrics such as `text.kl` and `copy.hit`; `advance` hears of every plan and batch.

        Raises:
            CheckpointError: the model computes values that are not finite.
        """
        return shared(plans, self._score, advance)

    def steps(self, plans: int) -> int:
        """How often `advance` will be called for so many plans of which nothing is known."""
        return plans * len(self.batches)

    def known(self, plans: Plans) -> int:
        """How many of these steps are done."""
        return sum(self._key(n, plan) in self.kept for n in range(len(self.batches)) for plan in plans)

    def _key(self, batch: int, plan: Sequence[LayerPlan]) -> str:
        return self.kept.key(self.digests[batch], [layer.label for layer in plan])

    def _score(self, plans: Plans, advance: Advance) -> list[PerSequence]:
        self._measure(plans, advance)
        parts: list[dict[str, list[np.ndarray]]] = [{} for _ in plans]
        for n, (kind, _) in enumerate(self.batches):
            for plan, found in zip(plans, parts, strict=True):
                for metric, values in self.kept[self._key(n, plan)].items():
                    found.setdefault(f"{kind}.{metric}", []).append(np.array(values))
        return [{name: np.concatenate(p) for name, p in found.items()} for found in parts]

    def _measure(self, plans: Plans, advance: Advance) -> None:
        """What is not known of them."""
        every = list(range(len(self.batches)))
        # reading layers from disk again costs more than holding many hidden states
        groups, room = [[n] for n in every], None
        if self.resident is not None:
            groups, room = [every], _memory(self.model.device) // 8
        for group in groups:
            tokens = sum(self.batches[n][1].tokens.numel() for n in group)
            unknown = [plan for plan in plans if any(self._key(n, plan) not in self.kept for n in group)]
            for some in neighbours(unknown, tokens * self.model.config.hidden_size, room):
                for n, p, scores in self._group(group, [unknown[i] for i in some]):
                    found = scores.per_sequence(self.batches[n][1].scored)
                    self.kept[self._key(n, unknown[some[p]])] = {name: own.tolist() for name, own in found.items()}
                    advance()

    def _group(self, group: list[int], plans: Plans) -> Iterator[tuple[int, int, Any]]:
        unknown = [n for n in group if n not in self._teacher]
        if unknown:
            plans = [full_plan(len(self.model.decoder_layers)), *plans]
        shift = 1 if unknown else 0
        share = sum(self.batches[n][1].tokens.numel() for n in group) / self.tokens
        self.forwards += share * count_layers(plans) / len(self.model.decoder_layers)
        tokens = [self.batches[n][1].tokens for n in group]
        teacher: tuple[int, Tensor] | None = None
        for b, p, final in finals(self.model, tokens, plans, resident=self.resident or nullcontext):
            n = group[b]
            _, batch = self.batches[n]
            hidden = scored_hidden(final, batch.scored.to(final.device))
            if p < shift:
                self._teacher[n] = hidden
                continue
            if teacher is None or teacher[0] != n:
                teacher = n, log_probabilities(self._teacher[n], self.head)
                if not torch.isfinite(teacher[1]).all():
                    raise CheckpointError("the model computes logits that are not finite; check its weights")
            targets = scored_targets(batch).to(final.device)
            yield n, p - shift, token_scores(hidden, self.head, teacher[1], targets)


def shared(plans: Plans, score: Callable[[Plans, Advance], list[T]], advance: Advance = unheard) -> list[T]:
    """What `score` finds for every plan: several processes score every n-th each, and all get the whole answer."""
    rank, world = ranks()
    if world == 1:
        return score(plans, advance)
    mine, at_once = range(rank, len(plans), world), min(world, len(plans))
    own = score([plans[i] for i in mine], lambda steps=1: advance(steps * at_once)) if len(mine) else []
    found = dict(pair for part in gather(list(zip(mine, own, strict=True))) for pair in part)
    return [found[i] for i in range(len(plans))]


def _memory(device: torch.device) -> int:
    """Bytes: of the device, where hidden states are held."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ranks() -> tuple[int, int]:
    """This process's number, and how many there are; with several, they know of one another afterwards."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    from accelerate import PartialState

    # what the first process does alone, such as writing a large result, may take longer than the usual ten minutes
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    return state.process_index, state.num_processes


def part() -> None:
    """Several processes take leave of one another, and know of none afterwards."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather(own: Any) -> list[Any]:
    """Every process's object, in the order of the processes."""
    if ranks()[1] == 1:
        return [own]
    found: list[Any] = [None] * ranks()[1]
    torch.distributed.all_gather_object(found, own)
    return found
