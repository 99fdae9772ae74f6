"""Teacher and student in one set of weights: what is trained is put in for the student, and taken out for the teacher.

B sequences, T tokens, K scored tokens, E hidden size, G key/value heads of size D.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from layerboost.data.sequences import Sequences
from layerboost.errors import UsageError
from layerboost.heal.losses import LOSSES, chunked, cross_entropy, mixed_logits_loss, relative_error, top_k_kl
from layerboost.heal.targets import Target, find_targets
from layerboost.layer_plan import LayerPlan
from layerboost.model.families import first_tensor
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.mixers import HeadShape
from layerboost.model.mixers import Sequences as MixedSequences
from layerboost.scoring import scored_hidden, scored_targets

if TYPE_CHECKING:
    from layerboost.heal import Config
    from layerboost.heal.signals import Signal

_LORA_SCALE = 2  # of what an adapter adds, whatever its rank


@dataclass(frozen=True)
class Counts:
    """Of a whole step, over all its micro-batches and processes: what its mean is taken over.

    Attributes:
        scored: tokens with a loss on logits.
        real: tokens that are not padding.
    """

    scored: int
    real: int

    @classmethod
    def of(cls, batch: Sequences) -> "Counts":
        return cls(int(batch.scored[:, 1:].sum()), int(_real(batch).sum()))


def _real(batch: Sequences) -> Tensor:
    return torch.ones_like(batch.scored) if batch.positions is None else batch.positions >= 0


@dataclass
class Seen:
    """What losses ask for, of one pass.

    Attributes:
        final: `[B, T, E]` final hidden states.
        layers, attentions: `[B, T, E]` outputs, of changed layers, and of their attentions where they have a mixer.
        values: `[B, T, G * D]` of the last full attention, all key/value heads in a row.
        entry: what the first layer that is not shared is given, and whether layers answer with a tuple.
    """

    final: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    values: Tensor | None = None
    entry: Tensor | None = None
    tuples: bool = False


class Healer:
    """Teacher and student in the same memory.

    Args:
        model: the original, every attention in place; adapters are added to it.
        layers: the student's plan.
        mixers: per layer, the module with the mixer's own parameters, if it has some; trained in float32, in place.

    Attributes:
        adapter, weights, mixing: what is trained, all in float32: LoRA's matrices; whole weights, which stand in for
            the original's; parameters of mixers.
        shared: layers below this one are the same in teacher and student, and run once for both.

    Raises:
        UsageError: losses or targets that this model or plan does not have.
    """

    def __init__(
        self, model: Hybrid, layers: list[LayerPlan], config: "Config", mixers: dict[int, nn.Module] | None = None
    ) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.mixers = {i: mixer.float() for i, mixer in (mixers or {}).items()}
        self.learning = [i for i in self.mixers if layers[i].mixer == "linear_attention"]  # those that transfer teaches
        self.changes = {i: plan for i, plan in enumerate(layers) if plan.mixer != "full_attention"}
        self.targets = find_targets(model, layers, config)
        self.weights = {
            f"weight.{name}": nn.Parameter(getattr(target.module, own).detach().float().clone())
            for target in self.targets
            for own, name in target.whole
        }
        self._places = [(target.module, own) for target in self.targets for own, _ in target.whole]
        model.requires_grad_(False)
        self.peft = self._with_adapters([target.name for target in self.targets if target.adapted])
        model.eval()  # dropout of the family, if any, would make the teacher another model at every step
        self.head = LogitsHead(model)
        trained: list[tuple[str, Tensor]] = [] if self.peft is None else list(self.peft.named_parameters())
        self.adapter = {name: p for name, p in trained if p.requires_grad}
        self.mixing = {f"mixer.{i}.{name}": p for i, m in self.mixers.items() for name, p in m.named_parameters()}
        self.parameters = self.adapter | self.weights | self.mixing
        self.shared = min([*self.changes, *(target.layer for target in self.targets)], default=0)
        self._by_need: dict[str, dict[str, float]] = {
            need: {n: w for n, w in config.losses.items() if w and LOSSES[n].needs == need}
            for need in ("logits", "layers", "attentions", "values")
        }
        self._values_of = self._find_values() if self._by_need["values"] else None
        if self._by_need["attentions"] and all(plan.mixer == "no_attention" for plan in self.changes.values()):
            raise UsageError(
                "losses: attention compares the attentions of changed layers, and this plan leaves none; leave it out"
            )

    def to(self, device: str) -> "Healer":
        """All of it, in place."""
        self.model.to(device)
        for mixer in self.mixers.values():
            mixer.to(device)
        for weight in self.weights.values():
            weight.data = weight.data.to(device)
        return self

    def _with_adapters(self, names: list[str]) -> Any:
        if not names:
            return None
        torch.manual_seed(self.config.seed)
        base = self.model.base_model_prefix
        settings = peft.LoraConfig(
            r=self.config.rank, lora_alpha=_LORA_SCALE * self.config.rank, lora_dropout=0.0,
            target_modules=[f"{base}.{name}" for name in names],
        )  # fmt: skip
        return peft.get_peft_model(self.model, settings)

    def _find_values(self) -> nn.Module:
        kept = [i for i, plan in enumerate(self.layers) if plan.mixer == "full_attention" and i >= self.shared]
        attention = self.model.anatomy.attention
        found = [getattr(getattr(self.model.decoder_layers[i], attention), "v_proj", None) for i in kept]
        if not found or found[-1] is None:
            raise UsageError(
                "losses: values compares the values of the last full attention behind the first changed layer, and "
                f"{'there is none' if not found else 'this family has no v_proj'}; leave that loss out"
            )
        return found[-1]

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """The original, to the bit."""
        with torch.no_grad(), self.peft.disable_adapter() if self.peft else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def student(self, entry: Seen | None = None) -> Iterator[None]:
        """The plan in place, and all that is trained; its backward pass belongs inside too.

        Args:
            entry: of the teacher's pass, to go on from where the two part.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.model.mixed(self.changes, self.mixers))
            stack.enter_context(self._stand_in())
            skipped = 0 if entry is None or entry.entry is None else self.shared
            stack.enter_context(self._entering(entry, skipped))
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                stack.enter_context(self._checkpointed(skipped))
            yield

    @contextlib.contextmanager
    def _stand_in(self) -> Iterator[None]:
        """Trained weights where the frozen ones were, in the dtype of those."""
        saved = [module._parameters[own] for module, own in self._places]
        try:
            for (module, own), frozen, trained in zip(self._places, saved, self.weights.values(), strict=True):
                module._parameters[own] = trained.to(frozen.dtype)  # type: ignore[union-attr, assignment]
            yield
        finally:
            for (module, own), frozen in zip(self._places, saved, strict=True):
                module._parameters[own] = frozen

    @contextlib.contextmanager
    def _entering(self, seen: Seen | None, skipped: int) -> Iterator[None]:
        """Layers below `skipped` hand on what they are given, and the one there is given what the teacher's was."""
        if not skipped or seen is None:
            yield
            return

        def hand_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return (hidden,) if seen.tuples else hidden

        def give(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((seen.entry, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": seen.entry})

        with _forwards(self.model.decoder_layers[:skipped], lambda _: hand_on):
            hook = self.model.decoder_layers[skipped].register_forward_pre_hook(give, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    @contextlib.contextmanager
    def _checkpointed(self, skipped: int) -> Iterator[None]:
        """Layers keep their inputs alone for the backward pass, and run again in it."""
        with _forwards(
            self.model.decoder_layers[skipped:], lambda plain: partial(checkpoint, plain, use_reentrant=False)
        ):
            yield

    def see(self, batch: Sequences) -> Seen:
        """One pass of whatever is in place, and what the losses need of it."""
        seen, base, attention = Seen(), self.model.base_model, self.model.anatomy.attention

        def keep(where: dict[int, Tensor], index: int) -> Callable[..., None]:
            return lambda _, __, output: where.update({index: first_tensor(output)})

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.entry = args[0] if args else kwargs["hidden_states"]

        def keep_values(_: Any, __: Any, output: Tensor) -> None:
            seen.values = output

        hooks = []
        if self.shared and not torch.is_grad_enabled():
            stack = self.model.decoder_layers
            hooks.append(stack[self.shared].register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(stack[0].register_forward_hook(lambda _, __, o: setattr(seen, "tuples", isinstance(o, tuple))))
        for i, plan in self.changes.items():
            layer = self.model.decoder_layers[i]
            if self._by_need["layers"]:
                hooks.append(layer.register_forward_hook(keep(seen.layers, i)))
            if self._by_need["attentions"] and plan.mixer != "no_attention":
                hooks.append(getattr(layer, attention).register_forward_hook(keep(seen.attentions, i)))
        if self._values_of is not None:
            hooks.append(self._values_of.register_forward_hook(keep_values))
        try:
            seen.final = base(**self._inputs(batch), use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _inputs(self, batch: Sequences) -> dict[str, Tensor]:
        """Positions tell packed documents apart; rows of one document each need none, padding comes after it."""
        inputs = {"input_ids": batch.tokens.to(self.model.device)}
        if batch.positions is not None and bool((batch.positions[:, 1:] == 0).any()):
            inputs["position_ids"] = batch.positions.clamp(min=0).to(self.model.device)
        return inputs

    def backward(self, batch: Sequences, counts: Counts, signal: "Signal | None" = None) -> Tensor:
        """Add this micro-batch's part of a step's gradients; returns its part of the step's loss, a scalar.

        Args:
            counts: of the whole step; parts of it sum up to its mean, however it is cut.
            signal: what was kept of the teacher, instead of asking it.
        """
        teacher = None
        if signal is None and any(LOSSES[name].teacher for name, weight in self.config.losses.items() if weight):
            with self.teacher():
                teacher = self.see(batch)
        with self.student(teacher):
            student = self.see(batch)
            loss = self._logits_loss(batch, student, teacher, signal) / max(1, counts.scored)
            if teacher is not None:
                loss = loss + self._inner_loss(batch, student, teacher) / max(1, counts.real)
            loss.backward()
        return loss.detach()

    def _logits_loss(self, batch: Sequences, student: Seen, teacher: Seen | None, signal: "Signal | None") -> Tensor:
        scored, targets = (t.to(self.model.device) for t in (batch.scored, scored_targets(batch)))
        assert student.final is not None
        hidden = scored_hidden(student.final, scored)
        weights = self._by_need["logits"]
        if not weights:
            return hidden[:0].sum()  # zero also where a sum of float16 would not be finite
        if signal is not None:
            ids, kept = signal.ids.to(hidden.device), signal.log_probabilities.to(hidden.device)

            def per_token(found: Tensor, _: Tensor | None, span: slice) -> Tensor:
                total = weights.get("forward_kl", 0.0) * top_k_kl(found, ids[span], kept[span])
                return total + weights.get("cross_entropy", 0.0) * cross_entropy(found, None, targets[span])

            return chunked(hidden, None, self.head, per_token)
        expected = None if teacher is None or teacher.final is None else scored_hidden(teacher.final, scored)
        return mixed_logits_loss(weights, hidden, expected, targets, self.head)

    def _inner_loss(self, batch: Sequences, student: Seen, teacher: Seen) -> Tensor:
        """Weighted sum over tokens that are not padding, mean over layers."""
        real = _real(batch).to(self.model.device)
        total = real.new_zeros((), dtype=torch.float32)
        for need, ours, theirs in (
            ("layers", student.layers, teacher.layers),
            ("attentions", student.attentions, teacher.attentions),
        ):
            for name, weight in self._by_need[need].items():
                for i, found in ours.items():
                    total = total + weight * (LOSSES[name].function(found, theirs[i]) * real).sum() / len(ours)
        for name, weight in self._by_need["values"].items():
            assert student.values is not None
            assert teacher.values is not None
            shape = HeadShape.of(self.model.config)
            heads = [v.unflatten(-1, (shape.groups, -1)).transpose(1, 2) for v in (student.values, teacher.values)]
            seen = self._visible(batch)
            total = total + weight * (LOSSES[name].function(*heads, seen) * real).sum()
        return total

    def _visible(self, batch: Sequences) -> Tensor:
        """`[B or 1, T, T]`: tokens of the same document, padding being one of its own."""
        if batch.positions is None:
            length = batch.tokens.shape[1]
            return torch.ones(1, length, length, dtype=torch.bool, device=self.model.device)
        document = (batch.positions == 0).cumsum(-1).masked_fill(batch.positions < 0, 0).to(self.model.device)
        return document[:, :, None] == document[:, None, :]

    def transfer(self, batch: Sequences, counts: Counts) -> Tensor:
        """As `backward`, for how far each linear attention's output is from the softmax attention's on the same inputs,
        those of the teacher: mean over layers of the relative error.

        Source: arXiv 2410.10254 (LoLCATs) section 3.2, attention transfer.
        """
        seen: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
        name = self.model.anatomy.attention
        attentions = {i: getattr(self.model.decoder_layers[i], name) for i in self.learning}

        def keep(index: int) -> Any:
            return lambda _, args, kwargs, output: seen.update({index: (args, kwargs, first_tensor(output))})

        hooks = [a.register_forward_hook(keep(i), with_kwargs=True) for i, a in attentions.items()]
        try:
            with self.teacher():
                self.model.base_model(**self._inputs(batch), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        real = _real(batch).to(self.model.device)
        off = self.peft.disable_adapter() if self.peft else contextlib.nullcontext()
        total = real.new_zeros((), dtype=torch.float32)
        with off, self.model.mixed(self.changes, self.mixers):
            for i, (args, kwargs, wanted) in seen.items():
                with _whole(self.model.decoder_layers[i]):
                    found = first_tensor(attentions[i](*args, **kwargs, layerboost=MixedSequences()))
                    loss = (relative_error(found, wanted) * real).sum() / len(seen) / max(1, counts.real)
                    loss.backward()
                total += loss.detach()
        return total


@contextlib.contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """A layer that can be used in part: one whose weights are spread over processes is gathered meanwhile."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


@contextlib.contextmanager
def _forwards(modules: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Modules with another `forward`, for as long as the context lasts."""
    modules = list(modules)
    try:
        for module in modules:
            module.forward = change(module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


@torch.no_grad()
def merge(original: Hybrid, trained: dict[str, Tensor], targets: list[Target]) -> Hybrid:
    """Put what was trained into a model's own weights, in place: sums in float32, rounded once to the weights' dtype.

    Args:
        original: the base model, every attention in place.
        trained: `Healer.adapter` and `Healer.weights`.
        targets: `Healer.targets`, whose names are the original's too.
    """
    base = original.base_model
    for target in targets:
        for own, name in target.whole:
            weight = getattr(base.get_submodule(target.name), own)
            weight.copy_(trained[f"weight.{name}"])
        if target.adapted:
            module = base.get_submodule(target.name)
            stem = f"base_model.model.{original.base_model_prefix}.{target.name}"
            down, up = (trained[f"{stem}.lora_{side}.default.weight"].cpu().float() for side in "AB")
            delta = _LORA_SCALE * (up @ down)
            if isinstance(module, Conv1D):
                delta = delta.T
            module.weight.copy_(module.weight.float() + delta)
    return original
