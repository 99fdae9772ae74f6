"""Measurements kept in a file while more are made: an analysis or a search that was killed goes on where it was.

A measurement depends on model, data and plan alone. It is kept under a digest of all three and of the versions, so that
whoever asks for the same again is given it, and nobody is given another. A plan's search decides by what it measures:
asked again, it takes the same way, past what is known, to where it was.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from layerboost.artifacts import disk_trouble, text_digest
from layerboost.progress import say
from layerboost.provenance import versions


class Measured:
    """What was measured, as JSON values by key; `Measured()` forgets it with the process.

    Every process writes a file of its own, a line per measurement. A line that a kill left unfinished is passed over;
    if the machine itself dies, what the disk did not have yet is measured again.
    """

    def __init__(self, folder: Path | None = None, *of: str) -> None:
        """Args:
        of: what all measurements have in common: the model's digest, where and how it is computed.
        """
        self.folder = folder
        self._of = [versions(), *of]
        self._values: dict[str, Any] = {}
        for path in sorted(folder.glob("[0-9]*.jsonl")) if folder else []:
            self._values |= _read(path)
        self._silent = not self._values

    def key(self, *what: Any) -> str:
        return text_digest([*self._of, *what])

    def __contains__(self, key: str) -> bool:
        found = key in self._values
        if found and not self._silent:
            self._silent = True
            say(f"{self.folder}: going on from what was measured before")
        return found

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        if self.folder is not None:
            path = self.folder / f"{os.environ.get('RANK', '0')}.jsonl"
            with disk_trouble(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as file:  # the new line comes first, and ends what a kill left unfinished
                    file.write(b"\n" + json.dumps([key, value]).encode())


@contextlib.contextmanager
def kept_beside(out: Path | None, *of: str) -> Iterator[Measured]:
    """Measurements in `OUT-measured` until `out` is written; after an error they wait for other settings."""
    kept = Measured(None if out is None else out.with_name(f"{out.name}-measured"), *of)
    yield kept
    _remove(kept)


def _remove(kept: Measured) -> None:
    if kept.folder is not None and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a folder with anything else in it is somebody's own
            for path in kept.folder.glob("[0-9]*.jsonl"):
                path.unlink()
            kept.folder.rmdir()


def _read(path: Path) -> dict[str, Any]:
    found = {}
    with disk_trouble(path):
        lines = path.read_bytes().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            key, value = json.loads(line)
            found[key] = value
    return found


def tensor_digest(*tensors: Tensor) -> str:
    """Of values and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
