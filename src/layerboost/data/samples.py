"""What analysis, healing and evaluation look at: text and recall probes of one split, for one tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from layerboost.artifacts import Record, text_digest
from layerboost.data.corpus import Corpus, Split, open_corpus, standard_library
from layerboost.data.probes import PROBES, ProbeMaker, as_pairs, ordinary_tokens, probe_sequences
from layerboost.data.sequences import Sequences, text_sequences, token_stream
from layerboost.errors import DataError
from layerboost.model.loading import tokenizer_digest

TEXT = "text"
_SEEDS = {"train": 11, "validation": 12, "held_out": 13}


class DataConfig(Record):
    """Settings of every verb that looks at data.

    Attributes:
        text: a file or folder of UTF-8 text instead of the built-in corpus.
        seed: of everything that is drawn.
    """

    text: Path | None = None
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def data_inputs(folder: Path, config: DataConfig) -> dict[str, str]:
    """Digests of what decides which tokens a verb looks at, and of all its settings.

    Args:
        folder: of the model whose tokenizer is used.
    """
    return {
        "tokenizer": tokenizer_digest(folder),
        "text": open_corpus(config.text).digest,
        "settings": text_digest(config.model_dump(mode="json", exclude={"text", "device"})),
    }


def samples(
    corpus: Corpus,
    tokenizer: Any,
    vocabulary: int,
    *,
    split: Split,
    texts: int,
    answers: int,
    length: int,
    distance: int,
    seed: int = 0,
) -> dict[str, Sequences]:
    """Text under `text`, and every probe under its name, with one answer at the end of each sequence.

    Args:
        vocabulary: ids the model has embeddings for.
        texts, answers: sequences of text, and sequences of each probe.
        length: tokens per sequence.
        distance: fewest tokens between an answer and its source.

    Raises:
        DataError: the split holds too little text, or the tokenizer does not belong to the model.
    """
    seed = seed * 100 + _SEEDS[split]
    text = text_sequences(corpus.split(split), tokenizer, count=texts, length=length, seed=seed)
    if len(text) < min(texts, 2):
        raise DataError(
            f"text {corpus.name}: its {split} split holds {len(text)} sequences of {length} tokens, at least 2 are "
            "needed; give more text or a shorter length"
        )
    check_vocabulary(text.tokens, vocabulary)
    maker = probe_maker(corpus, tokenizer, vocabulary, split=split, length=length, seed=seed)
    return {TEXT: text} | {
        probe: probe_sequences(maker, probe, count=answers, length=length, distance=distance) for probe in PROBES
    }


def recall_pairs(
    tokenizer: Any,
    vocabulary: int,
    probe: str,
    *,
    count: int,
    length: int = 256,
    distance: int | None = None,
    seed: int = 0,
) -> list[dict[str, list[int]]]:
    """Recall questions as `{"prompt", "answer"}` pairs of token ids, for any tokenizer; text is the built-in corpus.

    Args:
        vocabulary: ids the model has embeddings for.
        probe: a name in `PROBES`.
        length: tokens of prompt and answer together.
        distance: fewest tokens between the answer and its source; None is half the length.
    """
    maker = probe_maker(standard_library(), tokenizer, vocabulary, split="train", length=length, seed=seed)
    return as_pairs(probe_sequences(maker, probe, count=count, length=length, distance=distance or length // 2))


def probe_maker(corpus: Corpus, tokenizer: Any, vocabulary: int, *, split: Split, length: int, seed: int) -> ProbeMaker:
    """Needles are hidden in text of this split alone."""
    hay = token_stream(corpus.split(split), tokenizer, tokens=100 * length, piece=4 * length, seed=seed + 1)
    if len(hay) < length:
        raise DataError(
            f"text {corpus.name}: its {split} split holds {len(hay)} tokens, probes need {length}; give more text or a "
            "shorter length"
        )
    return ProbeMaker(ordinary_tokens(tokenizer, vocabulary), hay, np.random.default_rng(seed + 2))


def training_rows(
    corpus: Corpus, tokenizer: Any, vocabulary: int, *, rows: int, length: int, probe_share: float, seed: int
) -> Sequences:
    """Exactly `rows` sequences of the train split in random order: text, and probes with many questions each.

    Text is repeated, in another order each time, when the split holds less than is asked for.
    """
    asked = round(rows * probe_share)
    parts = [_text_rows(corpus, tokenizer, vocabulary, rows - asked, length, seed)] if rows > asked else []
    if asked:
        maker = probe_maker(corpus, tokenizer, vocabulary, split="train", length=length, seed=seed)
        for i, probe in enumerate(PROBES):
            count = (asked + i) // len(PROBES)
            if count:
                parts.append(probe_sequences(maker, probe, count=count, length=length, distance=None))
    together = Sequences.concatenate(parts)
    return together[torch.from_numpy(np.random.default_rng(seed).permutation(rows))]


def _text_rows(corpus: Corpus, tokenizer: Any, vocabulary: int, rows: int, length: int, seed: int) -> Sequences:
    parts: list[Sequences] = []
    missing = rows
    while missing:
        documents = corpus.split("train")
        part = text_sequences(documents, tokenizer, count=missing, length=length, seed=seed + len(parts))
        if not len(part):
            raise DataError(
                f"text {corpus.name}: its train split holds less than one sequence of {length} tokens; give more text"
            )
        check_vocabulary(part.tokens, vocabulary)
        parts.append(part)
        missing -= len(part)
    return Sequences.concatenate(parts)


def check_vocabulary(tokens: torch.Tensor, vocabulary: int) -> None:
    """Raises DataError if the tokenizer writes ids that the model has no embedding for."""
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocabulary:
        raise DataError(
            f"tokenizer gives token id {largest}, the model's vocabulary has {vocabulary}; the tokenizer does not "
            "belong to this model"
        )


def probe_lengths(length: int, distance: int | None, windows: Sequence[int], context: int) -> tuple[int, int]:
    """Length and distance of probes that no window can answer.

    Without a distance, it is half the length; when a window reaches that far the length becomes four times the widest
    window, as far as the model's context allows.

    Raises:
        DataError: a chosen distance is within reach of a window, or the context is too short for probes.
    """
    widest = max(windows, default=0)
    if distance is not None:
        if distance < widest:
            raise DataError(
                f"probe distance {distance} is within a window of {widest}, so the probes would not notice what the "
                f"window loses; choose a distance of at least {widest}"
            )
        return length, distance
    if widest > length // 2:
        length = 4 * widest
    length = min(length, context)
    distance = max(length // 2, min(widest, length - 24))
    if length < 64 or distance < widest:
        raise DataError(
            f"the model's context of {context} tokens is too short for probes beyond a window of {widest}; choose "
            "narrower windows"
        )
    return length, distance
