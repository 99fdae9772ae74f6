"""Text: the built-in corpus, which is the running interpreter's own standard library, or a user's own files."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, get_args

from layerboost.errors import DataError

Split = Literal["train", "validation", "held_out"]

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, each belonging to one split for ever."""

    name: str
    documents: tuple[Document, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over names and texts; interpreters differ, so every artifact records it."""
        total = hashlib.sha256()
        for document in self.documents:
            total.update(f"{document.name}\0{len(document.text)}\0".encode())
            total.update(document.text.encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Every document's split: by the hash of its name. A split that would be empty takes one from train."""
        found = {document.name: split_of(document.name) for document in self.documents}
        for split in get_args(Split):
            train = sorted((_hash(name), name) for name in found if found[name] == "train")
            if split not in found.values() and len(train) > 1:
                found[train[0][1]] = split
        return found

    def split(self, split: Split) -> list[Document]:
        return [document for document in self.documents if self.splits[document.name] == split]


def split_of(name: str) -> Split:
    """Held-out 5 %, validation 5 %, train the rest, by the hash of the document's name alone."""
    bucket = _hash(name) % 100
    if bucket < 5:
        return "held_out"
    return "validation" if bucket < 10 else "train"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8])


def read_documents(root: Path, files: Iterable[Path]) -> tuple[Document, ...]:
    """Read UTF-8 files, named by their path relative to `root`; unreadable and empty files are skipped."""
    documents = []
    for path in sorted(files):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return tuple(documents)


@lru_cache(maxsize=1)
def standard_library() -> Corpus:
    """The `.py` files of the interpreter's standard library, without its tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    return Corpus("python-standard-library", read_documents(root, files))


_PIECE = 4_096


def open_corpus(source: Path | None) -> Corpus:
    """A user's text, or the built-in corpus.

    Args:
        source: a UTF-8 text file, a `.jsonl` file of objects with a `text` key, or a folder of such files. Long files
            are cut into pieces of 4,096 characters, so that every split gets some.

    Raises:
        DataError: nothing there, nothing that can be read, or too little for every split.
    """
    if source is None:
        return standard_library()
    if not source.exists():
        raise DataError(f"text {source} does not exist; name a file or a folder of UTF-8 text")
    root, files = (source, source.rglob("*")) if source.is_dir() else (source.parent, [source])
    documents = read_documents(root, (path for path in files if path.is_file()))
    pieces = [piece for document in documents for piece in _pieces(document)]
    if not pieces:
        raise DataError(f"text {source} holds no UTF-8 text; name a file or a folder of UTF-8 text")
    corpus = Corpus(source.name, tuple(pieces))
    if len(set(corpus.splits.values())) < len(get_args(Split)):
        raise DataError(
            f"text {source} holds {len(pieces)} pieces; train, validation and held-out split need one each, "
            "so give more text"
        )
    return corpus


def _pieces(document: Document) -> Iterable[Document]:
    texts = [document.text[at : at + _PIECE] for at in range(0, len(document.text), _PIECE)]
    if document.name.endswith(".jsonl"):
        texts = [
            _text_of(line, document.name, n) for n, line in enumerate(document.text.splitlines(), 1) if line.strip()
        ]
    return [Document(f"{document.name}#{n}", text) for n, text in enumerate(texts)]


def _text_of(line: str, name: str, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise DataError(f"{name} line {number}: must be a JSON object with a string under the key text")
    return text
