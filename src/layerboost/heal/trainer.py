"""LoRA distillation with one set of weights: the teacher without adapter, the student with it and under its plan.

Batch = f(seed, step): a run that was killed goes on to the same bytes on the same machine and versions.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerboost.artifacts import CurvePoint
from layerboost.data.probes import PROBES
from layerboost.data.samples import TEXT
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, TrainingError
from layerboost.heal.checkpoint import load_newest, save_step
from layerboost.heal.losses import chunked_kl, hidden_loss
from layerboost.layer_plan import LayerPlan
from layerboost.model.families import first_tensor
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.mixers import Sequences as MixedSequences
from layerboost.progress import progress
from layerboost.scoring import (
    batch_rows,
    final_hidden,
    log_probabilities,
    scored_hidden,
    scored_targets,
    token_scores,
)

if TYPE_CHECKING:
    from layerboost.heal import Config

# a state is saved when the last is this old, and when saving took less than a twentieth of the time since
_SAVE_SECONDS, _SAVE_SHARE = 15.0, 20
_LOOKS = 8  # points of the curve between start and end


class Healer:
    """Teacher and student in the same memory.

    Args:
        model: the original, every attention in place; adapters are added to it.
        layers: the student's plan.
        mixers: per layer, the module with the mixer's own parameters, if it has some; trained in float32, in place.
    """

    def __init__(
        self, model: Hybrid, layers: list[LayerPlan], config: "Config", mixers: dict[int, nn.Module] | None = None
    ) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.mixers = {i: mixer.float().to(model.device) for i, mixer in (mixers or {}).items()}
        self.learning = [i for i in self.mixers if layers[i].mixer == "linear_attention"]  # those that transfer teaches
        self.changes = {i: plan for i, plan in enumerate(layers) if plan.mixer != "full_attention"}
        torch.manual_seed(config.seed)
        self.peft: Any = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=2 * config.rank,
                use_rslora=False,
                lora_dropout=0.0,
                target_modules=adapted_modules(model, layers),
            ),
        ).eval()  # dropout of the family, if any, would make the teacher another model at every step
        self.head = LogitsHead(model)
        self.adapter = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.mixing = {f"mixer.{i}.{name}": p for i, m in self.mixers.items() for name, p in m.named_parameters()}
        self.parameters = self.adapter | self.mixing

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        with torch.no_grad(), self.peft.disable_adapter():
            yield

    @contextlib.contextmanager
    def student(self) -> Iterator[None]:
        with self.model.mixed(self.changes, self.mixers):
            yield

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states `[N, T, E]`, and the output of every changed layer."""
        found: list[Tensor] = []
        hooks = [
            self.model.decoder_layers[i].register_forward_hook(lambda _, __, output: found.append(first_tensor(output)))
            for i in self.changes
        ]
        try:
            final = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return final, found

    def loss(self, batch: Sequences) -> Tensor:
        tokens, scored = batch.tokens.to(self.model.device), batch.scored.to(self.model.device)
        with self.teacher():
            teacher, teacher_layers = self.hidden(tokens)
        with self.student():
            student, student_layers = self.hidden(tokens)
        kl = chunked_kl(scored_hidden(student, scored), scored_hidden(teacher, scored), self.head)
        if not self.changes or not self.config.hidden_weight:
            return kl
        return kl + self.config.hidden_weight * hidden_loss(student_layers, teacher_layers)

    def transfer_loss(self, batch: Sequences) -> Tensor:
        """How far each linear attention's output is from the softmax attention's on the same inputs, those of the
        teacher: mean over layers of the squared distance, as a share of the teacher's variance.

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
                self.model.base_model(input_ids=batch.tokens.to(self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        with self.peft.disable_adapter(), self.student():
            found = [
                first_tensor(attentions[i](*args, **kwargs, layerboost=MixedSequences()))
                for i, (args, kwargs, _) in seen.items()
            ]
        return hidden_loss([f[None] for f in found], [output[None] for _, _, output in seen.values()])

    def merged(self, dtype: torch.dtype) -> Hybrid:
        """The student as a model of its own; this object is spent afterwards."""
        cast_weights(self.model.cpu(), torch.float32)  # a low-precision merge would swallow small updates
        return cast_weights(self.peft.merge_and_unload(), dtype)


def cast_weights(model: Hybrid, dtype: torch.dtype) -> Hybrid:
    """In place, and parameters alone: rotary frequencies are buffers, and stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def adapted_modules(model: Hybrid, layers: list[LayerPlan]) -> list[str]:
    """Names of every linear in the decoder layers that the student still has."""
    base = model.base_model_prefix
    names = []
    for index, (layer, plan) in enumerate(zip(model.decoder_layers, layers, strict=True)):
        for name, module in layer.named_modules():
            removed = plan.mixer == "no_attention" and name.startswith(model.anatomy.attention)
            if isinstance(module, (nn.Linear, Conv1D)) and not removed:
                names.append(f"{base}.{model.anatomy.layers}.{index}.{name}")
    if not names:
        raise CheckpointError(f"{model.config.model_type} has no linear layers that LoRA adapters could go to")
    return names


