"""What healing trains on besides the built-in corpus: a user's text and chats, data sets of the Hugging Face hub, and
what the teacher itself writes.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerboost.artifacts import Record, file_digest, intact, publish_folder, text_digest, write_text
from layerboost.data.corpus import Corpus, Document, files_of, first_line, read_rows, well_formed
from layerboost.data.sequences import Piece, Sequences, Wanted, fill_rows, tokenised
from layerboost.errors import DataError, EnvironmentTrouble
from layerboost.progress import progress

# prompts `[B, P]`, new tokens, seed -> `[B, P + new]`, int64, the prompts first
Generate = Callable[[Tensor, int, int], Tensor]

_TAKEN: dict[str, tuple[str, ...]] = {
    "text": ("path",), "chat": ("path",), "hub": ("path", "subset", "split", "column", "revision"),
    "generated": ("path",), "probes": (),
}  # fmt: skip
_NEED_PATH = {"chat": "a .jsonl or .parquet file", "hub": "a data set such as owner/name"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOGETHER = 64  # rows of a data set, or prompts, that are worked on at once


class Source(Record):
    """Training data of one kind, and its share.

    Attributes:
        kind: `text` and what the teacher writes after its beginnings (`generated`), `chat` conversations, a data set
            of the `hub`, or recall `probes`.
        path: a file, or for text a folder; of the hub, a data set's name or a local folder. Text and generated text
            without a path come from the corpus that evaluation takes another split of.
        weight: share of the rows, as a part of all sources' weights.
        subset, split, column, revision: of a data set of the hub.
    """

    kind: Literal["text", "chat", "hub", "generated", "probes"]
    path: str | None = None
    weight: float = Field(1.0, gt=0)
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "Source":
        if self.kind in _NEED_PATH and not self.path:
            raise ValueError(f"kind {self.kind} needs a path: {_NEED_PATH[self.kind]}")
        known = ("kind", "weight", *_TAKEN[self.kind])
        for name, field in type(self).model_fields.items():
            if name not in known and getattr(self, name) != field.default:
                raise ValueError(f"kind {self.kind} takes no {name}; its keys are {', '.join(known)}")
        return self


def sources_digest(sources: Sequence[Source]) -> str:
    """sha256 over what decides the rows: all settings, and the contents of local files wherever they are.

    The corpus that sources without a path read has a digest of its own.

    Raises:
        DataError: a file does not exist.
    """
    return text_digest([_identity(source) | {"weight": source.weight} for source in sources])


def _identity(source: Source) -> dict[str, Any]:
    settings = source.model_dump(exclude={"weight"})
    if source.path is None or (source.kind == "hub" and not Path(source.path).exists()):
        return settings
    if source.kind == "chat":
        _check_chats(Path(source.path))
    root, files = files_of(Path(source.path))
    return settings | {"path": {path.relative_to(root).as_posix(): file_digest(path) for path in files}}


def check_sources(sources: Sequence[Source]) -> None:
    """Raises DataError for what can be told without a tokenizer: files are there, and chats hold conversations."""
    sources_digest(sources)
    for source in sources:
        if source.kind == "chat":
            for where, row in read_rows(Path(str(source.path)), "messages"):
                _messages_of(where, row)


def _check_chats(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"chats {path} must be a .jsonl or .parquet file, and it is not there; name another path")


def cache_folder() -> Path:
    """Where data sets of the hub are kept: `layerboost` in XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerboost"


def text_rows(documents: Sequence[Document], name: str, tokenizer: Any, wanted: Wanted) -> Sequences:
    """Rows of randomly chosen pieces of the documents, all of it scored.

    Args:
        name: what the documents are called in errors.

    Raises:
        DataError: they hold less than one row.
    """
    return fill_rows(_pieces(documents, tokenizer, wanted), name, wanted)


def _pieces(documents: Sequence[Document], tokenizer: Any, wanted: Wanted) -> Iterator[Piece]:
    return tokenised(documents, tokenizer, piece=4 * wanted.length, seed=wanted.seed)


def hub_rows(source: Source, tokenizer: Any, wanted: Wanted, cache: Path, without: Set[str]) -> Sequences:
    """Rows of a data set's first texts, as many as hold the tokens; these are read once, and then kept in the cache.

    Args:
        without: texts that are left out.

    Raises:
        DataError: there is no such data set, subset, split or column, the hub cannot be reached, or it is too little.
        EnvironmentTrouble: datasets is not installed, or the cache cannot be written.
    """
    key = text_digest([_identity(source), wanted.tokens, wanted.length, tokenizer.get_vocab()])
    kept = cache / f"hub-{key[:32]}.jsonl"
    if not kept.exists():
        rows, held = _hub_rows(source), 0
        documents: list[Document] = []
        while held < wanted.tokens and (more := list(itertools.islice(rows, _TOGETHER))):
            read = [Document("", _column_of(row, source)) for row in more]
            held += sum(len(ids) for ids, _ in _pieces(read, tokenizer, wanted))
            documents += read
        write_text(kept, "".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    documents = [Document(where, row["text"]) for where, row in read_rows(kept, "text") if row["text"] not in without]
    return text_rows(documents, f"data set {source.path}", tokenizer, wanted)


def _hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as trouble:
        raise EnvironmentTrouble(f"kind hub needs datasets ({trouble}): pip install 'layerboost[data]'") from None
    try:
        yield from datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as trouble:  # of the network, the hub, and any of the formats it has
        raise DataError(
            f"data set {source.path} cannot be read: {first_line(trouble)}; check its name, subset, split and "
            "revision, and the network"
        ) from None


def _column_of(row: dict[str, Any], source: Source) -> str:
    text = row.get(source.column)
    if not isinstance(text, str):
        raise DataError(
            f"data set {source.path} has no text in column {source.column}; name another of its columns: "
            f"{', '.join(row)}"
        )
    return well_formed(text)


def chat_rows(source: Source, tokenizer: Any, wanted: Wanted) -> Sequences:
    """Rows of randomly chosen conversations, of which the assistant's words alone are scored.

    A conversation longer than a row is cut at its end, and dropped where nothing scored is left.

    Raises:
        DataError: the file cannot be read, a row is no conversation, the tokenizer's chat template does not fit, or
            there is less than one row.
    """
    return fill_rows(_answers(source, tokenizer, wanted), f"chats {source.path}", wanted)


def _answers(source: Source, tokenizer: Any, wanted: Wanted) -> Iterator[Piece]:
    """Conversations in random order, cut to a row's length, with something scored in each."""
    path, length = Path(str(source.path)), wanted.length
    _check_chats(path)
    rows = read_rows(path, "messages")
    masked = _masked_by_template if _GENERATION.search(_template(tokenizer)) else _masked_by_prefix
    for i in np.random.default_rng(wanted.seed).permutation(len(rows)).tolist():
        ids, scored = masked((rows[i][0], _messages_of(*rows[i])), tokenizer)
        if scored[1:length].any():
            yield ids[:length], scored[:length]


_Chat = tuple[str, list[dict[str, Any]]]  # its place in the file, and the messages


def _template(tokenizer: Any) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            "the tokenizer has no chat template, which kind chat needs; save one with the model, as chat_template.jinja"
        ) from None
    return template


