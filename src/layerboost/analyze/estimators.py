"""Cheap estimates of how much a layer's mixer matters, from single passes of the untouched model.

Each compares A, what the attention sub-block adds to the residual stream, with A_c, what it would add under a candidate
on the same inputs; removal adds nothing. A is `scale` times the branch: the attention's output, or where the family has
a norm after it (gemma2, olmo2), that norm's. A gate has to sit behind such a norm, which would undo any scaling.

B sequences, T tokens, E hidden size, H heads, L layers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerboost.artifacts import Cost
from layerboost.cost.work import Workload
from layerboost.data.sequences import Sequences
from layerboost.layer_plan import LayerPlan
from layerboost.model.families import first_tensor
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.mixers import Sequences as MixedSequences
from layerboost.progress import Advance, unheard
from layerboost.scoring import log_probabilities, scored_hidden, scored_targets

ESTIMATOR = Literal["cosine", "taylor", "reconstruction", "attention_mass"]
ESTIMATORS: tuple[ESTIMATOR, ...] = get_args(ESTIMATOR)

Place = tuple[int, int]  # a layer, and which of its candidates
Candidates = Sequence[Sequence[LayerPlan]]
Values = dict[Place, Tensor]  # `[B]` float64, on the CPU


def estimate_layers(
    model: Hybrid,
    sequences: Sequences,
    candidates: list[list[LayerPlan]],
    which: Sequence[str],
    rows: int,
    advance: Advance = unheard,
) -> tuple[dict[str, dict[Place, np.ndarray]], dict[str, Cost]]:
    """Estimates of damage, each by a pass of its own, so that each has its own cost.

    Args:
        model: the original, every attention in place.
        candidates: per layer, the mixers to compare its attention with.
        which: names out of `ESTIMATORS`.
        rows: sequences per batch.
        advance: hears of every estimator and batch.

    Returns:
        Per estimator, per layer and candidate `[N]` float64, one value per sequence, >= 0; and what each one cost.
    """
    found: dict[str, dict[Place, np.ndarray]] = {}
    costs = {}
    for name in which:
        started, estimator = time.monotonic(), ESTIMATORS_BY_NAME[name]
        parts: dict[Place, list[Tensor]] = {place: [] for place, _ in _places(candidates)}
        for batch in sequences.batches(rows):
            for place, values in estimator.values(model, batch, candidates).items():
                parts[place].append(values)
            advance()
        found[name] = {place: torch.cat(own).numpy() for place, own in parts.items()}
        forwards = estimator.passes + (_extra_calls(model, candidates) if estimator.calls_candidates else 0.0)
        seconds = round(time.monotonic() - started, 3)
        costs[name] = Cost(tokens=sequences.tokens.numel(), forwards=forwards, seconds=seconds)
    return found, costs


def _places(candidates: Candidates) -> Iterator[tuple[Place, LayerPlan]]:
    for layer, tried in enumerate(candidates):
        for n, plan in enumerate(tried):
            yield (layer, n), plan


def _extra_calls(model: Hybrid, candidates: Candidates) -> float:
    """Attention calls that candidates add, in forwards: one is the share that its weights have in those that a token
    meets in all layers. Removal needs no call."""
    weights = [(rest[1], attention[1]) for rest, attention in Workload(model.config, model.dtype).layers]
    calls = sum(weights[layer][1] for (layer, _), plan in _places(candidates) if plan.mixer != "no_attention")
    return calls / sum(map(sum, weights))


class _Block:
    """One layer's attention sub-block, as it ran in the untouched model.

    Attributes:
        stream: `[B, T, E]`, the residual stream that it adds to.
        branch: `[B, T, E]`; `scale` times this is A.
    """

    stream: Tensor
    branch: Tensor
    given: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, model: Hybrid, index: int) -> None:
        self.model, self.index, self.layer = model, index, model.decoder_layers[index]
        self.attention, *self.after = (
            self.layer._modules[name] for name in (model.anatomy.attention, *model.anatomy.after)
        )
        self.scale: float = getattr(self.layer, "residual_multiplier", 1.0)  # the granite families

    def watch(self, hooks: ExitStack) -> None:
        def keep_stream(_: Any, args: Any, kwargs: Any) -> None:
            self.stream = args[0] if args else kwargs["hidden_states"]

        def keep_given(_: Any, args: Any, kwargs: Any) -> None:
            self.given = args, kwargs

        def keep_branch(_: Any, __: Any, output: Any) -> None:
            self.branch = first_tensor(output)
            if torch.is_grad_enabled():  # with frozen weights, the first branch is where gradients begin to matter
                self.branch.requires_grad_()

        hooks.enter_context(self.layer.register_forward_pre_hook(keep_stream, with_kwargs=True))
        hooks.enter_context(self.attention.register_forward_pre_hook(keep_given, with_kwargs=True))
        hooks.enter_context([self.attention, *self.after][-1].register_forward_hook(keep_branch))

    @torch.no_grad()
    def under(self, plan: LayerPlan) -> Tensor:
        """`[B, T, E]`: the branch of this candidate on the same inputs."""
        if plan.mixer == "no_attention":
            return torch.zeros_like(self.branch)
        args, kwargs = self.given
        with self.model.mixed({self.index: plan}):
            branch = first_tensor(self.attention(*args, **kwargs, layerboost=MixedSequences()))
            for norm in self.after:
                branch = norm(branch)
        return branch

    def difference(self, plan: LayerPlan) -> Tensor:
        """`[B, T, E]` float32: what this candidate changes in the branch."""
        return self.under(plan).float() - self.branch.detach().float()


def _run(model: Hybrid, batch: Sequences) -> tuple[Tensor, list[_Block]]:
    """`[B, T, E]` final hidden states, and every layer's attention sub-block."""
    blocks = [_Block(model, index) for index in range(len(model.decoder_layers))]
    with ExitStack() as hooks:
        for block in blocks:
            block.watch(hooks)
        final = model.base_model(input_ids=batch.tokens.to(model.device), use_cache=False).last_hidden_state
    return final, blocks


