"""The gates planner: every layer mixes its candidates by a softmax over gates, and all gates are learned together.

Weights stay as they are, and the model itself is the teacher. The gates see how replacements hurt together, which
measuring one at a time does not, for the price of a short training of a few numbers per layer.

B rows of a batch, T tokens, K scored tokens, E hidden size, V vocabulary, L layers, C candidates of a layer; gates have
1 + C, the first keeps full attention.

Sources: arXiv 1806.09055 (DARTS, a softmax over operations), 2204.00408 (CoFi: a Lagrangian that meets a
target cost, the target approached step by step).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerboost.data.samples import TEXT
from layerboost.data.sequences import Sequences
from layerboost.errors import PlanError, TrainingError
from layerboost.layer_plan import LayerPlan
from layerboost.model.families import Anatomy
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.mixers import NoAttention, apply_mixer
from layerboost.model.mixers import Sequences as MixedSequences
from layerboost.progress import Advance, unheard
from layerboost.scoring import batch_rows, kl_divergence, log_probabilities, scored_hidden

_KEEP_START = 2.0  # logit of keeping at the start, the others are 0: near the teacher, yet every candidate is heard
_PRICE_RATE = 0.5  # nats per share of KV that a share above the target adds to its price, each step
_ENTROPY = 0.1  # nats of loss per nat of a layer's entropy, at the end


class GatedAttention(nn.Module):
    """Stands where an attention was: what each candidate would add to the residual stream, mixed by `gates` `[1 + C]`.

    Norms that a family has after its attention are applied to each candidate on its own: they would undo a gate that
    scales what goes into them.
    """

    def __init__(self, layer: Any, index: int, candidates: list[LayerPlan], anatomy: Anatomy) -> None:
        super().__init__()
        self.own = layer._modules[anatomy.attention]
        self.mixed = nn.ModuleList(_candidate(layer, index, plan, anatomy) for plan in candidates)
        self.after = nn.Sequential(*(layer._modules[norm] for norm in anatomy.after))
        self.gates = torch.ones(())

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """`[B, T, E]` to the same."""
        total = self.gates[0] * self.after(self.own(*args, **kwargs)[0])
        for gate, attention in zip(self.gates[1:], self.mixed, strict=True):
            if not isinstance(attention, NoAttention):
                output = attention(*args, **kwargs, layerboost=MixedSequences())[0]
                total = total + gate * self.after(output)
        return total, None


def _candidate(layer: Any, index: int, plan: LayerPlan, anatomy: Anatomy) -> nn.Module:
    """The layer's attention under a plan, as a module beside the original that shares its weights."""
    own = _shallow(layer)
    own._modules[anatomy.attention] = _shallow(layer._modules[anatomy.attention])
    apply_mixer(own, index, plan, anatomy)
    return own._modules[anatomy.attention]


def _shallow(module: Any) -> Any:
    clone = copy.copy(module)
    clone.__dict__ = vars(module) | {"_modules": dict(module._modules)}
    return clone


@contextmanager
def gated(model: Hybrid, candidates: list[list[LayerPlan]]) -> Iterator[list[GatedAttention]]:
    """The model with every layer gated and all weights frozen, for as long as the context lasts; padding is not known.

    Yields:
        per layer, the module whose `gates` are to be set before a forward pass.
    """
    layers, anatomy = model.decoder_layers, model.anatomy
    children = [dict(layer._modules) for layer in layers]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        made = []
        for index, (layer, own) in enumerate(zip(layers, candidates, strict=True)):
            made.append(GatedAttention(layer, index, own, anatomy))
            layer._modules |= {anatomy.attention: made[-1]} | {norm: nn.Identity() for norm in anatomy.after}
        model.requires_grad_(False)
        yield made
    finally:
        for layer, own_children in zip(layers, children, strict=True):
            layer._modules.clear()
            layer._modules.update(own_children)
        for parameter in learning:
            parameter.requires_grad_(True)


