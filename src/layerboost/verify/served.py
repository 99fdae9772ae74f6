"""What a served model answers, through the OpenAI interface of its server, against the hybrid here."""

import http.client
import json
import math
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerboost.errors import EnvironmentTrouble

NEW_TOKENS = 16
_TOP = 5
_TIMEOUT = 300  # seconds; a busy server queues


@dataclass(frozen=True)
class Answer:
    """Tokens that a server sampled greedily, and the logprobs it gave, by token, at each of them."""

    tokens: list[int]
    logprobs: list[dict[int, float]]

    @property
    def all_tokens(self) -> list[int]:
        """Those sampled, and those that a logprob was given of."""
        return [*self.tokens, *(token for step in self.logprobs for token in step)]


def ask(url: str, prompts: dict[str, Tensor]) -> dict[str, Answer]:
    """Greedy answers to `[1, T]` prompts of token numbers.

    Raises:
        EnvironmentTrouble: nothing answers there, or something that is no OpenAI server of vLLM.
    """
    url, model = served_model(url)
    return {name: _answer(url, model, tokens[0].tolist()) for name, tokens in prompts.items()}


def served_model(url: str, start: str = "layerboost serve") -> tuple[str, str]:
    """The address of the interface below a server's, and the name of the one model there.

    Args:
        start: the command that starts such a server, for the error.

    Raises:
        EnvironmentTrouble: nothing answers there, or something else, or it serves several models.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        models = [model["id"] for model in exchange(f"{url}/models", start=start)["data"]]
    except (KeyError, TypeError) as trouble:
        raise EnvironmentTrouble(
            f"{url}/models did not answer as an OpenAI server does ({type(trouble).__name__}: {trouble})"
        ) from None
    if len(models) != 1:
        raise EnvironmentTrouble(f"{url} serves {len(models)} models; one is needed to know which to compare")
    return url, models[0]


def _answer(url: str, model: str, prompt: list[int]) -> Answer:
    asked = {
        "model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": _TOP,
        "ignore_eos": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    try:
        found = exchange(f"{url}/completions", asked)["choices"][0]["logprobs"]
        return Answer(
            tokens=[_number(token) for token in found["tokens"]],
            logprobs=[{_number(token): value for token, value in step.items()} for step in found["top_logprobs"]],
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as trouble:
        raise EnvironmentTrouble(
            f"{url} did not answer with tokens and logprobs as vLLM's server does ({type(trouble).__name__}: {trouble})"
        ) from None


def _number(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def exchange(
    url: str, body: dict[str, Any] | None = None, *, start: str = "layerboost serve", refused: str = ""
) -> Any:
    """JSON for JSON: a POST where there is a body.

    Args:
        start: the command that starts such a server, for the error when none answers.
        refused: what to do about an answer that is an error.

    Raises:
        EnvironmentTrouble: nothing answers there, or what answers is an error or no JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as trouble:
        said = trouble.read(300).decode(errors="replace")
        raise EnvironmentTrouble(f"{url} answered {trouble.code}: {' '.join(said.split())}{refused}") from None
    except (OSError, ValueError, http.client.HTTPException) as trouble:
        raise EnvironmentTrouble(f"{url} cannot be reached: {trouble}; start it with {start}") from None


@torch.no_grad()
def differences(model: Any, prompts: dict[str, Tensor], answers: dict[str, Answer]) -> tuple[float, float]:
    """In nats, at worst over all answers: from a sampled token to the best one here, and from a logprob to ours."""
    from_best = from_ours = 0.0
    for name, tokens in prompts.items():
        answer = answers[name]
        whole = torch.cat([tokens, torch.tensor([answer.tokens])], 1).to(model.device)
        logits = model(whole, use_cache=False).logits[0, tokens.shape[1] - 1 : -1].float().cpu()
        for row, token, given in zip(logits.log_softmax(-1), answer.tokens, answer.logprobs, strict=True):
            from_best = max(from_best, _or_infinite(row.max().item() - row[token].item()))
            from_ours = max(
                from_ours, *(_or_infinite(abs(row[other].item() - value)) for other, value in given.items())
            )
    return from_best, from_ours


def _or_infinite(off: float) -> float:
    """A difference to what is no number is none that `max` would see."""
    return math.inf if math.isnan(off) else off
