"""Token sequences of equal length with a mask of the tokens that count.

Shapes: N sequences, T tokens each.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerboost.data.corpus import Document
from layerboost.errors import DataError

# a tokenised document: `[n]` int64 ids, and `[n]` bool, which of them are scored
Piece = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Sequences:
    """Equally long token sequences.

    Attributes:
        tokens: `[N, T]` int64 token ids.
        scored: `[N, T]` bool; `scored[n, t]` says that predicting token t from the tokens before it counts.
            A document's first token is never scored, nor is padding.
        positions: `[N, T]` int64, a token's place in its own document, -1 for padding; None says that every row is one
            whole document without padding.
    """

    tokens: Tensor
    scored: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Any) -> "Sequences":
        return Sequences(self.tokens[rows], self.scored[rows], None if self.positions is None else self.positions[rows])

    def batches(self, size: int) -> Iterator["Sequences"]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @staticmethod
    def concatenate(parts: Sequence["Sequences"]) -> "Sequences":
        """All rows; where one part has positions, the others get those that None stands for."""
        positions = None
        if any(p.positions is not None for p in parts):
            positions = torch.cat([_whole(p.tokens) if p.positions is None else p.positions for p in parts])
        return Sequences(torch.cat([p.tokens for p in parts]), torch.cat([p.scored for p in parts]), positions)


def _whole(tokens: Tensor) -> Tensor:
    """Positions of rows that are one document each."""
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def beginning(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before every text; None if it puts none. Models that were trained so
    (Gemma, Llama) are others without it."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin in tokenizer("a")["input_ids"][:1] else None


def tokenised(documents: Sequence[Document], tokenizer: Any, *, piece: int, seed: int) -> Iterator[Piece]:
    """Every piece of the documents in random order, all of it scored; before each stands what the tokenizer begins
    texts with, or else the end-of-text token.

    Args:
        piece: characters per piece. Short pieces make a sample diverse, and tokenizers take quadratic
            time on some long texts.
    """
    pieces = [(d, start) for d, document in enumerate(documents) for start in range(0, len(document.text), piece)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    before = (beginning(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
    separator = [t for t in before if t is not None][:1]
    for start in range(0, len(order), 64):
        texts = [documents[d].text[at : at + piece] for d, at in (pieces[i] for i in order[start : start + 64])]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            tokens = np.array(separator + ids, dtype=np.int64)
            yield tokens, np.ones(len(tokens), dtype=bool)


def up_to(tokens: int, pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces until they hold this many tokens; fewer when there are no more."""
    found, held = [], 0
    for piece in pieces:
        found.append(piece)
        held += len(piece[0])
        if held >= tokens:
            break
    return found


def token_stream(documents: Sequence[Document], tokenizer: Any, *, tokens: int, piece: int, seed: int) -> np.ndarray:
    """Tokens of randomly chosen pieces of the documents, joined by the tokenizer's end-of-text token.

    Args:
        tokens: stop once this many tokens are there; fewer come back when the documents hold fewer.
        piece: characters per piece.

    Returns:
        `[<= tokens]` int64 ids, the same for the same documents, tokenizer and seed.
    """
    pieces = up_to(tokens, tokenised(documents, tokenizer, piece=piece, seed=seed))
    return np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in pieces)])[:tokens]


def text_sequences(documents: Sequence[Document], tokenizer: Any, *, count: int, length: int, seed: int) -> Sequences:
    """At most `count` sequences of `length` tokens, from about as many places in the documents."""
    stream = token_stream(documents, tokenizer, tokens=count * length, piece=4 * length, seed=seed)
    rows = len(stream) // length
    tokens = torch.from_numpy(stream[: rows * length].reshape(rows, length))
    if (begin := beginning(tokenizer)) is not None:  # rows begin amid texts, and their first token does not count
        tokens[:, 0] = begin
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, :1] = False
    return Sequences(tokens, scored)


