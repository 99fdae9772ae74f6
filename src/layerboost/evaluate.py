"""evaluate: how close are the converted and the healed hybrid to the original, on data that nothing else has seen?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from layerboost.artifacts import Completion, Evaluation, Quality, TaskScore, save
from layerboost.data.corpus import open_corpus
from layerboost.data.probes import PROBES
from layerboost.data.samples import TEXT, DataConfig, data_inputs, probe_lengths, samples, sequence_length
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, DataError
from layerboost.layer_plan import LayerPlan
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.loading import (
    check_pair,
    digest,
    find_model,
    load_model,
    load_original,
    load_tokenizer,
    pick_device,
    plan_of,
    read_config,
)
from layerboost.progress import Advance, progress, say, unheard
from layerboost.provenance import provenance
from layerboost.scoring import (
    batch_rows,
    estimate,
    final_hidden,
    generate,
    log_probabilities,
    scored_hidden,
    scored_targets,
    token_scores,
)
from layerboost.tasks import load_tasks, task_files, task_results


class Config(DataConfig):
    """What `evaluate` is told.

    Attributes:
        texts, answers: held-out sequences of text, and of each recall probe.
        length: tokens per sequence.
        distance: fewest tokens between an answer and its source; None is half the length.
        completions: prompts of held-out text that base and hybrid complete greedily.
        new_tokens: length of a completion.
        tasks: lm-eval tasks for all three models; `task_limit` documents of each (None is all of them), `task_batch`
            requests at once, `task_folder` with further task files.
    """

    texts: int = Field(64, ge=2)
    answers: int = Field(200, ge=2)
    length: int = Field(256, ge=64)
    distance: int | None = Field(None, ge=1)
    completions: int = Field(4, ge=0)
    new_tokens: int = Field(32, ge=1)
    tasks: list[str] = Field([])
    task_limit: int | None = Field(None, ge=2)
    task_batch: int = Field(8, ge=1)
    task_folder: Path | None = None


def lengths(config: Config, context: int, windows: Sequence[int]) -> tuple[int, int]:
    """Length of sequences and distance of probes, in tokens.

    Args:
        windows: of the plan, or those that it may get.

    Raises:
        DataError: they do not fit the model, or a window reaches as far as the distance.
    """
    length, distance = probe_lengths(sequence_length(config, context), config.distance, windows, context)
    if config.completions and length // 2 + config.new_tokens > context:
        raise DataError(
            f"completions of {config.new_tokens} new_tokens after {length // 2} do not fit the model's context of "
            f"{context}; ask for fewer new_tokens, or completions=0"
        )
    return length, distance


@dataclass(frozen=True)
class Borrowing:
    """The original under a plan, on the original's own weights: there is such a model only while `model_of` lasts."""

    original: Hybrid
    layers: list[LayerPlan]


@contextmanager
def model_of(student: Any) -> Iterator[Any]:
    """The model that a student is: itself, or the original with the plan applied for as long as the context lasts."""
    if not isinstance(student, Borrowing):
        yield student
        return
    with student.original.mixed(dict(enumerate(student.layers))):
        yield student.original