def _messages_of(where: str, row: Any) -> list[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    texts = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not messages or not texts:
        raise DataError(f"{where}: must be a JSON object with messages, a list of objects with role and content")
    return [message | {"content": well_formed(message["content"])} for message in messages]


def _rendered(chat: _Chat, end: int | None, tokenizer: Any, **settings: Any) -> Any:
    where, messages = chat
    try:
        return tokenizer.apply_chat_template(messages[:end], **settings)
    except Exception as trouble:  # templates are other people's code: anything may come out of it
        raise DataError(f"{where}: the chat template cannot render it: {first_line(trouble)}") from None


def _masked_by_template(chat: _Chat, tokenizer: Any) -> Piece:
    """The template itself marks what the assistant says."""
    tokens = _rendered(chat, None, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    return np.array(tokens["input_ids"], dtype=np.int64), np.array(tokens["assistant_masks"], dtype=bool)


def _masked_by_prefix(chat: _Chat, tokenizer: Any) -> Piece:
    """The assistant says what its turn adds to the messages before it and the header of an answer.

    Texts are compared, not tokens: a token may reach from the header into the answer, and then is not scored.
    """
    where, messages = chat
    text = _rendered(chat, None, tokenizer, tokenize=False)
    offsets = {"return_offsets_mapping": True}
    tokens = _rendered(chat, None, tokenizer, return_dict=True, tokenizer_kwargs=offsets)
    begins = np.array(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    scored = np.zeros(len(begins), dtype=bool)
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = _rendered(chat, i, tokenizer, tokenize=False, add_generation_prompt=True)
        after = _rendered(chat, i + 1, tokenizer, tokenize=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{where}: the chat template writes what came before in another way once an answer is there, so the "
                "answer's tokens cannot be told; mark them in the template with {% generation %}, or give "
                "conversations with one answer each"
            )
        scored |= (begins >= len(before)) & (begins < len(after))
    return np.array(tokens["input_ids"], dtype=np.int64), scored


def generated_rows(
    corpus: Corpus, tokenizer: Any, wanted: Wanted, generate: Generate, cache: Path | None, teacher: str
) -> Sequences:
    """Rows that begin with an eighth of text of the train split, not scored; the teacher writes the rest, scored.

    Args:
        cache: where tokens are kept as they are written, so that the same call goes on after a kill.
        teacher: the digest of the model that writes; tokens are kept apart by it.

    Raises:
        DataError: no text is that long.
        EnvironmentTrouble: the cache cannot be written.
    """
    start = max(1, wanted.length // 8)
    texts = tokenised(corpus.split("train"), tokenizer, piece=wanted.length, seed=wanted.seed)
    prompts = list(itertools.islice((ids[:start] for ids, _ in texts if len(ids) >= start), wanted.rows))
    if not prompts:
        raise DataError(f"text {corpus.name}: its train split has no {start} tokens to begin with; give more text")
    chosen = torch.from_numpy(np.stack(prompts))[torch.arange(wanted.rows) % len(prompts)]
    parts = []
    with progress("write text", wanted.rows) as advance:
        for number, batch in enumerate(chosen.split(_TOGETHER)):
            parts.append(_written(batch, wanted.length - start, wanted.seed + number, generate, cache, teacher))
            advance(len(batch))
    tokens = torch.cat(parts)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, :start] = False
    return Sequences(tokens, scored)


def _written(prompts: Tensor, new: int, seed: int, generate: Generate, cache: Path | None, teacher: str) -> Tensor:
    if cache is None:
        return generate(prompts, new, seed).cpu()
    kept = cache / f"generated-{text_digest([teacher, prompts.tolist(), new, seed])[:32]}"
    if not intact(kept, deep=True):
        tokens = generate(prompts, new, seed).cpu().contiguous()
        with publish_folder(kept) as partial:
            try:
                save_file({"tokens": tokens}, partial / "tokens.safetensors")
            except SafetensorError as trouble:
                raise EnvironmentTrouble(f"{kept} cannot be written: {trouble}; free some space") from None
    return load_file(kept / "tokens.safetensors")["tokens"]