def learn_gates(
    model: Hybrid,
    data: dict[str, Sequences],
    candidates: list[list[LayerPlan]],
    shares: list[list[float]],
    target: float,
    weights: dict[str, float],
    *,
    steps: int,
    batch: int,
    learning_rate: float = 0.1,
    seed: int,
    advance: Advance = unheard,
) -> tuple[list[list[float]], int]:
    """Gates that stay close to the model while their expected cost comes down to `target`.

    The loss is KL(teacher || gated student) in nats per scored token: over text by the sum of the weights of `text_*`,
    over rows of all other kinds by that of all others. A price per share of KV rises as long as the expected cost is
    above the target, which comes down from 1 over the first half of the steps; over the second half the gates' entropy
    is made ever dearer, so that they end near one candidate per layer.

    Args:
        model: the original, every attention in place.
        data: sequences by kind; their teacher's final hidden states `[K, E]` are kept.
        candidates: per layer, what may take the place of its attention.
        shares: per layer, `[1 + C]` shares of the base model's KV bytes, keeping first.
        target: share of the base model's KV bytes.
        weights: of the damages that are minimised.
        batch: rows of text, and of the other kinds together, per step.
        learning_rate: of Adam, on the logits.

    Returns:
        Per layer, probabilities `[1 + C]`, the mean over all steps: they tell by how early and how surely a layer gave
        in, which is what rounding needs, while the last ones are all near 0 or 1 and swing with the price. And how many
        tokens the student saw.

    Raises:
        PlanError: no data of a kind that has a weight.
        TrainingError: the loss is not finite.
    """
    head = LogitsHead(model)
    groups = [(weight, _rows(model, data, is_text)) for is_text, weight in _group_weights(weights, data).items()]
    costs = [torch.tensor(own, device=model.device) for own in shares]
    logits = [_start(own).requires_grad_() for own in costs]
    optimizer = torch.optim.Adam(logits, lr=learning_rate, betas=(0.9, 0.95))
    draw = torch.Generator().manual_seed(seed)
    price, tokens = 0.0, 0
    total = [torch.zeros_like(own) for own in costs]
    with gated(model, candidates) as layers:
        for step in range(steps):
            done = (step + 1) / steps
            gates = set_gates(layers, logits)
            kl = torch.zeros((), device=model.device)
            for weight, rows in groups:
                drawn = [rows[i] for i in torch.randperm(len(rows), generator=draw)[:batch].tolist()]
                kl = kl + weight * divergence(model, head, drawn)
                tokens += sum(row.numel() for row, _, _ in drawn)
            cost = torch.stack([(g * c).sum() for g, c in zip(gates, costs, strict=True)]).sum()
            entropy = torch.stack([torch.special.entr(g).sum() for g in gates]).sum()
            loss = kl + price * cost + _ENTROPY * max(0.0, 2 * done - 1) * entropy
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"loss of the gates is not finite at step {step + 1} of {steps}; lower their learning rate (now "
                    f"{learning_rate:g})"
                )
            total = [t + g.detach() for t, g in zip(total, gates, strict=True)]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            allowed = 1 - (1 - target) * min(1.0, 2 * done)
            price = max(0.0, price + _PRICE_RATE * (cost.item() - allowed))
            advance(note=f"KL {kl.item():.3f}  cost {cost.item():.2f} of {target:.2f}")
    return [(own / steps).tolist() for own in total], tokens


def _start(like: Tensor) -> Tensor:
    start = torch.zeros_like(like)
    start[0] = _KEEP_START
    return start


def set_gates(layers: Sequence[GatedAttention], logits: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gates, per layer `[1 + C]`."""
    gates = [own.softmax(-1) for own in logits]
    for layer, own in zip(layers, gates, strict=True):
        layer.gates = own
    return gates


def _group_weights(weights: dict[str, float], data: dict[str, Sequences]) -> dict[bool, float]:
    """What text (True) and all other kinds together (False) weigh, if they do."""
    found: dict[bool, float] = {}
    for metric, weight in weights.items():
        if weight:
            found[metric.startswith(TEXT)] = found.get(metric.startswith(TEXT), 0.0) + weight
    missing = set(found) - {kind == TEXT for kind in data}
    if missing or not found:
        raise PlanError(
            f"gates need a weight, and data for it: weights are of {', '.join(weights) or 'nothing'}, data is "
            f"{', '.join(data) or 'nothing'}"
        )
    return found


Row = tuple[Tensor, Tensor, Tensor]  # tokens [T], scored [T], the teacher's final hidden states [K, E]


def _rows(model: Hybrid, data: dict[str, Sequences], is_text: bool) -> list[Row]:
    """All rows of text, or all others, with what the untouched model makes of them."""
    rows: list[Row] = []
    for kind, sequences in data.items():
        if (kind == TEXT) == is_text:
            length = sequences.tokens.shape[1]
            for part in sequences.batches(batch_rows(length, model.config.vocab_size, model.config.hidden_size, 1)):
                with torch.no_grad():
                    teacher = hidden(model, list(zip(part.tokens, part.scored, strict=True)))
                rows += zip(part.tokens, part.scored, teacher, strict=True)
    return rows


def hidden(model: Hybrid, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Per row of tokens and scored `[T]`, its final hidden states `[K, E]`; rows of one length go together."""
    found: dict[int, Tensor] = {}
    for length in {len(tokens) for tokens, _ in rows}:
        own = [i for i, (tokens, _) in enumerate(rows) if len(tokens) == length]
        together = torch.stack([rows[i][0] for i in own]).to(model.device)
        final = model.base_model(input_ids=together, use_cache=False).last_hidden_state
        for i, states in zip(own, final, strict=True):
            found[i] = scored_hidden(states[None], rows[i][1][None].to(model.device))
    return [found[i] for i in range(len(rows))]


def divergence(model: Hybrid, head: LogitsHead, rows: Sequence[Row]) -> Tensor:
    """Mean over rows of KL(teacher || student) per scored token, in nats.

    Logits `[K, V]` are there for one row at a time, and are computed again in the backward pass.
    """
    students = hidden(model, [(tokens, scored) for tokens, scored, _ in rows])
    found = [
        checkpoint(_kl, student, teacher, head, use_reentrant=False)
        for student, (_, _, teacher) in zip(students, rows, strict=True)
    ]
    return torch.stack(found).mean()


def _kl(student: Tensor, teacher: Tensor, head: LogitsHead) -> Tensor:
    return kl_divergence(log_probabilities(teacher, head), log_probabilities(student, head)).mean()


def gate_losses(gates: Sequence[Sequence[float]]) -> list[list[float]]:
    """Per layer and candidate, the log-odds of keeping against it, as losses for the knapsack beside 0 for keeping.

    The least sum under a budget is then the likeliest plan that meets it: per layer, these differ from -log g by the
    same for all choices. A candidate that is likelier than keeping has a negative loss.
    """
    tiny = 1e-30  # of a gate that closed altogether
    return [[math.log(max(own[0], tiny)) - math.log(max(g, tiny)) for g in own[1:]] for own in gates]
