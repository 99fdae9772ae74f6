"""What analysis, healing and evaluation look at: text and recall probes of one split, for one tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from layerboost.artifacts import Record, text_digest
from layerboost.data.corpus import Corpus, Split, open_corpus, standard_library
from layerboost.data.probes import BESIDES, PROBES, ProbeMaker, as_pairs, ordinary_tokens, probe_sequences
from layerboost.data.sequences import Sequences, Wanted, beginning, text_sequences, token_stream
from layerboost.data.sources import (
    Generate,
    Source,
    cache_folder,
    chat_rows,
    generated_rows,
    hub_rows,
    text_rows,
)
from layerboost.errors import DataError, UsageError
from layerboost.model.loading import tokenizer_digest
from layerboost.progress import say

TEXT = "text"
_SEEDS = {"train": 11, "validation": 12, "held_out": 13}
TURN = 2**20  # seeds between two helpings of probes; distances, which analyze adds to its own, are shorter


Seed = Annotated[int, Field(ge=0, lt=2**32)]


class DataConfig(Record):
    """Settings of every verb that looks at data.

    Attributes:
        text: a file or folder of UTF-8 text instead of the built-in corpus.
        seed: of everything that is drawn.
    """

    text: Path | None = None
    seed: Seed = 0
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
    turn: int = 0,
) -> dict[str, Sequences]:
    """Text under `text`, and every probe under its name, with one answer at the end of each sequence.

    Args:
        vocabulary: ids the model has embeddings for.
        texts, answers: sequences of text, and sequences of each probe.
        length: tokens per sequence.
        distance: fewest tokens between an answer and its source.
        turn: number of the helping; each has other probes, and the text that follows the text of those before.

    Raises:
        DataError: the split holds too little text, or the tokenizer does not belong to the model.
    """
    order = seed * 100 + _SEEDS[split]
    before, asked = turn * texts, (turn + 1) * texts
    text = text_sequences(corpus.split(split), tokenizer, count=asked, length=length, seed=order)
    held = f"text {corpus.name}: its {split} split holds {len(text)} sequences of {length} tokens"
    if len(text) < before + min(texts, 2):
        raise DataError(f"{held}, at least {before + 2} are needed; give more text or a shorter length")
    if len(text) < asked:
        say(f"{held}, not {asked}")
    text, seed = text[before:], (seed + TURN * turn) * 100 + _SEEDS[split]
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
    words = ordinary_tokens(tokenizer, vocabulary)
    return ProbeMaker(words, hay, np.random.default_rng(seed + 2), beginning(tokenizer))


def training_rows(
    corpus: Corpus,
    tokenizer: Any,
    vocabulary: int,
    *,
    rows: int,
    length: int,
    seed: int,
    probe_share: float = 0.4,
    sources: Sequence[Source] | None = None,
    pack: bool = True,
    generate: Generate | None = None,
    cache: Path | None = None,
    teacher: str = "",
) -> Sequences:
    """Exactly `rows` sequences of `length` tokens, mixed from sources by their weights: evenly, else in random order.

    Text is of the train split alone. What holds less than is asked for is repeated, in another order each time.

    Args:
        corpus: where text comes from, unless a source names its own.
        vocabulary: ids the model has embeddings for.
        probe_share: share of recall probes, where no sources are named; the rest is text.
        pack: lay documents end to end in rows; otherwise every row is one document, or a part of it, and padding.
        generate: writes text as the teacher, for sources of that kind.
        cache: folder for rows of the hub, by default the user's, and for generated tokens, which are not kept without.
        teacher: the digest of the model behind `generate`; in a cache, generated tokens are kept apart by it.

    Raises:
        DataError: a source has too little, or cannot be read, or the tokenizer does not belong to the model.
        UsageError: there is no source, or nothing that writes generated text.
        EnvironmentTrouble: an optional package is not installed, or the cache cannot be written.
    """
    if sources is None:
        shares = (("text", 1 - probe_share), ("probes", probe_share))
        sources = [Source.model_validate({"kind": kind, "weight": share}) for kind, share in shares if share]

    def draw(source: Source, wanted: Wanted) -> Sequences:
        match source.kind:
            case "probes":
                return _probe_rows(corpus, tokenizer, vocabulary, wanted)
            case "chat":
                return chat_rows(source, tokenizer, wanted)
            case "hub":
                return hub_rows(source, tokenizer, wanted, cache or cache_folder(), _other_splits(corpus))
        own = _without(open_corpus(Path(source.path)), _other_splits(corpus)) if source.path else corpus
        if source.kind == "text":
            return text_rows(own.split("train"), f"text {own.name}: its train split", tokenizer, wanted)
        if generate is None:
            raise UsageError("a source of kind generated needs a teacher that writes, and here is none")
        return generated_rows(own, tokenizer, wanted, generate, cache, teacher)

    begin = beginning(tokenizer)
    parts, counts = [], _counts(sources, rows)
    for source, count in zip(sources, counts, strict=True):
        if not count:
            say(f"data: kind {source.kind}, weight {source.weight:g}, gets none of {rows} rows")
        else:
            parts.append(draw(source, Wanted(count, length, pack, seed, begin)))
            check_vocabulary(parts[-1].tokens, vocabulary)
    together = Sequences.concatenate(parts)
    return together[torch.from_numpy(evenly(counts, seed))]


def _other_splits(corpus: Corpus) -> frozenset[str]:
    """Texts that validation and evaluation are made of, which no source may bring back."""
    return frozenset(document.text for document in corpus.documents if corpus.splits[document.name] != "train")


def _without(own: Corpus, texts: frozenset[str]) -> Corpus:
    return replace(own, documents=tuple(document for document in own.documents if document.text not in texts))


def evenly(counts: Sequence[int], seed: int) -> np.ndarray:
    """An order of all rows, those of each source in random order and evenly spread: a model that trains at a high rate
    is what its last few batches were, and by chance those are half or twice as many probes as there should be."""
    rng = np.random.default_rng(seed)
    places = [(rng.permutation(count) + rng.random(count)) / count for count in counts if count]
    return np.argsort(np.concatenate(places), kind="stable")


def _counts(sources: Sequence[Source], rows: int) -> list[int]:
    """Rows of each source: their weights' shares, rounded so that they add up."""
    if not sources:
        raise UsageError("data names no source; give at least one, such as kind: text")
    ends = np.cumsum([source.weight for source in sources])
    return np.diff(np.round(rows * ends / ends[-1]).astype(int), prepend=0).tolist()


