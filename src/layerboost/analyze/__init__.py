"""analyze: how much worse does the model get when one layer's attention is removed, or windowed?

Damage is measured for every layer and every mixer, because they hurt different layers: a layer that cannot lose its
attention is often one that looks only a few tokens back.
"""

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from layerboost.analyze.prefix import Prefix, capture, suffix
from layerboost.artifacts import Candidate, Damage, ModelRecord, Sensitivity, save
from layerboost.data.corpus import open_corpus
from layerboost.data.probes import PROBES
from layerboost.data.samples import TEXT, DataConfig, data_inputs, probe_lengths, samples
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError
from layerboost.layer_plan import LayerPlan
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.model.loading import (
    describe,
    find_model,
    load_original,
    load_tokenizer,
    pick_device,
    read_config,
)
from layerboost.progress import progress, say
from layerboost.provenance import provenance
from layerboost.scoring import (
    batch_rows,
    estimate,
    log_probabilities,
    scored_hidden,
    scored_targets,
    token_scores,
)


class Config(DataConfig):
    """What `analyze` is told.

    Attributes:
        windows: window sizes to try in every layer, in tokens; removal is always tried. None is two sizes that suit the
            model's context: 16 and 64 at 1,024 tokens, 64 and 512 from 8,192.
        texts: sequences of text.
        answers: sequences of each recall probe.
        length: tokens per sequence.
        distance: fewest tokens between an answer and its source; None is half the length.
    """

    windows: list[Annotated[int, Field(ge=1)]] | None = None
    texts: int = Field(32, ge=2)
    answers: int = Field(64, ge=2)
    length: int = Field(256, ge=64)
    distance: int | None = Field(None, ge=1)


