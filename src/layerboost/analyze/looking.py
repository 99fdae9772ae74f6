"""What an analysis looks at: text, recall probes, and what else the settings ask for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerboost.data.corpus import open_corpus, well_formed
from layerboost.data.probes import PROBES, probe_sequences
from layerboost.data.samples import TEXT, TURN, check_vocabulary, probe_lengths, probe_maker, samples, sequence_length
from layerboost.data.sequences import Sequences, beginning, text_sequences
from layerboost.errors import DataError
from layerboost.model.hybrid import Hybrid
from layerboost.progress import say
from layerboost.scoring import generate

if TYPE_CHECKING:
    from layerboost.analyze import Config

_LONG_PROBES = ("key_value", "needle")


def kinds(config: "Config") -> list[str]:
    """Names of all that an analysis with these settings looks at."""
    distances = _distances(config)
    found = [TEXT, *(_name(probe, distance, distances) for distance in distances for probe in PROBES)]
    asked = {"long": config.long_answers, "generation": config.generations, "prompts": config.prompts is not None}
    return found + [kind for kind, wanted in asked.items() if wanted]


def _distances(config: "Config") -> list[int | None]:
    return [*config.distance] if isinstance(config.distance, list) else [config.distance]


def lengths(config: "Config", windows: Sequence[int], context: int) -> tuple[int, list[int]]:
    """Length and distances of recall probes, in tokens; where a window reaches half a probe's length, they get longer.

    Args:
        windows: besides those of `config.mixers`.

    Raises:
        DataError: they do not fit the model, or a window reaches as far as a distance.
    """
    wanted = sequence_length(config, context)
    found = [probe_lengths(wanted, distance, all_windows(config, windows), context) for distance in _distances(config)]
    return max(length for length, _ in found), [distance for _, distance in found]


def all_windows(config: "Config", windows: Sequence[int]) -> list[int]:
    """Those that are tried: these, and those of further mixers."""
    return [*windows, *(mixer.window for mixer in config.mixers if mixer.window is not None)]


def tokens(config: "Config", windows: Sequence[int], context: int) -> int:
    """Of one helping of data, prompts of the user's own left out."""
    length, distances = lengths(config, windows, context)
    return (
        (config.texts + len(PROBES) * len(distances) * config.answers) * length
        + config.long_answers * _long_length(config, length, context)
        + config.generations * (length // 2 + config.new_tokens)
    )


def _long_length(config: "Config", length: int, context: int) -> int:
    return min(config.long_length or 4 * length, context)


def _name(probe: str, distance: int | None, distances: Sequence[int | None]) -> str:
    return f"{probe}@{distance}" if len(distances) > 1 else probe


class Looking:
    """Draws the data of an analysis, as many helpings as it asks for.

    Attributes:
        length, distances: of recall probes, in tokens.
    """

    def __init__(self, model: Hybrid, tokenizer: Any, config: "Config", windows: list[int]) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.corpus = open_corpus(config.text)
        self.context: int = model.config.max_position_embeddings
        self.widest = max(all_windows(config, windows), default=0)
        self.length, self.distances = lengths(config, windows, self.context)
        if self.length != (wanted := sequence_length(config, self.context)):
            say(f"probes are {self.length} tokens long instead of {wanted}, so that no window reaches their answers")

    def data(self, turn: int) -> dict[str, Sequences]:
        """Sequences by kind; another turn gives others.

        Raises:
            DataError: too little text, or a prompts file that is not one.
        """
        found: dict[str, Sequences] = {}
        for number, distance in enumerate(self.distances):
            more = self._samples(distance, self.config.seed + (distance if number else 0), turn)
            found.setdefault(TEXT, more.pop(TEXT))
            found |= {_name(probe, distance, self.distances): sequences for probe, sequences in more.items()}
        if self.config.long_answers:
            found["long"] = self._long(turn)
        if self.config.generations:
            found["generation"] = self._completions(found[TEXT])
        if self.config.prompts is not None and turn == 0:
            found["prompts"] = self._prompts(self.config.prompts)
        return found

    def has_text(self, turn: int) -> bool:
        """Whether there is text that the turns before did not have."""
        count, train = turn * self.config.texts + 2, self.corpus.split("train")
        return len(text_sequences(train, self.tokenizer, count=count, length=self.length, seed=0)) == count

    def _samples(self, distance: int, seed: int, turn: int) -> dict[str, Sequences]:
        return samples(
            self.corpus, self.tokenizer, self.model.config.vocab_size, split="train", texts=self.config.texts,
            answers=self.config.answers, length=self.length, distance=distance, seed=seed, turn=turn,
        )  # fmt: skip

    def _long(self, turn: int) -> Sequences:
        """Answers to questions about what stands early in long prompts."""
        length = _long_length(self.config, self.length, self.context)
        if length // 2 < self.widest:
            raise DataError(
                f"long prompts of {length} tokens ask for what is {length // 2} tokens back, within a window of "
                f"{self.widest}; choose a long_length of at least {2 * self.widest}, or narrower windows"
            )
        maker = probe_maker(
            self.corpus, self.tokenizer, self.model.config.vocab_size, split="train", length=length,
            seed=self.config.seed + TURN * turn + 1,
        )  # fmt: skip
        counts = [(self.config.long_answers + i) // len(_LONG_PROBES) for i in range(len(_LONG_PROBES))]
        return Sequences.concatenate(
            [
                probe_sequences(maker, probe, count=count, length=length, distance=length // 2)
                for probe, count in zip(_LONG_PROBES, counts, strict=True)
                if count
            ]
        )

    @torch.no_grad()
    def _completions(self, text: Sequences) -> Sequences:
        """Beginnings of text with the original's own greedy completion, which is what counts."""
        asked = self.config.new_tokens
        prompts = text.tokens[: self.config.generations, : self.length // 2].to(self.model.device)
        if len(prompts) < self.config.generations:
            raise DataError(
                f"generations {self.config.generations} begin with {len(text)} texts; ask for as many texts or fewer "
                "generations"
            )
        if prompts.shape[1] + asked > self.context:
            raise DataError(
                f"{prompts.shape[1]} tokens of text and {asked} new_tokens do not fit the model's context of "
                f"{self.context}; ask for fewer new_tokens or a shorter length"
            )
        tokens = generate(self.model, prompts, asked, do_sample=False).cpu()
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        scored[:, prompts.shape[1] :] = True
        return Sequences(tokens, scored)

    def _prompts(self, path: Path) -> Sequences:
        """A user's own, one JSON object per line: `text`, or `prompt` and `answer`, of which the answer counts."""
        rows: list[tuple[list[int], int]] = []
        begin = [token for token in (beginning(self.tokenizer),) if token is not None]
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold the other ends of lines
        except (OSError, UnicodeDecodeError) as trouble:
            raise DataError(f"prompts {path} cannot be read: {trouble}; name a file of JSON lines") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompt, answer = _prompt_of(line, f"{path.name} line {number}")
                before = self._ids(prompt) if prompt else []
                tokens = begin + (before + self._ids(answer))[len(begin) - self.context :]
                rows.append((tokens, max(1, len(tokens) - len(self._ids(answer)))))
        rows = [(tokens, start) for tokens, start in rows if len(tokens) > start]
        if len(rows) < 2:
            raise DataError(f"prompts {path} holds {len(rows)} usable lines, at least 2 are needed")
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # what stands to the right of a prompt changes nothing
        scored = torch.zeros(len(rows), longest, dtype=torch.bool)
        for n, (tokens, start) in enumerate(rows):
            ids[n, : len(tokens)] = torch.tensor(tokens)
            scored[n, start : len(tokens)] = True
        check_vocabulary(ids, self.model.config.vocab_size)
        return Sequences(ids, scored)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt_of(line: str, where: str) -> tuple[str, str]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raw = None
    for keys in (("prompt", "answer"), ("text",)):
        if isinstance(raw, dict) and set(raw) == set(keys) and all(isinstance(raw[key], str) for key in keys):
            texts = [well_formed(raw[key]) for key in keys]
            return (texts[0], texts[1]) if len(keys) > 1 else ("", texts[0])
    raise DataError(
        f"{where}: must be a JSON object with the keys prompt and answer, or with the key text, all strings"
    )
