"""Token sequences of equal length with a mask of the tokens that count.

Shapes: N sequences, T tokens each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerboost.data.corpus import Document


@dataclass(frozen=True)
class Sequences:
    """Equally long token sequences.

    Attributes:
        tokens: `[N, T]` int64 token ids.
        scored: `[N, T]` bool; `scored[n, t]` says that predicting token t from the tokens before it counts.
            Column 0 is never scored.
    """

    tokens: Tensor
    scored: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Any) -> "Sequences":
        return Sequences(self.tokens[rows], self.scored[rows])

    def batches(self, size: int) -> Iterator["Sequences"]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @staticmethod
    def concatenate(parts: Sequence["Sequences"]) -> "Sequences":
        return Sequences(torch.cat([p.tokens for p in parts]), torch.cat([p.scored for p in parts]))


def token_stream(documents: Sequence[Document], tokenizer: Any, *, tokens: int, piece: int, seed: int) -> np.ndarray:
    """Tokens of randomly chosen pieces of the documents, joined by the tokenizer's end-of-text token.

    Args:
        tokens: stop once this many tokens are there; fewer come back when the documents hold fewer.
        piece: characters per piece. Short pieces make a sample diverse, and tokenizers take quadratic
            time on some long texts.

    Returns:
        `[<= tokens]` int64 ids, the same for the same documents, tokenizer and seed.
    """
    pieces = [(d, start) for d, document in enumerate(documents) for start in range(0, len(document.text), piece)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    separator = next((t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id) if t is not None), None)
    stream: list[int] = []
    for start in range(0, len(order), 64):
        texts = [documents[d].text[at : at + piece] for d, at in (pieces[i] for i in order[start : start + 64])]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            if separator is not None:
                stream.append(separator)
            stream.extend(ids)
        if len(stream) >= tokens:
            break
    return np.array(stream[:tokens], dtype=np.int64)


def text_sequences(documents: Sequence[Document], tokenizer: Any, *, count: int, length: int, seed: int) -> Sequences:
    """At most `count` sequences of `length` tokens, from about as many places in the documents."""
    stream = token_stream(documents, tokenizer, tokens=count * length, piece=4 * length, seed=seed)
    rows = len(stream) // length
    tokens = torch.from_numpy(stream[: rows * length].reshape(rows, length))
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, :1] = False
    return Sequences(tokens, scored)
