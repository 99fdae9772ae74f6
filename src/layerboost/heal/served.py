"""A teacher that a server holds: vLLM's, or another OpenAI server that answers `prompt_logprobs`.

K scored tokens, k kept ones of the vocabulary.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from layerboost.data.sequences import Sequences
from layerboost.errors import EnvironmentTrouble, UsageError
from layerboost.heal.losses import top_k_kl
from layerboost.scoring import log_probabilities, scored_hidden
from layerboost.verify.served import exchange, served_model

_AT_ONCE = 8  # requests; the server makes batches of them
_CHECKED, _CHECKED_TOKENS = 4, 256  # documents that are compared with the teacher here, and how much of each
_FAR = 0.1  # nats of KL: rounding, also to 8 bits, is far below, another model far above


@dataclass(frozen=True)
class ServedTeacher:
    """
    Attributes:
        url: of the interface, up to `/v1`.
        top_k: tokens that are kept.
        longest: tokens of the longest document, for what errors advise.
    """

    url: str
    model: str
    top_k: int
    longest: int

    def ask(self, rows: Sequences) -> tuple[Tensor, Tensor]:
        """Of all scored tokens of the rows, one row after the other: `[K, k]` int64 ids of the likeliest tokens, and
        their `[K, k]` float32 log-probabilities.

        Raises:
            EnvironmentTrouble: the server is gone, refuses, or answers something else.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            parts = list(pool.map(lambda document: self._document(*document), documents(rows)))
        ids, found = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids, found

    def _document(self, tokens: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        at = scored.nonzero()[:, 0].tolist()
        steps = self._steps(tokens.tolist()) if at else []
        try:
            tops = [_likeliest(steps[position], self.top_k) for position in at]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as trouble:
            raise EnvironmentTrouble(
                f"{self.url} did not answer with {self.top_k} prompt_logprobs per token as vLLM's server does "
                f"({type(trouble).__name__}: {trouble}); serve the original with vLLM"
            ) from None
        shape = (len(at), self.top_k)
        return (
            torch.tensor([[token for _, token in top] for top in tops], dtype=torch.long).view(shape),
            torch.tensor([[value for value, _ in top] for top in tops], dtype=torch.float32).view(shape),
        )

    def _steps(self, tokens: list[int]) -> Any:
        """Per token, what the server found likely in its place."""
        body = {
            "model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": self.top_k,
        }  # fmt: skip
        answer = exchange(
            f"{self.url}/completions", body, start=_start(self.top_k),
            refused=f"; the teacher's server needs --max-logprobs {self.top_k} and --max-model-len {self.longest + 1} "
            "or more",
        )  # fmt: skip
        try:
            return answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            return None  # said by the caller, who cannot read it either


def _start(top_k: int) -> str:
    return f"vllm serve MODEL --max-logprobs {top_k}"


def _likeliest(step: dict[str, dict[str, Any]], top_k: int) -> list[tuple[float, int]]:
    """The best of a token's answers: vLLM adds the token that stands there, where it is not among them."""
    best = sorted(((float(of["logprob"]), int(token)) for token, of in step.items()), reverse=True)[:top_k]
    if len(best) < top_k:
        raise ValueError(f"{len(best)} logprobs of a token")
    return best


def documents(rows: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Every document by itself, as `[n]` token ids and `[n]` bool, which of them are scored; padding is left out.

    A server cannot keep the documents of a packed row from seeing one another.
    """
    for number in range(len(rows)):
        tokens, scored = rows.tokens[number], rows.scored[number]
        if rows.positions is None:
            yield tokens, scored
            continue
        positions = rows.positions[number]
        real = positions >= 0
        later = (positions[real] == 0).nonzero()[1:, 0]
        yield from zip(tokens[real].tensor_split(later), scored[real].tensor_split(later), strict=True)


def open_teacher(url: str, healer: Any, rows: Sequences, top_k: int) -> ServedTeacher:
    """A server's model, after comparing it with the teacher that is here.

    Compared are log-probabilities of the likeliest tokens, on the first scored tokens of the first documents: whatever
    makes a model another one (weights, a plan, a vocabulary) changes them, and nothing else does.

    Raises:
        EnvironmentTrouble: nothing answers there, or it refuses.
        UsageError: it serves another model.
    """
    address, model = served_model(url, start=_start(top_k))
    longest = max(len(tokens) for tokens, _ in documents(rows))
    served = ServedTeacher(address, model, top_k, longest)
    asked = ((tokens, scored) for tokens, scored in documents(rows) if scored.any())
    for tokens, scored in islice(asked, _CHECKED):
        end = int(scored.nonzero()[0]) + _CHECKED_TOKENS
        tokens, scored = tokens[:end], scored[:end]
        distance = _distance(served, healer, Sequences(tokens[None], scored[None]))
        if not distance < _FAR:
            raise UsageError(
                f"{address} serves {model}, which is another model than the teacher: their likeliest tokens differ by "
                f"{distance:.2f} nats (KL), where rounding makes less than {_FAR}; serve the original there, or leave "
                "signals_from out"
            )
    return served


def _distance(served: ServedTeacher, healer: Any, document: Sequences) -> float:
    """Mean KL, in nats, of the teacher here from what a server says; infinite where it names other tokens."""
    ids, expected = served.ask(document)
    if ids.min() < 0 or ids.max() >= healer.model.config.vocab_size:
        return float("inf")
    with healer.teacher():
        final = healer.see(document).final
        own = log_probabilities(scored_hidden(final, document.scored.to(final.device)), healer.head).cpu()
    return top_k_kl(own, ids, expected).mean().item()
