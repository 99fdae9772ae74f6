"""heal: distil the original model into the hybrid, with LoRA, in the memory of one model."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from layerboost.artifacts import Healing, check_output_folder, lock, to_json, token_count
from layerboost.data.corpus import open_corpus
from layerboost.data.samples import DataConfig, data_inputs, probe_lengths, samples, training_rows
from layerboost.errors import CheckpointError, DataError
from layerboost.heal.trainer import Healer, cast_weights, default_learning_rate, train
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
from layerboost.progress import say
from layerboost.provenance import base_provenance, provenance


class Config(DataConfig):
    """What `heal` is told.

    Attributes:
        tokens: training tokens in all; `200k` and `10M` are understood.
        length: tokens per training sequence, at most the model's context.
        batch: sequences per step.
        rank: of the LoRA adapters, on every linear of the decoder layers that is left.
        learning_rate: peak; None is 0.5 / hidden size.
        hidden_weight: of the hidden-state loss beside the KL.
        mixer_rate: peak learning rate of linear attention's own parameters.
        sink_rate: peak learning rate of sinks, which have a long way to go.
        transfer_share: share of the tokens that linear attention first learns its softmax attention's outputs on.
        probe_share: share of the sequences that are recall probes.
        texts, answers: validation sequences of text, and of each probe.
    """

    tokens: Annotated[int, BeforeValidator(token_count), Field(ge=1)] = 1_000_000
    length: int = Field(512, ge=64)
    batch: int = Field(4, ge=1)
    rank: int = Field(32, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    hidden_weight: float = Field(5.0, ge=0)
    mixer_rate: float = Field(1e-2, gt=0)
    sink_rate: float = Field(0.1, gt=0)
    transfer_share: float = Field(0.2, ge=0, lt=1)
    probe_share: float = Field(0.4, ge=0, le=1)
    texts: int = Field(16, ge=2)
    answers: int = Field(32, ge=2)


def inputs(hybrid: Path, teacher: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {
        "hybrid": digest(hybrid),
        "model": digest(teacher),
        **data_inputs(teacher, config),
    }


def run(
    hybrid: str | Path,
    teacher: str | Path,
    config: Config | None = None,
    *,
    out: Path,
    steps_folder: Path | None = None,
) -> Healing:
    """Heal a converted hybrid and write the merged result to `out`. The same call after a kill goes on where it was.

    Args:
        hybrid: what `convert` wrote.
        teacher: the original model it was converted from.
        steps_folder: where states to go on from are kept meanwhile; beside `out` by default.

    Raises:
        CheckpointError: a model cannot be read, or the hybrid was not converted from this teacher.
        DataError: too little data.
        TrainingError: loss or weights are not finite; nothing is published.
        KeyboardInterrupt: SIGINT or SIGTERM; the state is saved.
    """
    config = config or Config()
    check_output_folder(out)
    student_folder, folder = find_model(hybrid), find_model(teacher)
    student_config, base_config = read_config(student_folder), read_config(folder)
    layers = plan_of(student_config, student_folder)
    model = load_original(folder)
    mixers = check_same_weights(student_folder, layers, model, folder)
    dtype = model.dtype
    device = pick_device(config.device)
    if device == "cpu":
        cast_weights(model, torch.float32)
    model = model.to(device)
    made_from = inputs(student_folder, folder, config)
    steps_folder = steps_folder or out.with_name(f"{out.name}-steps")
    rows, validation = _data(model, load_tokenizer(folder), layers, config)
    with lock(steps_folder):
        healer = Healer(model, layers, config, mixers)
        steps, curve = train(healer, rows, validation, steps_folder, made_from)
        if not healer.changes:
            say("the plan keeps every attention, so there is nothing to heal")
        trained = sum(p.numel() for p in healer.parameters.values())
        healing = Healing(
            tokens=rows.tokens.numel() if steps else 0,
            steps=steps,
            trained_parameters=trained,
            curve=curve,
            inputs=made_from,
            provenance=provenance(
                config, learning_rate=config.learning_rate or default_learning_rate(base_config.hidden_size)
            ),
        )
        healed = healer.merged(dtype).cpu()
        origin = base_provenance(describe(teacher, folder, base_config))
        healed.convert(
            layers,
            origin | {"healing": {"tokens": healing.tokens, "settings": made_from["settings"]}},
            {i: mixer.to(device="cpu", dtype=dtype) for i, mixer in healer.mixers.items()},
        )
        what = f"converted, and healed with {healing.tokens:,} tokens of distillation"
        save_hybrid(
            healed, out, original=folder, inputs=made_from, what=what, extra_files={"healing.json": to_json(healing)}
        )
    shutil.rmtree(steps_folder, ignore_errors=True)
    best = min(point.kl for point in curve)
    if curve[-1].kl > 1.1 * best:
        say(
            f"validation KL ends at {curve[-1].kl:.3f}, it was {best:.3f} on the way: fewer tokens, a lower "
            "learning_rate or more text may do better"
        )
    return healing


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


def _data(model: Hybrid, tokenizer: Any, layers: list[LayerPlan], config: Config) -> Any:
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    length = min(config.length, context)
    rows = config.tokens // length
    if not rows:
        raise DataError(f"{config.tokens} tokens are less than one sequence of {length}; give more tokens")
    corpus = open_corpus(config.text)
    training = training_rows(
        corpus, tokenizer, vocabulary, rows=rows, length=length, probe_share=config.probe_share, seed=config.seed
    )
    windows = [plan.window for plan in layers if plan.window is not None]
    probe_length, distance = probe_lengths(min(256, length), None, windows, context)
    validation = samples(
        corpus, tokenizer, vocabulary, split="validation", texts=config.texts, answers=config.answers,
        length=probe_length, distance=distance, seed=config.seed,
    )  # fmt: skip
    return training, validation
