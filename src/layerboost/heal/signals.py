"""What is kept of a teacher, so that it need not run again: its likeliest tokens per scored token, and the rest as one.

A folder holds them for rows of training data in a fixed order; other plans, and other orders of the same rows, read the
same. 6 bytes per kept token, 4 where the vocabulary has at most 65,536.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerboost.artifacts import lock, read_json, text_digest, write_bytes, write_text
from layerboost.data.sequences import Sequences
from layerboost.errors import UsageError
from layerboost.heal.losses import CHUNK_ELEMENTS
from layerboost.passes import gather, ranks
from layerboost.progress import progress
from layerboost.scoring import batch_rows, log_probabilities, scored_hidden

_ROWS = 256  # per file
_INDEX = "signals.json"


@dataclass(frozen=True)
class Signal:
    """Of K scored tokens: `[K, k]` int64 ids of the teacher's likeliest, and their float32 log-probabilities."""

    ids: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Signals:
    """A folder of signals.

    Attributes:
        counts: scored tokens of every row.
    """

    folder: Path
    counts: tuple[int, ...]

    @cached_property
    def _starts(self) -> list[int]:
        """Where each row's tokens start in its file."""
        starts: list[int] = []
        for row in range(len(self.counts)):
            starts.append(0 if row % _ROWS == 0 else starts[-1] + self.counts[row - 1])
        return starts

    @cached_property
    def _files(self) -> dict[int, Any]:
        return {}

    def __getitem__(self, rows: Tensor) -> Signal:
        """Of `[n]` rows, one after the other."""
        parts = [self._row(int(row)) for row in rows]
        ids, found = (torch.cat(part) for part in zip(*parts, strict=True))
        return Signal(ids.long(), found.float())

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        number = row // _ROWS
        if number not in self._files:
            self._files[number] = safe_open(_path(self.folder, number), framework="pt")
        span = slice(self._starts[row], self._starts[row] + self.counts[row])
        return tuple(self._files[number].get_slice(name)[span] for name in ("ids", "log_probabilities"))


def _path(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:06}.safetensors"


def rows_digest(rows: Sequences) -> str:
    total = hashlib.sha256()
    for tensor in (rows.tokens, rows.scored, rows.positions):
        total.update(b"none" if tensor is None else tensor.numpy().tobytes())
    return total.hexdigest()


def signals(folder: Path, healer: Any, rows: Sequences, top_k: int, teacher: str) -> Signals:
    """Those in a folder, after writing what is missing; a kill costs the file that was being written.

    Args:
        healer: whose teacher is asked.
        rows: in the order that their numbers will mean.
        teacher: digest of the model.

    Raises:
        UsageError: the folder holds signals of another teacher or of other rows.
    """
    made_of = {"teacher": teacher, "rows": rows_digest(rows), "top_k": text_digest(top_k)}
    rank, world = ranks()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) if rank == 0 else contextlib.nullcontext():
        index = folder / _INDEX
        if index.exists() and read_json(index).get("inputs") != made_of:
            raise UsageError(
                f"signals {folder} were written for another teacher, other rows or another top_k; name another folder, "
                "or keep tokens, length, text, data and data_seed as they were"
            )
        if not index.exists():
            write_text(index, json.dumps({"inputs": made_of}))
        missing = [n for n in range(-(-len(rows) // _ROWS)) if not _readable(_path(folder, n))]
        missing = gather(missing)[0]
        # a teacher that is spread over processes is asked by all of them together, and one writes
        mine = missing if healer.config.shard else missing[rank::world]
        with progress("signals", len(mine)) as advance:
            for number in mine:
                kept = _ask(healer, rows[slice(number * _ROWS, (number + 1) * _ROWS)], top_k)
                if rank == 0 or not healer.config.shard:
                    write_bytes(_path(folder, number), save(kept))
                advance()
        gather(None)
    return Signals(folder, tuple(rows.scored[:, 1:].sum(1).tolist()))


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return {"ids", "log_probabilities"} <= set(file.keys())
    except (OSError, SafetensorError):
        return False


def _ask(healer: Any, rows: Sequences, top_k: int) -> dict[str, Tensor]:
    config = healer.model.config
    small = torch.uint16 if config.vocab_size <= 2**16 else torch.int32
    ids, found = [], []
    chunk = max(1, CHUNK_ELEMENTS // config.vocab_size)
    for batch in rows.batches(batch_rows(rows.tokens.shape[1], config.vocab_size, config.hidden_size, 1)):
        with healer.teacher():
            final = healer.see(batch).final
            hidden = scored_hidden(final, batch.scored.to(final.device))
            for start in range(0, len(hidden), chunk):
                top = log_probabilities(hidden[start : start + chunk], healer.head).topk(top_k)
                ids.append(top.indices.to(small).cpu())
                found.append(top.values.half().cpu())
    return {"ids": torch.cat(ids), "log_probabilities": torch.cat(found)}
