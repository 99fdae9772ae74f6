"""heal: distil the original model into the hybrid, in the memory of one model."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from transformers import PreTrainedConfig

from layerboost.artifacts import (
    HEALING,
    Healing,
    Tokens,
    check_output_folder,
    lock,
    recorded_inputs,
    text_digest,
    to_json,
)
from layerboost.data.corpus import open_corpus
from layerboost.data.samples import (
    DataConfig,
    Seed,
    data_inputs,
    probe_lengths,
    samples,
    sequence_length,
    training_rows,
)
from layerboost.data.sources import Source, cache_folder, sources_digest
from layerboost.errors import CheckpointError, DataError, UsageError
from layerboost.heal.checkpoint import clear_steps
from layerboost.heal.losses import LossName
from layerboost.heal.sharding import quantize, shard
from layerboost.heal.signals import rows_digest, signals
from layerboost.heal.student import Healer, merge
from layerboost.heal.targets import check_modules, check_target
from layerboost.heal.training import Outcome, Rows, Validation, default_learning_rate, train
from layerboost.layer_plan import LayerPlan
from layerboost.model.hybrid import Hybrid
from layerboost.model.loading import (
    describe,
    digest,
    find_model,
    load_model,
    load_original,
    load_tokenizer,
    pick_device,
    plan_of,
    read_config,
)
from layerboost.model.mixers import MIXER
from layerboost.model.saving import save_hybrid
from layerboost.passes import gather, ranks
from layerboost.progress import say
from layerboost.provenance import base_provenance, provenance
from layerboost.scoring import generate

DEFAULT_LENGTH = 512
_FEWEST_STEPS = 32  # that longer sequences have to leave
_BLOCK = 8  # rows that stay together in another order, so that sources stay evenly mixed
_FROM_SIGNALS = {"forward_kl", "cross_entropy"}
# places, what has a digest of its own, and what a healing that was stopped may go on with otherwise
_NO_SETTINGS = {
    "text", "device", "signals", "signals_from", "data", "micro_batch", "gradient_checkpointing", "shard",
    "max_skipped",
}  # fmt: skip


class Config(DataConfig):
    """What `heal` is told.

    Attributes:
        tokens: training tokens in all; `200k` and `10M` are understood.
        length: tokens per training sequence, at most the model's context. None is 512, or twice the plan's widest
            window where that is more and leaves 32 steps: what a window hides is learned from longer sequences.
        batch: sequences per step.
        micro_batch: sequences per pass; None is as many as memory takes, beginning with all of a step.
        losses: weight of every loss that counts.
        train: `lora`, adapters; `full`, the weights themselves, kept beside the original's in float32.
        rank: of the adapters.
        targets: which linear modules, by the role of their layer, the part of it, and their own name.
        norms: train the norms of those layers as well.
        learning_rate: peak; None is 0.5 / hidden size for adapters and 0.125 / hidden size for weights.
        mixer_rate: peak learning rate of linear attention's own parameters.
        sink_rate: peak learning rate of sinks, which have a long way to go.
        schedule, warmup: of the rates, after `warmup` of the steps.
        clip: longest gradient, over all that is trained.
        transfer_share: share of the tokens that linear attention first learns its softmax attention's outputs on.
        probe_share: share of the sequences that are recall probes.
        data: sources and their weights, instead of `text` and `probe_share`.
        data_seed: which sequences; None is `seed`, which else decides their order and how adapters start.
        texts, answers: validation sequences of text, and of each probe.
        patience: stop when so many looks in a row brought nothing; 0 is never.
        max_skipped: steps that may be left out because loss or gradient is not finite.
        gradient_checkpointing: keep layers' inputs alone, and run them again in the backward pass.
        signals: folder where the teacher's likeliest tokens are kept; it is written once, and read by other healings.
        signals_from: address of a vLLM server that serves the original, which is asked for them instead of it here.
        top_k: how many per token.
        shard: spread the frozen weights over all processes (FSDP2).
        quantize: hold the frozen weights in 8 or 4 bits; teacher and student both see them so.
    """

    tokens: Tokens = 1_000_000
    length: int | None = Field(None, ge=64)
    batch: int = Field(4, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    losses: dict[LossName, Annotated[float, Field(ge=0)]] = Field({"forward_kl": 1.0, "hidden": 20.0})
    train: Literal["lora", "full"] = "lora"
    rank: int = Field(32, ge=1)
    targets: list[Annotated[str, AfterValidator(check_target)]] = Field(["kept", "changed", "removed"], min_length=1)
    norms: bool = False
    learning_rate: float | None = Field(None, gt=0)
    mixer_rate: float = Field(1e-2, gt=0)
    sink_rate: float = Field(0.1, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    transfer_share: float = Field(0.2, ge=0, lt=1)
    probe_share: float = Field(0.4, ge=0, le=1)
    data: list[Source] | None = Field(None, min_length=1)
    data_seed: Seed | None = None
    texts: int = Field(16, ge=2)
    answers: int = Field(32, ge=2)
    patience: int = Field(0, ge=0)
    max_skipped: int = Field(10, ge=0)
    gradient_checkpointing: bool = False
    signals: Path | None = None
    signals_from: str | None = None
    top_k: int = Field(32, ge=1)
    shard: bool = False
    quantize: Literal["int8", "int4"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        asked = {name for name, weight in self.losses.items() if weight}
        if not asked:
            raise ValueError("losses: at least one needs a weight above 0")
        if self.signals is not None and asked - _FROM_SIGNALS:
            raise ValueError(
                f"signals hold what the teacher's logits were, which {', '.join(sorted(asked - _FROM_SIGNALS))} cannot "
                "be computed from; set losses={forward_kl: 1}, or leave signals out"
            )
        if self.signals_from is not None and self.signals is None:
            raise ValueError("signals_from names the server that signals are written from; set signals to a folder too")
        if self.shard and (self.train == "full" or self.norms):
            raise ValueError("shard spreads frozen weights, and train=full and norms=true train them; set shard=false")
        if self.shard and self.quantize is not None:
            raise ValueError(
                "shard spreads whole weights (torchao's cannot be cut by FSDP2); leave quantize or shard out"
            )
        return self


def inputs(hybrid: Path, teacher: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {"hybrid": digest(hybrid), "model": digest(teacher), **data_and_settings(teacher, config)}


def data_and_settings(teacher: Path, config: Config) -> dict[str, str]:
    """Digests of all but the weights that decides what comes out."""
    found = data_inputs(teacher, config)
    settings = config.model_dump(mode="json", exclude=_NO_SETTINGS)
    kept = {"signals": config.signals is not None, "served": config.signals_from is not None}
    found["settings"] = text_digest(settings | kept)
    return found | ({"data": sources_digest(config.data)} if config.data else {})


def check(config: Config, model: PreTrainedConfig) -> None:
    """Raises for settings that do not fit a model, whatever the plan; neither weights nor data are looked at.

    Raises:
        DataError: a length beyond the context, or too few tokens for one sequence.
        UsageError: a target or top_k that the model does not have.
    """
    sequences(config, model.max_position_embeddings, [])
    check_modules(model, config.targets)
    if config.signals is not None and config.top_k > model.vocab_size:
        raise UsageError(f"top_k {config.top_k} is more than the vocabulary of {model.vocab_size}")


def sequences(config: Config, context: int, windows: Sequence[int]) -> tuple[int, int]:
    """Tokens of a sequence, and how many sequences, for a model's context and a plan's windows.

    Raises:
        DataError: a length beyond the context, or too few tokens for one sequence.
    """
    if config.length is None:
        most = config.tokens // (_FEWEST_STEPS * config.batch)
        length = min(max(DEFAULT_LENGTH, min(2 * max(windows, default=0), most)), context)
    else:
        length = sequence_length(config, context)
    if config.tokens < length:
        raise DataError(f"{config.tokens} tokens are less than one sequence of {length}; give more tokens")
    return length, config.tokens // length


def run(
    hybrid: str | Path,
    teacher: str | Path,
    config: Config | None = None,
    *,
    out: Path,
    steps_folder: Path | None = None,
    compared_windows: Sequence[int] = (),
) -> Healing:
    """Heal a converted hybrid and write the merged result to `out`. The same call after a kill goes on where it was.

    Several processes, started by torchrun or `accelerate launch`, share the work; the first writes.

    Args:
        hybrid: what `convert` wrote.
        teacher: the original model it was converted from.
        steps_folder: where states to go on from are kept meanwhile; beside `out` by default.
        compared_windows: of other plans, whose recovery this one's is compared with: validation asks beyond these too.

    Raises:
        CheckpointError: a model cannot be read, or the hybrid was not converted from this teacher.
        UsageError: losses, targets or devices that do not fit the model, the plan or the machine; something else than
            a healed model stands in the place.
        DataError: too little data.
        TrainingError: loss or weights are not finite; nothing is published.
        EnvironmentTrouble: memory or disk run out; the states saved so far are intact.
        KeyboardInterrupt: SIGINT or SIGTERM; the state is saved.
    """
    config = config or Config()
    out = out.absolute()
    student_folder, folder = find_model(hybrid), find_model(teacher)
    if out.resolve() in (student_folder.resolve(), folder.resolve()):
        raise UsageError(f"{out} is what is read; name another --out")
    check_output_folder(out)
    if recorded_inputs(out, damaged=True) is not None and not (out / HEALING).exists():
        raise UsageError(f"{out} is no healed model, and would be replaced; name another --out, or remove it")
    base_config = read_config(folder)
    check(config, base_config)
    layers = plan_of(read_config(student_folder), student_folder)
    _tell_idle(config)
    steps_folder = steps_folder or out.with_name(f"{out.name}-steps")
    with lock(steps_folder) if ranks()[0] == 0 else contextlib.nullcontext():
        made_from = inputs(student_folder, folder, config)
        healer = _healer(student_folder, folder, layers, config)
        rows, validation = _data(healer, folder, config, made_from["model"], compared_windows)
        # rows may come from a data set that changes, or be written anew
        outcome = train(healer, rows, validation, steps_folder, made_from | {"rows": rows_digest(rows.rows)})
        if not healer.changes:
            say("the plan keeps every attention, so there is nothing to heal")
        healing = Healing(
            tokens=outcome.tokens,
            steps=outcome.steps,
            trained_parameters=sum(p.numel() for p in healer.parameters.values()),
            curve=outcome.recovery.curve,
            published=outcome.recovery.best.step,
            base_nll=validation.base_nll,
            base_recall=validation.base_recall,
            skipped=outcome.skipped,
            alarms=outcome.recovery.alarms,
            inputs=made_from,
            provenance=provenance(
                config,
                learning_rate=config.learning_rate or default_learning_rate(base_config.hidden_size, config.train),
                length=rows.rows.tokens.shape[1],
                processes=ranks()[1],
            ),
        )
        if ranks()[0] == 0:
            origin = base_provenance(describe(teacher, folder, base_config))
            origin |= {"healing": {"tokens": healing.tokens, "settings": made_from["settings"]}}
            _publish(healer, outcome, healing, folder, origin, out)
            clear_steps(steps_folder)
        gather(None)  # nobody leaves before the result is there
    return healing


def _tell_idle(config: Config) -> None:
    """Of settings that nothing looks at beside others."""
    idle = {
        "rank": config.train == "full" and "adapters, and train=full has none",
        "top_k": config.signals is None and "signals, and none are kept",
        "probe_share": config.data is not None and "healings without data, which has shares of its own",
    }
    for key, of in idle.items():
        if of and getattr(config, key) != type(config).model_fields[key].default:
            say(f"{key} has no effect here: it is of {of}")


def _healer(hybrid: Path, folder: Path, layers: list[LayerPlan], config: Config) -> Healer:
    model = load_original(folder)
    mixers = check_same_weights(hybrid, layers, model, folder)
    device = pick_device(config.device)
    if device == "cpu":
        for parameter in model.parameters():  # and not rotary frequencies, which are buffers, and in float32 anyway
            parameter.data = parameter.data.float()
    healer = Healer(model, layers, config, mixers)
    if config.quantize:
        quantize(healer, config.quantize)
    if config.shard:
        shard(healer)  # before anything reaches a device, on which the whole may not fit
    return healer.to(device)


def _publish(
    healer: Healer, outcome: Outcome, healing: Healing, folder: Path, origin: dict[str, Any], out: Path
) -> None:
    """The original's own weights, with what was trained put into them."""
    healed = merge(load_original(folder), outcome.trained, healer.targets)
    for i, mixer in healer.mixers.items():
        stem = f"mixer.{i}."
        own = {n.removeprefix(stem): t for n, t in outcome.trained.items() if n.startswith(stem)}
        mixer.cpu().load_state_dict(own, strict=False)
        mixer.to(healed.dtype)
    healed.convert(healer.layers, origin, healer.mixers)
    what = f"converted, and healed with {healing.tokens:,} tokens of distillation"
    save_hybrid(healed, out, original=folder, inputs=healing.inputs, what=what, extra_files={HEALING: to_json(healing)})


