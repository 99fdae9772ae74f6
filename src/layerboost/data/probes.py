"""Recall probes: what a model can only answer by looking back in its context.

Every probe is built from ordinary tokens of whatever tokenizer the model has, without any marker token, so that
a model with in-context recall can answer it untrained: the answer is what followed the same tokens earlier on.

    copy       a b c d ... a b c        -> d ...          a random segment comes a second time
    key_value  k v k v ... k v k        -> v              keys are distinct; earlier queries ask for other keys
    needle     text k k v v text k k    -> v v            two-token keys and values hidden in text
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerboost.data.corpus import standard_library
from layerboost.data.sequences import Sequences, token_stream
from layerboost.errors import DataError

COPY_ANSWER = 4
NEEDLES = 3
_FEWEST_TOKENS = 16

Row = tuple[np.ndarray, np.ndarray]


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Sorted ids that the tokenizer uses for words of ordinary text: not special, with a letter or digit.

    Args:
        vocabulary: ids the model has embeddings for; a tokenizer may know more.

    Raises:
        DataError: fewer than 16 such tokens.
    """
    stream = token_stream(standard_library().split("train"), tokenizer, tokens=200_000, piece=2_000, seed=0)
    special = set(tokenizer.all_special_ids)
    found = [int(t) for t in np.unique(stream) if t < vocabulary and int(t) not in special]
    words = [t for t in found if any(c.isalnum() for c in tokenizer.decode([t]))]
    if len(words) < _FEWEST_TOKENS:
        raise DataError(
            f"tokenizer has {len(words)} ordinary tokens below the model's vocabulary of {vocabulary}; recall probes "
            f"need at least {_FEWEST_TOKENS}; check that the tokenizer belongs to this model"
        )
    return np.array(words, dtype=np.int64)


