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
from layerboost.heal.served import open_teacher
from layerboost.passes import gather, ranks
from layerboost.progress import progress
from layerboost.scoring import batch_rows, log_probabilities, scored_hidden

_ROWS = 256  # per file
_OPEN = 64  # files that are held open
_INDEX = "signals.json"


@dataclass(frozen=True)
class Signal:
    """Of K scored tokens: `[K, k]` int64 ids of the teacher's likeliest, and their float32 log-probabilities."""

    ids: Tensor
    log_probabilities: Tensor


NO_SIGNAL = Signal(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1))


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
            if len(self._files) >= _OPEN:
                self._files.clear()
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


def signals(folder: Path, healer: Any, rows: Sequences, top_k: int, teacher: str, url: str | None = None) -> Signals:
    """Those in a folder, after writing what is missing or damaged; a kill costs the files that were being written.

    Args:
        healer: whose teacher is asked.
        rows: in the order that their numbers will mean.
        teacher: digest of the model.
        url: of a server that is asked instead, if anything is missing; it must serve the healer's teacher.

    Raises:
        UsageError: the folder holds signals of another teacher, of other rows or from another source; or the server
            serves another model.
        EnvironmentTrouble: the server cannot be reached, or refuses.
    """
    # a server's rounding is another one than ours, and so is that of weights in few bits
    source = f"own {healer.config.quantize}" if url is None else "served"
    made_of = {
        "teacher": teacher, "rows": rows_digest(rows), "top_k": text_digest(top_k), "source": text_digest(source),
    }  # fmt: skip
    rank, world = ranks()
    whole = Signals(folder, tuple(rows.scored[:, 1:].sum(1).tolist()))
    if gather(rank or ((folder / _INDEX).exists() and not _missing(folder, made_of, rows, top_k)))[0]:
        return whole  # which any number of healings may read at once
    with lock(folder) if rank == 0 else contextlib.nullcontext():
        missing = gather(_missing(folder, made_of, rows, top_k) if rank == 0 else None)[0]
        served = open_teacher(url, healer, rows, top_k) if url is not None and missing else None
        if rank == 0 and not (folder / _INDEX).exists():  # a server that is of no use leaves nothing
            write_text(folder / _INDEX, json.dumps({"inputs": made_of}))
        # a teacher that is spread over processes is asked by all of them together, and one writes
        together = healer.config.shard and served is None
        mine = missing if together else missing[rank::world]
        with progress("signals", len(mine)) as advance:
            for number in mine:
                part = rows[slice(number * _ROWS, (number + 1) * _ROWS)]
                ids, found = _ask(healer, part, top_k) if served is None else served.ask(part)
                if rank == 0 or not together:
                    _write(_path(folder, number), ids, found, healer.model.config.vocab_size, made_of)
                advance()
        gather(None)
    return whole


def _missing(folder: Path, made_of: dict[str, str], rows: Sequences, top_k: int) -> list[int]:
    """Numbers of the files that are not there as they should be."""
    index = folder / _INDEX
    if index.exists() and read_json(index).get("inputs") != made_of:
        raise UsageError(
            f"signals {folder} were written for another teacher, other rows or another top_k, or came from another "
            "source (signals_from, quantize); name another folder, or keep tokens, length, text, data, probe_share "
            "and data_seed as they were; rows of plans with linear attention are others than those without"
        )
    scored = [int(part.scored[:, 1:].sum()) for part in rows.batches(_ROWS)]
    return [n for n, count in enumerate(scored) if not _intact(_path(folder, n), (count, top_k), made_of)]


def _write(path: Path, ids: Tensor, found: Tensor, vocabulary: int, made_of: dict[str, str]) -> None:
    small = torch.uint16 if vocabulary <= 2**16 else torch.int32
    kept = {"ids": ids.to(small), "log_probabilities": found.half()}
    write_bytes(path, save(kept, {"digest": _digest(kept, made_of)}))


def _digest(kept: dict[str, Tensor], made_of: dict[str, str]) -> str:
    total = hashlib.sha256(text_digest(made_of).encode())
    for name in ("ids", "log_probabilities"):
        total.update(kept[name].view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _intact(path: Path, shape: tuple[int, int], made_of: dict[str, str]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in ("ids", "log_probabilities")}
            whole = (file.metadata() or {}).get("digest") == _digest(kept, made_of)
    except (OSError, SafetensorError):
        return False
    return whole and all(tensor.shape == shape for tensor in kept.values())


def _ask(healer: Any, rows: Sequences, top_k: int) -> tuple[Tensor, Tensor]:
    """Of all scored tokens: `[K, k]` int64 ids of the likeliest, and their `[K, k]` float32 log-probabilities."""
    config = healer.model.config
    ids, found = [], []
    chunk = max(1, CHUNK_ELEMENTS // config.vocab_size)
    for batch in rows.batches(batch_rows(rows.tokens.shape[1], config.vocab_size, config.hidden_size, 1)):
        with healer.teacher():
            final = healer.see(batch).final
            hidden = scored_hidden(final, batch.scored.to(final.device))
            for start in range(0, len(hidden), chunk):
                top = log_probabilities(hidden[start : start + chunk], healer.head).topk(top_k)
                ids.append(top.indices.cpu())
                found.append(top.values.cpu())
    return torch.cat(ids), torch.cat(found)
