"""Text: the built-in corpus, which is the running interpreter's own standard library, or a user's own files."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from layerboost.errors import DataError, EnvironmentTrouble
from layerboost.progress import say

Split = Literal["train", "validation", "held_out"]

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class Document:
    """Attributes:
    name: what decides its split: of the built-in corpus its file's, of a user's text the digest of the text, which is
        then in the same split wherever it stands.
    """

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
_ROWS = (".jsonl", ".parquet")


def open_corpus(source: Path | None) -> Corpus:
    """A user's text, or the built-in corpus.

    Args:
        source: a UTF-8 text file, a `.jsonl` file of objects with a `text` key, a `.parquet` file with a `text` column,
            or a folder of such files, of which hidden ones are left out. Long text files are cut into pieces of 4,096
            characters, so that every split gets some; a row is a document. A text counts once, however often it comes.

    Raises:
        DataError: nothing there, nothing that can be read, or too little for every split.
        EnvironmentTrouble: pyarrow is needed and not installed.
    """
    if source is None:
        return standard_library()
    root, files = files_of(source)
    pieces: dict[str, Document] = {}
    left_out: list[str] = []
    for path in files:
        found = _pieces(root, path)
        if not found and path.stat().st_size:
            left_out.append(path.relative_to(root).as_posix())
        pieces |= {piece.name: piece for piece in found}
    if not pieces:
        raise DataError(f"text {source} holds no UTF-8 text; name a file or a folder of UTF-8 text")
    if left_out:
        _tell_left_out(source, len(files), tuple(left_out))
    corpus = Corpus(source.name, tuple(pieces.values()))
    if len(set(corpus.splits.values())) < len(get_args(Split)):
        raise DataError(
            f"text {source} holds {len(pieces)} different pieces; train, validation and held-out split need one each, "
            "so give more text"
        )
    return corpus


@lru_cache
def _tell_left_out(source: Path, files: int, names: tuple[str, ...]) -> None:
    """Once, however often the same text is opened."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    say(f"text {source}: {len(names)} of {files} files hold no UTF-8 text and are left out: {shown}")


def files_of(source: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the file, or all files under a folder in order, but hidden ones.

    Raises:
        DataError: there is no such file or folder.
    """
    if not source.exists():
        raise DataError(f"text {source} does not exist; name a file or a folder of UTF-8 text")
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        return source, [path for path in paths if not _hidden(path.relative_to(source))]
    return source.parent, [source]


def _hidden(path: Path) -> bool:
    """A repository's own book-keeping is no text of its owner's."""
    return any(part.startswith(".") for part in path.parts)


def _pieces(root: Path, path: Path) -> list[Document]:
    name = path.relative_to(root).as_posix()
    if path.suffix in _ROWS:
        texts = [_text_of(row, where) for where, row in read_rows(path, "text", name)]
    else:
        texts = [
            document.text[at : at + _PIECE]
            for document in read_documents(root, [path])
            for at in range(0, len(document.text), _PIECE)
        ]
    return [Document(hashlib.sha256(text.encode()).hexdigest(), text) for text in texts]


def read_rows(path: Path, column: str, name: str | None = None) -> list[tuple[str, Any]]:
    """Rows of a `.jsonl` or `.parquet` file, each after the name of its place, such as `rows.jsonl line 3`.

    Args:
        column: the only one that is read of a `.parquet` file.
        name: of the file in places and errors; its own by default.

    Returns:
        What should be an object; a line that is not JSON reads as None.

    Raises:
        DataError: the file cannot be read.
        EnvironmentTrouble: pyarrow is needed and not installed.
    """
    name = name or path.name
    if path.suffix == ".parquet":
        return [(f"{name} row {n}", row) for n, row in enumerate(_read_parquet(path, column, name), 1)]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold the other ends of lines
    except (OSError, UnicodeDecodeError) as trouble:
        raise DataError(f"{name} cannot be read: {trouble}; it must be UTF-8 with one JSON object a line") from None
    return [(f"{name} line {n}", _parsed(line)) for n, line in enumerate(lines, 1) if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_parquet(path: Path, column: str, name: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as trouble:
        raise EnvironmentTrouble(f"{name} needs pyarrow ({trouble}): pip install 'layerboost[data]'") from None
    try:
        columns = parquet.read_schema(path).names
        if column not in columns:
            raise DataError(f"{name} has no column {column}; its columns are {', '.join(columns)}")
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=[column]).to_pylist()
    except (ArrowException, OSError) as trouble:
        raise DataError(f"{name} cannot be read as parquet: {first_line(trouble)}") from None
    return rows


def first_line(trouble: Exception) -> str:
    return next(iter(str(trouble).splitlines()), type(trouble).__name__)


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: must be a JSON object with a string under the key text")
    return well_formed(text)


def well_formed(text: str) -> str:
    """With what JSON may hold and UTF-8 may not, halves of characters, replaced: tokenizers refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