@dataclass(frozen=True)
class ProbeMaker:
    """Makes probe sequences.

    Attributes:
        words: `[A]` ids of ordinary tokens.
        text: `[S]` ids of text that needles are hidden in; no probe is longer than this.
        rng: where the randomness comes from.
        begin: what the tokenizer begins texts with, and so every probe.
    """

    words: np.ndarray
    text: np.ndarray
    rng: np.random.Generator
    begin: int | None = None

    def copy(self, length: int, distance: int | None) -> Row:
        if distance is None:
            segment = int(self.rng.integers(4, length // 2 + 1))
            scored_from = segment + 1
        else:
            segment = int(self.rng.integers(distance, length - 2 * COPY_ANSWER + 1))
            scored_from = length - COPY_ANSWER
        tokens = np.resize(self._draw(segment), length)
        scored = np.zeros(length, dtype=bool)
        scored[scored_from:] = True
        return tokens, scored

    def key_value(self, length: int, distance: int | None) -> Row:
        most = min(length // 4, len(self.words) // 2)
        pairs = most if distance is not None else int(self.rng.integers(2, most + 1))
        shuffled = self.rng.permutation(self.words)
        keys, values = shuffled[:pairs], self.rng.choice(shuffled[pairs:], pairs)
        queries = (length - 2 * pairs) // 2
        asked = self.rng.integers(0, pairs, queries)
        if distance is not None:
            # the last answer is at length - 1 and pair j's value at length - 2 * (pairs + queries) + 2 * j + 1
            far_enough = max(1, min(pairs, pairs + queries - (distance + 1) // 2))
            asked = self.rng.integers(1, pairs, queries)
            asked[-1] = self.rng.integers(0, far_enough)
            asked[:-1] = (asked[-1] + asked[:-1]) % pairs  # never the key that the last query asks for
        order = np.concatenate([np.arange(pairs), asked])
        body = np.stack([keys[order], values[order]], axis=1).reshape(-1)
        tokens = np.concatenate([self.rng.choice(shuffled[pairs:], length - len(body)), body])
        scored = np.zeros(length, dtype=bool)
        if distance is None:
            scored[length - 2 * queries + 1 :: 2] = True
        else:
            scored[-1] = True
        return tokens, scored

    def needle(self, length: int, distance: int | None) -> Row:
        queries = 1 if distance is not None else int(self.rng.integers(1, length // 16 + 1))
        needles = NEEDLES if distance is not None else int(self.rng.integers(1, max(NEEDLES, queries) + 1))
        start = int(self.rng.integers(0, len(self.text) - length + 1))
        hay = self.text[start : start + length - 4 * (needles + queries)]
        unused = np.setdiff1d(self.words, hay, assume_unique=False)
        pool = self.rng.permutation(unused if len(unused) >= 2 * needles else self.words)
        parts = np.concatenate([np.resize(pool, (needles, 2)), self.rng.choice(self.words, (needles, 2))], axis=1)
        if distance is None:
            half = len(hay) // 2
            hidden_at = np.sort(self.rng.integers(0, half + 1, needles))
            asked_at = np.sort(self.rng.integers(half, len(hay) + 1, queries))
            asked = np.resize(self.rng.permutation(needles), queries)
        else:
            # needle 0 is asked for: its value starts at hidden_at[0] + 2, the answer at length - 2
            first = int(self.rng.integers(0, min(length - 4 - distance, len(hay)) + 1))
            hidden_at = np.sort(np.append(self.rng.integers(first, len(hay) + 1, needles - 1), first))
            asked_at, asked = np.array([len(hay)]), np.array([0])
        places = np.repeat(np.concatenate([hidden_at, asked_at]), 4)
        tokens = np.insert(hay, places, np.concatenate([parts, parts[asked]]).reshape(-1))
        answers = np.concatenate([np.zeros((needles, 4), bool), np.tile([False, False, True, True], (queries, 1))])
        return tokens, np.insert(np.zeros(len(hay), bool), places, answers.reshape(-1))

    def _draw(self, count: int) -> np.ndarray:
        """Distinct words if there are enough of them; never a period that would bring an answer nearer."""
        if count <= len(self.words):
            return self.rng.permutation(self.words)[:count]
        return self.rng.choice(self.words, count)


BESIDES = 24  # tokens that a probe needs beside the distance between an answer and its source
PROBES: dict[str, Callable[[ProbeMaker, int, int | None], Row]] = {
    "copy": ProbeMaker.copy,
    "key_value": ProbeMaker.key_value,
    "needle": ProbeMaker.needle,
}


def probe_sequences(maker: ProbeMaker, probe: str, *, count: int, length: int, distance: int | None) -> Sequences:
    """`count` sequences of one probe.

    Args:
        length: tokens per sequence, the answer included.
        distance: fewest tokens between the answer and its source, one answer at the end of each sequence; None
            asks many questions at random distances in each sequence, which is what training wants.

    Raises:
        DataError: the length leaves no room for such a distance.
    """
    room = length - (maker.begin is not None)
    if distance is not None and not 1 <= distance <= room - BESIDES:
        raise DataError(
            f"probe distance {distance} does not fit probes of {length} tokens; choose 1 to {room - BESIDES}, or "
            "longer probes"
        )
    if length < 32 or length > len(maker.text):
        raise DataError(f"probe length {length} must be at least 32 and at most the {len(maker.text)} tokens of text")
    rows = [PROBES[probe](maker, room, distance) for _ in range(count)]
    tokens, scored = (np.stack(part) for part in zip(*rows, strict=True))
    if maker.begin is not None:
        tokens, scored = np.insert(tokens, 0, maker.begin, axis=1), np.insert(scored, 0, False, axis=1)
    return Sequences(torch.from_numpy(tokens), torch.from_numpy(scored))


def as_pairs(sequences: Sequences) -> list[dict[str, list[int]]]:
    """The same probes as `{"prompt", "answer"}` pairs of token ids; for sequences with one answer at the end."""
    pairs = []
    for tokens, scored in zip(sequences.tokens.tolist(), sequences.scored.tolist(), strict=True):
        at = scored.index(True)
        pairs.append({"prompt": tokens[:at], "answer": tokens[at:]})
    return pairs