def train(
    healer: Healer, rows: Sequences, validation: dict[str, Sequences], steps_folder: Path, inputs: dict[str, str]
) -> tuple[int, list[CurvePoint]]:
    """All steps, or those that are left of an earlier run; returns the number of steps and the curve.

    Raises:
        TrainingError: loss or gradient is not finite.
        KeyboardInterrupt: asked to stop; the state is saved.
    """
    config = healer.config
    steps = math.ceil(len(rows) / config.batch) if healer.changes else 0
    transfer = round(steps * config.transfer_share) if healer.learning else 0
    tokens_per_row = rows.tokens.shape[1]
    peak = config.learning_rate or default_learning_rate(healer.model.config.hidden_size)
    sinks = [p for name, p in healer.mixing.items() if name.endswith(".sink")]
    others = [p for name, p in healer.mixing.items() if not name.endswith(".sink")]
    rates = ((list(healer.adapter.values()), peak), (others, config.mixer_rate), (sinks, config.sink_rate))
    groups: list[dict[str, Any]] = [{"params": params, "peak": rate} for params, rate in rates if params]
    if sinks:  # a sink at -10 has gradients of 1e-9, which Adam's usual epsilon would swallow
        groups[-1]["eps"] = 1e-16
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    state = load_newest(steps_folder, healer.parameters, optimizer, inputs) or {"step": 0, "curve": []}
    curve = [CurvePoint.model_validate(point) for point in state["curve"]]
    looks = {round(steps * i / _LOOKS) for i in range(_LOOKS + 1)}
    saved, save_cost = time.monotonic(), 0.0

    def save(step: int) -> None:
        nonlocal saved, save_cost
        started = time.monotonic()
        points = [point.model_dump() for point in curve]
        save_step(steps_folder, step, healer.parameters, optimizer, {"curve": points}, inputs)
        saved, save_cost = time.monotonic(), time.monotonic() - started

    if not curve:
        curve.append(look(healer, validation, 0, 0, None))
    with _stop_signals() as stopped, progress("heal", steps, done=state["step"]) as advance:
        for step in range(state["step"], steps):
            aligning = step < transfer
            share = schedule(step, transfer) if aligning else schedule(step - transfer, steps - transfer)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            batch = rows[step * config.batch : (step + 1) * config.batch]
            optimizer.zero_grad(set_to_none=True)
            loss = healer.transfer_loss(batch) if aligning else healer.loss(batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(healer.parameters.values(), 1.0)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise TrainingError(
                    f"loss is not finite at step {step + 1} of {steps}; nothing was published; lower the learning rate "
                    f"(now {peak:g})"
                )
            optimizer.step()
            done = step + 1
            if done in looks:
                tokens = min(done * config.batch, len(rows)) * tokens_per_row
                curve.append(look(healer, validation, done, tokens, loss.item()))
            advance(note=f"loss {loss.item():.3f}  KL {curve[-1].kl:.3f}")
            if stopped() or time.monotonic() - saved > max(_SAVE_SECONDS, _SAVE_SHARE * save_cost):
                save(done)
            if stopped():
                raise KeyboardInterrupt
    return steps, curve


def default_learning_rate(hidden_size: int) -> float:
    """Small models like high rates; one over the width hits what works at 128 and at 4,096."""
    return 0.5 / hidden_size


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to 5 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def look(healer: Healer, validation: dict[str, Sequences], step: int, tokens: int, loss: float | None) -> CurvePoint:
    """Validation KL and NLL on text, and mean recall over probes."""
    model = healer.model
    config = model.config
    found: dict[str, list[np.ndarray]] = {}
    for kind, sequences in validation.items():
        length = sequences.tokens.shape[1]
        for batch in sequences.batches(batch_rows(length, config.vocab_size, config.hidden_size, 1)):
            scored, targets = batch.scored.to(model.device), scored_targets(batch).to(model.device)
            with healer.teacher():
                teacher = log_probabilities(scored_hidden(final_hidden(model, batch.tokens), scored), healer.head)
            with healer.student():
                student = scored_hidden(final_hidden(model, batch.tokens), scored)
            for metric, values in token_scores(student, healer.head, teacher, targets).per_sequence(scored).items():
                found.setdefault(f"{kind}.{metric}", []).append(values)
    mean = {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}
    if not math.isfinite(mean[f"{TEXT}.kl"]):
        raise TrainingError(f"validation loss is not finite at step {step}; nothing was published")
    recall = sum(mean[f"{probe}.hit"] for probe in PROBES) / len(PROBES)
    return CurvePoint(
        step=step, tokens=tokens, loss=loss, kl=mean[f"{TEXT}.kl"], nll=mean[f"{TEXT}.nll"], recall=recall
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second one acts at once."""
    asked = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