def _double(values: Tensor) -> Tensor:
    return values.cpu().double()  # not every device has float64


@torch.no_grad()
def cosine(model: Hybrid, batch: Sequences, candidates: Candidates) -> Values:
    """1 - cos(x + A, x + A_c) for the residual stream x, mean over tokens; in [0, 2].

    With removal it is 1 - cos(x + A, x), the importance of an attention sub-block in LLM-Drop. Where attention and MLP
    read the same stream (gpt_neox, cohere2), x + A is that stream with the attention's part alone.

    Sources: arXiv 2406.15786 (LLM-Drop), 2403.03853 (ShortGPT) equation 1.
    """
    _, blocks = _run(model, batch)
    found = {}
    for place, plan in _places(candidates):
        block = blocks[place[0]]
        stream = block.stream.float()
        ends = [
            F.normalize(stream + block.scale * branch.float(), dim=-1) for branch in (block.branch, block.under(plan))
        ]
        # of unit vectors; 1 - cos would round to 1e-7
        found[place] = _double((ends[0] - ends[1]).square().sum(-1) / 2).mean(1)
    return found


@torch.no_grad()
def reconstruction(model: Hybrid, batch: Sequences, candidates: Candidates) -> Values:
    """||A - A_c||^2, mean over tokens; in squared units of the residual stream.

    Source: arXiv 2301.00774 (SparseGPT) equation 1, for a whole sub-block in place of one linear layer.
    """
    _, blocks = _run(model, batch)
    return {
        place: _double((blocks[place[0]].scale * blocks[place[0]].difference(plan)).square().sum(-1)).mean(1)
        for place, plan in _places(candidates)
    }


def taylor(model: Hybrid, batch: Sequences, candidates: Candidates) -> Values:
    """|<dNLL/dA, A_c - A>|, the first-order change of a sequence's NLL, in nats per scored token.

    Source: arXiv 2305.11627 (LLM-Pruner) section 3.2, for a gate on the sub-block in place of a group of weights.
    """
    with _frozen(model), torch.enable_grad():
        final, blocks = _run(model, batch)
        # sequences do not see one another: the sum's gradient is each one's own
        gradients = torch.autograd.grad(_nll(model, final, batch).sum(), [block.branch for block in blocks])
    return {
        # the gradient of the branch has the scale in it, so the branch's change stands for that of A
        place: _double((gradients[place[0]].float() * blocks[place[0]].difference(plan)).sum(-1)).sum(1).abs()
        for place, plan in _places(candidates)
    }


def _nll(model: Hybrid, final: Tensor, batch: Sequences) -> Tensor:
    """`[B]`: mean over each sequence's scored tokens."""
    scored = batch.scored.to(final.device)
    log_probs = log_probabilities(scored_hidden(final, scored), LogitsHead(model))
    nll = F.nll_loss(log_probs, scored_targets(batch).to(final.device), reduction="none")
    rows, count = scored[:, 1:].nonzero()[:, 0], scored[:, 1:].sum(1)
    return nll.new_zeros(len(batch)).index_add(0, rows, nll) / count.clamp(min=1)


@contextmanager
def _frozen(model: Hybrid) -> Iterator[None]:
    """No weight gets a gradient, so that no activation is kept for one."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


@torch.no_grad()
def attention_mass(model: Hybrid, batch: Sequences, candidates: Candidates) -> Values:
    """Softmax weight on keys outside the candidate's window, mean over heads and queries; in [0, 1].

    A candidate without softmax counts as window 1: all weight that is not on the query's own token.

    Source: arXiv 2410.13846 (LightTransfer), whose streaming attention also keeps the first tokens; a window does not.
    """
    found: Values = {}

    def reduce(layer: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            weights = output[1].mean(1, dtype=torch.float32)  # `[B, T, T]`; those of all heads go after the hook
            position = torch.arange(weights.shape[-1], device=weights.device)
            age = position[:, None] - position
            for n, plan in enumerate(candidates[layer]):
                found[layer, n] = _double((weights * (age >= (plan.window or 1))).sum(-1)).mean(1)

        return hook

    with _eager(model), ExitStack() as hooks:
        for index, layer in enumerate(model.decoder_layers):
            attention = layer._modules[model.anatomy.attention]
            hooks.enter_context(attention.register_forward_hook(reduce(index)))
        model.base_model(input_ids=batch.tokens.to(model.device), use_cache=False)
    return found


@contextmanager
def _eager(model: Hybrid) -> Iterator[None]:
    """The one attention implementation that tells its weights."""
    usual = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(usual)


@dataclass(frozen=True)
class Estimator:
    """A row of the table.

    Attributes:
        values: of one batch.
        passes: through the whole model, a backward one counted twice.
        calls_candidates: whether every candidate's attention runs as well.
    """

    values: Callable[[Hybrid, Sequences, Candidates], Values]
    passes: float
    calls_candidates: bool


ESTIMATORS_BY_NAME = {
    "cosine": Estimator(cosine, 1, True),
    "taylor": Estimator(taylor, 3, True),
    "reconstruction": Estimator(reconstruction, 1, True),
    "attention_mass": Estimator(attention_mass, 1, False),
}