def inputs(hybrid: Path, against: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {
        "hybrid": digest(hybrid),
        "model": digest(against),
        **data_inputs(against, config),
        **task_files(config.task_folder),
    }


def run(
    hybrid: str | Path, against: str | Path, config: Config | None = None, *, out: Path | None = None
) -> Evaluation:
    """Compare a hybrid with its original, and with the original under the hybrid's plan, which is it without healing.

    Two models are in memory: the last has the original's own weights.

    Raises:
        CheckpointError: a model cannot be read, is not as it was written, or the two do not belong together.
        DataError: too little held-out text, or a task's data are not on this machine.
        UsageError: there is no such task.
        EnvironmentTrouble: tasks are asked for, and lm-eval is not installed.
    """
    config = config or Config()
    hybrid_folder, folder = find_model(hybrid), find_model(against)
    hybrid_config, base_config = read_config(hybrid_folder), read_config(folder)
    layers = plan_of(hybrid_config, hybrid_folder)
    check_pair(hybrid_folder, hybrid_config, folder, base_config)
    windows = [plan.window for plan in layers if plan.window is not None]
    context = base_config.max_position_embeddings
    length, distance = lengths(config, context, windows)
    asked = load_tasks(config.tasks, config.task_folder)
    device = pick_device(config.device)
    dtype = torch.float32 if device == "cpu" else None
    healed = load_model(hybrid_folder, dtype=dtype, device=device)
    base = load_original(folder, dtype=dtype, device=device)
    tokenizer, corpus = load_tokenizer(folder), open_corpus(config.text)
    data = samples(
        corpus, tokenizer, base_config.vocab_size, split="held_out", texts=config.texts, answers=config.answers,
        length=length, distance=distance, seed=config.seed,
    )  # fmt: skip
    students = {"base": base, "converted": Borrowing(base, layers), "healed": healed}
    rows = batch_rows(length, base_config.vocab_size, base_config.hidden_size, 1)
    with progress("evaluate", 3 * sum(-(-len(sequences) // rows) for sequences in data.values())) as advance:
        scores = measure(base, students, data, rows, advance)
    evaluation = Evaluation(
        models={name: _quality(values) for name, values in scores.items()},
        tasks=_tasks(students, load_tokenizer(folder), asked, config),
        completions=_completions(base, healed, data[TEXT], tokenizer, config),
        inputs=inputs(hybrid_folder, folder, config),
        provenance=provenance(
            config, length=length, distance=distance, corpus=corpus.name, corpus_digest=corpus.digest, split="held_out",
            sequences={kind: len(sequences) for kind, sequences in data.items()},
            **({"lm_eval": version("lm_eval")} if asked else {}),
        ),
    )  # fmt: skip
    if out is not None:
        save(evaluation, out)
    return evaluation


def measure(
    base: Any, students: dict[str, Any], data: dict[str, Sequences], rows: int, advance: Advance = unheard
) -> dict[str, dict[str, np.ndarray]]:
    """Every student's per-sequence scores against the base model, such as `text.kl`, over the same sequences.

    Args:
        students: models, or `Borrowing`s of the base.
        rows: sequences per batch.

    Raises:
        CheckpointError: a model computes values that are not finite.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in students}
    base_head = LogitsHead(base)
    heads = {name: base_head if isinstance(s, Borrowing) else LogitsHead(s) for name, s in students.items()}
    for kind, sequences in data.items():
        for batch in sequences.batches(rows):
            scored, targets = batch.scored.to(base.device), scored_targets(batch).to(base.device)
            with torch.no_grad():
                teacher = log_probabilities(scored_hidden(final_hidden(base, batch.tokens), scored), base_head)
            for name, student in students.items():
                with model_of(student) as model:
                    hidden = scored_hidden(final_hidden(model, batch.tokens), scored)
                compared = token_scores(hidden, heads[name], teacher, targets)
                for metric, values in compared.per_sequence(scored).items():
                    found[name].setdefault(f"{kind}.{metric}", []).append(values)
                advance()
    scores = {name: {key: np.concatenate(p) for key, p in parts.items()} for name, parts in found.items()}
    for name, by_metric in scores.items():
        for metric, values in by_metric.items():
            if not np.isfinite(values).all():
                raise CheckpointError(f"{name}: values that are not finite ({metric}); check its weights")
    return scores


def _quality(values: dict[str, np.ndarray]) -> Quality:
    recall = {probe: estimate(values[f"{probe}.hit"]) for probe in PROBES}
    # probes have equally many answers, so the mean over probes is the mean over the rows of all of them together
    recall["mean"] = estimate(np.stack([values[f"{probe}.hit"] for probe in PROBES]).mean(0))
    nll = estimate(values[f"{TEXT}.nll"])
    perplexity = float(np.exp(min(nll.mean, 700.0)))  # infinity has no place in a file
    return Quality(nll=nll, kl=estimate(values[f"{TEXT}.kl"]), perplexity=perplexity, recall=recall)


def _tasks(
    students: dict[str, Any], tokenizer: Any, asked: dict[str, Any], config: Config
) -> dict[str, dict[str, dict[str, TaskScore]]]:
    """Per student, task and metric; what lm-eval finds no number for is said by name."""
    found: dict[str, dict[str, dict[str, TaskScore]]] = {}
    if not asked:
        return found
    with progress("tasks", len(students) * len(asked)) as advance:
        for name, student in students.items():
            with model_of(student) as model:
                found[name] = task_results(
                    model, tokenizer, asked, limit=config.task_limit, batch=config.task_batch, advance=advance
                )
    for name, tasks in found.items():
        for task, metrics in tasks.items():
            for metric in (metric for metric, score in metrics.items() if score.value is None):
                say(f"{name}: {metric} of task {task} is no finite number; tables say `no number`")
    return found


@torch.no_grad()
def _completions(base: Any, hybrid: Any, text: Sequences, tokenizer: Any, config: Config) -> list[Completion]:
    """Greedy completions of the beginnings of held-out text, of both models."""
    prompt_length = text.tokens.shape[1] // 2
    found = []
    for row in text[: config.completions].tokens[:, :prompt_length]:
        written = [_greedy(model, row[None], config.new_tokens) for model in (base, hybrid)]
        same = next((i for i, (a, b) in enumerate(zip(*written, strict=False)) if a != b), min(map(len, written)))
        found.append(
            Completion(
                prompt=tokenizer.decode(row[-48:]), base=tokenizer.decode(written[0]),
                hybrid=tokenizer.decode(written[1]), same_tokens=same, tokens=max(map(len, written)),
            )
        )  # fmt: skip
    return found


def _greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    end = model.generation_config.eos_token_id
    return generate(model, prompt, new_tokens, do_sample=False, eos_token_id=end)[0, prompt.shape[1] :].tolist()