def _probe_rows(corpus: Corpus, tokenizer: Any, vocabulary: int, wanted: Wanted) -> Sequences:
    """Probes with many questions each, of every kind as many."""
    length = wanted.length
    seed = 100 * wanted.seed  # never that of a split that is measured on, whose draws are the same from the same seed
    maker = probe_maker(corpus, tokenizer, vocabulary, split="train", length=length, seed=seed)
    counts = {probe: (wanted.rows + i) // len(PROBES) for i, probe in enumerate(PROBES)}
    return Sequences.concatenate(
        [probe_sequences(maker, probe, count=n, length=length, distance=None) for probe, n in counts.items() if n]
    )


def check_vocabulary(tokens: torch.Tensor, vocabulary: int) -> None:
    """Raises DataError if the tokenizer writes ids that the model has no embedding for."""
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest >= vocabulary:
        raise DataError(
            f"tokenizer gives token id {largest}, the model's vocabulary has {vocabulary}; the tokenizer does not "
            "belong to this model"
        )


def sequence_length(config: Any, context: int) -> int:
    """The `length` of some settings; of the default, what fits the model's context.

    Raises:
        DataError: another length was chosen, and it does not fit.
    """
    length: int = config.length
    if length > context and length != type(config).model_fields["length"].default:
        raise DataError(f"length {length} is more than the model's context of {context} tokens; choose a shorter one")
    return min(length, context)


def probe_lengths(length: int, distance: int | None, windows: Sequence[int], context: int) -> tuple[int, int]:
    """Length and distance of probes that no window can answer.

    Without a distance, it is half the length; when a window reaches that far the length becomes four times the widest
    window, as far as the model's context allows.

    Raises:
        DataError: a chosen distance is within reach of a window or does not fit the length, or the context is too short
            for probes.
    """
    widest = max(windows, default=0)
    if distance is not None:
        if distance <= widest:
            raise DataError(
                f"probe distance {distance} is within a window of {widest}, so the probes would not notice what the "
                f"window loses; choose a distance of at least {widest + 1}"
            )
        if distance > length - BESIDES:
            raise DataError(
                f"probe distance {distance} does not fit probes of {length} tokens; choose at most {length - BESIDES}, "
                "or longer probes"
            )
        return length, distance
    if widest > length // 2:
        length = 4 * widest
    length = min(length, context)
    distance = max(length // 2, min(widest + 1, length - BESIDES))
    if length < 64 or distance <= widest:
        raise DataError(
            f"the model's context of {context} tokens is too short for probes beyond a window of {widest}; choose "
            "narrower windows"
        )
    return length, distance