def check_same_weights(
    hybrid: Path, layers: list[LayerPlan], original: Hybrid, source: Path
) -> dict[int, torch.nn.Module]:
    """Per layer, the mixer with parameters of its own.

    Raises:
        CheckpointError: the hybrid's other tensors are not the original's, as `convert` leaves them.
    """
    if len(layers) != len(original.decoder_layers):
        raise CheckpointError(
            f"{hybrid} has {len(layers)} layers, its teacher {source} has {len(original.decoder_layers)}; name the "
            "model it was converted from"
        )
    state, student = original.state_dict(), load_model(hybrid)
    for name, tensor in student.state_dict().items():
        if f".{MIXER}." not in name and (name not in state or not torch.equal(tensor, state[name])):
            raise CheckpointError(
                f"{hybrid}: tensor {name} is not that of the teacher {source}; name the model it was converted from, "
                "and a hybrid that is not healed yet"
            )
    return student.own_mixers()


def _data(
    healer: Healer, folder: Path, config: Config, teacher: str, compared_windows: Sequence[int]
) -> tuple[Rows, Validation]:
    model, tokenizer = healer.model, load_tokenizer(folder)
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    windows = [plan.window for plan in healer.layers if plan.window is not None]
    length, count = sequences(config, context, windows)
    if config.length is None and length > DEFAULT_LENGTH:
        say(f"training sequences are {length} tokens long, so that there is something for the windows to hide")
    if max(windows, default=0) >= length:
        say(
            f"a window of {max(windows)} hides nothing of sequences of {length} tokens, so its layers learn nothing of "
            f"it; choose a length of at least {2 * max(windows)}"
        )
    corpus = open_corpus(config.text)
    seed = config.seed if config.data_seed is None else config.data_seed
    packed = all(plan.mixer != "linear_attention" for plan in healer.layers)  # whose state is of one sequence per row
    draw = partial(
        training_rows, corpus, tokenizer, vocabulary, rows=count, length=length, seed=seed,
        probe_share=config.probe_share, sources=config.data, pack=packed, generate=partial(_write, healer),
        cache=cache_folder(), teacher=f"{teacher} {config.quantize}",
    )  # fmt: skip
    rows = draw() if ranks()[0] == 0 else None
    gather(None)  # what is fetched or generated is fetched once, and kept for the other processes
    rows = draw() if rows is None else rows
    order = torch.arange(count)
    if config.data_seed is not None:
        blocks = order.split(_BLOCK)
        shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))
        order = torch.cat([blocks[i] for i in shuffled])
    kept = None
    if config.signals is not None:
        kept = signals(config.signals, healer, rows, config.top_k, teacher, config.signals_from)
    probe_length, distance = probe_lengths(min(256, length), None, [*windows, *compared_windows], context)
    validation = samples(
        corpus, tokenizer, vocabulary, split="validation", texts=config.texts, answers=config.answers,
        length=probe_length, distance=distance, seed=config.seed,
    )  # fmt: skip
    return Rows(rows, order, kept), Validation(healer, validation)


def _write(healer: Healer, prompts: Tensor, new_tokens: int, seed: int) -> Tensor:
    """What the teacher writes after `[B, P]` prompts, sampled: `[B, P + new_tokens]`."""
    if healer.config.shard:
        raise UsageError(
            "the teacher's own text is written by a whole model in one process; heal once without shard, with the "
            "same tokens, and it is kept"
        )
    torch.manual_seed(seed)
    with healer.teacher():
        return generate(healer.model, prompts, new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0).cpu()