@dataclass(frozen=True)
class Wanted:
    """Training rows that are asked for.

    Attributes:
        length: tokens per row.
        pack: lay documents end to end; what does not fit into a row goes on in the next as a document of its own.
            Otherwise every row is one document, or a part of it, and padding.
        seed: of the order of documents.
        begin: what the rest of a document that goes on in another row begins with, in place of its first token.
    """

    rows: int
    length: int
    pack: bool
    seed: int
    begin: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def fill_rows(pieces: Iterable[Piece], name: str, wanted: Wanted) -> Sequences:
    """Exactly the rows that are wanted, of as many documents as that takes; all again in another order if too few.

    Args:
        name: what the documents are called in errors.

    Raises:
        DataError: the documents make no row in which something is scored.
    """
    source = (piece for piece in pieces if len(piece[0]))
    lay_out = _packed if wanted.pack else _padded
    shuffle = np.random.default_rng(wanted.seed)
    taken = up_to(wanted.tokens, source)
    first = lay_out(taken, wanted)
    # not every token makes a row: ends of documents are dropped, and rows in which nothing is scored
    while len(first) < wanted.rows and (more := up_to(sum(len(ids) for ids, _ in taken), source)):  # as much again
        taken += more
        first = lay_out(taken, wanted)
    if not len(first):
        raise DataError(f"{name} holds less than one sequence of {wanted.length} tokens to learn from; give more text")
    parts = [first[: wanted.rows]]
    missing = wanted.rows - len(parts[0])
    while missing:
        part = lay_out([taken[i] for i in shuffle.permutation(len(taken))], wanted)
        # of a few short documents, another order may make no row
        parts.append((part if len(part) else first)[:missing])
        missing -= len(parts[-1])
    found = Sequences.concatenate(parts)
    whole = found.positions is None or torch.equal(found.positions, _whole(found.tokens))
    return Sequences(found.tokens, found.scored) if whole else found


def _packed(documents: Sequence[Piece], wanted: Wanted) -> Sequences:
    length = wanted.length
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    whole = lengths.sum() // length * length
    starts = np.zeros(lengths.sum(), dtype=bool)
    starts[np.cumsum(lengths) - lengths] = True
    rests = ~starts[::length]
    starts[::length] = True
    places = np.arange(len(starts))
    positions = places - np.maximum.accumulate(np.where(starts, places, 0))
    tokens = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in documents)])
    if wanted.begin is not None:
        tokens[::length][rests] = wanted.begin
    scored = np.concatenate([starts[:0], *(scored for _, scored in documents)]) & ~starts
    return _worth(*(flat[:whole].reshape(-1, length) for flat in (tokens, scored, positions)))


def _padded(documents: Sequence[Piece], wanted: Wanted) -> Sequences:
    length = wanted.length
    parts = [
        (ids[at : at + length], scored[at : at + length], at > 0)
        for ids, scored in documents
        for at in range(0, len(ids), length)
        if not at or len(ids) - at >= length // 8  # the last bit of a document is not worth a row of padding
    ]
    tokens = np.zeros((len(parts), length), dtype=np.int64)  # any id serves as padding
    scored = np.zeros(tokens.shape, dtype=bool)
    positions = np.full_like(tokens, -1)
    for row, (ids, counts, rest) in enumerate(parts):
        tokens[row, : len(ids)], scored[row, : len(ids)] = ids, counts
        if rest and wanted.begin is not None:
            tokens[row, 0] = wanted.begin
        positions[row, : len(ids)] = np.arange(len(ids))
    scored[:, :1] = False
    return _worth(tokens, scored, positions)


def _worth(tokens: np.ndarray, scored: np.ndarray, positions: np.ndarray) -> Sequences:
    """Rows in which something is scored."""
    found = Sequences(torch.from_numpy(tokens), torch.from_numpy(scored), torch.from_numpy(positions))
    return found[found.scored.any(1)]