def inputs(model: ModelRecord, folder: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {
        "model": model.digest,
        **data_inputs(folder, config),
    }


def run(model: str | Path, config: Config | None = None, *, out: Path | None = None) -> Sensitivity:
    """Measure a model's sensitivity, on the train split alone.

    Args:
        model: folder or hub id of a base model.
        out: where to write `sensitivity.json`.

    Raises:
        CheckpointError: the model cannot be read, or computes values that are not finite.
        DataError: too little text, or a distance within reach of a window.
    """
    config = config or Config()
    folder = find_model(model)
    record = describe(model, folder, read_config(folder))
    device = pick_device(config.device)
    loaded = load_original(folder, dtype=torch.float32 if device == "cpu" else None, device=device)
    tokenizer = load_tokenizer(folder)
    windows = default_windows(record.context) if config.windows is None else config.windows
    candidates = candidates_for(record, windows)
    length, distance = probe_lengths(config.length, config.distance, windows, record.context)
    if length != config.length:
        say(f"probes are {length} tokens long instead of {config.length}, so that no window reaches their answers")
    corpus = open_corpus(config.text)
    data = samples(
        corpus, tokenizer, loaded.config.vocab_size, split="train", texts=config.texts, answers=config.answers,
        length=length, distance=distance, seed=config.seed,
    )  # fmt: skip
    started = time.monotonic()
    scores = {key: _metrics(raw) for key, raw in measure(loaded, data, candidates).items()}
    sensitivity = Sensitivity(
        model=record,
        layers=[
            [
                Candidate(mixer=plan.mixer, window=plan.window, damage=_damage(scores[None], scores[layer, n]))
                for n, plan in enumerate(tried)
            ]
            for layer, tried in enumerate(candidates)
        ],
        baseline=_baseline(scores[None]),
        inputs=inputs(record, folder, config),
        provenance=provenance(
            config=config, length=length, distance=distance, corpus=corpus.name, corpus_digest=corpus.digest,
            seconds=round(time.monotonic() - started, 1),
        ),
    )  # fmt: skip
    if out is not None:
        save(sensitivity, out)
    return sensitivity


def default_windows(context: int) -> list[int]:
    """A narrow and a wide window, in tokens; one where the context is short."""
    return sorted({min(max(context // 64, 16), 64), min(max(context // 16, 16), 512)})


def candidates_for(model: ModelRecord, windows: list[int]) -> list[list[LayerPlan]]:
    """Per layer: removal, and each window that is narrower than what the layer sees anyway."""
    return [
        [LayerPlan(mixer="no_attention")]
        + [
            LayerPlan(mixer="sliding_attention", window=window)
            for window in sorted(set(windows))
            if native is None or window < native
        ]
        for native in model.native_windows
    ]


PerSequence = dict[str, np.ndarray]
Key = tuple[int, int] | None  # layer and candidate; None is the untouched model


def measure(model: Hybrid, data: dict[str, Sequences], candidates: list[list[LayerPlan]]) -> dict[Key, PerSequence]:
    """Per-sequence metrics of the untouched model and of every candidate, such as `text.nll` and `copy.hit`.

    Raises:
        CheckpointError: the model computes values that are not finite.
    """
    config = model.config
    length = next(iter(data.values())).tokens.shape[1]
    rows = batch_rows(length, config.vocab_size, config.hidden_size, len(candidates))
    parts: dict[Key, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    head = LogitsHead(model)
    batches = [(kind, batch) for kind, sequences in data.items() for batch in sequences.batches(rows)]
    with progress("analyze", len(batches) * (1 + sum(map(len, candidates)))) as advance:
        for kind, batch in batches:
            prefix = capture(model, batch.tokens)
            for key, scores in _score(model, head, prefix, batch, candidates):
                for metric, values in scores.per_sequence(batch.scored).items():
                    parts[key][f"{kind}.{metric}"].append(values)
                advance()
    return {key: {name: np.concatenate(p) for name, p in found.items()} for key, found in parts.items()}


def _score(model: Hybrid, head: LogitsHead, prefix: Prefix, batch: Sequences, candidates: list[list[LayerPlan]]) -> Any:
    scored, targets = batch.scored.to(model.device), scored_targets(batch).to(model.device)
    teacher = log_probabilities(scored_hidden(prefix.final, scored), head)
    if not torch.isfinite(teacher).all():
        raise CheckpointError("the model computes logits that are not finite; check its weights")
    yield None, token_scores(scored_hidden(prefix.final, scored), head, teacher, targets)
    for layer, tried in enumerate(candidates):
        for n, plan in enumerate(tried):
            hidden = scored_hidden(suffix(model, prefix, layer, plan), scored)
            yield (layer, n), token_scores(hidden, head, teacher, targets)


def _metrics(raw: PerSequence) -> PerSequence:
    """`text_*` over text, `recall_*` over all probes' answers, and every probe's accuracy under its own name."""
    found = {"text_nll": raw[f"{TEXT}.nll"], "text_kl": raw[f"{TEXT}.kl"]}
    for metric in ("nll", "kl"):
        found[f"recall_{metric}"] = np.concatenate([raw[f"{probe}.{metric}"] for probe in PROBES])
    return found | {probe: raw[f"{probe}.hit"] for probe in PROBES}


def _damage(base: PerSequence, changed: PerSequence) -> dict[str, Damage]:
    """What got worse: KL, growth of the NLL, and accuracy lost."""
    damage = {}
    for metric, values in changed.items():
        if metric.endswith("_kl"):
            worse = values
        elif metric.endswith("_nll"):
            worse = values - base[metric]
        else:
            worse = base[metric] - values
        damage[metric] = _summary(worse)
    return damage


def _baseline(base: PerSequence) -> dict[str, Damage]:
    return {metric: _summary(values) for metric, values in base.items() if not metric.endswith("_kl")}


def _summary(values: np.ndarray) -> Damage:
    if not np.isfinite(values).all():
        raise CheckpointError("the model computes losses that are not finite; check its weights")
    rounded = np.round(values, 6)
    found = estimate(rounded)
    return Damage(mean=found.mean, low=found.low, high=found.high, per_sequence=rounded.tolist())
