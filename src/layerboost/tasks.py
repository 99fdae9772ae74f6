"""Any task of EleutherAI's lm-evaluation-harness, by name: of one model, or as a probe of what many plans of it lose.

One model is measured by the harness alone, with its own `HFLM`. Many plans make it ask twice: the first time its
questions are noted; they are then answered under all plans together, with every common beginning of the plans computed
once; and for each plan it asks again, gets that plan's answers, and computes its metrics itself. Task data come from
this machine: nothing is downloaded, and no code but the harness's own and that beside a task's YAML runs.

B requests, T tokens, E hidden size, K scored tokens, V vocabulary, D documents, L layers.
"""

import difflib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria

from layerboost.artifacts import TaskScore, file_digest
from layerboost.errors import (
    CheckpointError,
    DataError,
    EnvironmentTrouble,
    LayerBoostError,
    UsageError,
    out_of_memory,
)
from layerboost.layer_plan import LayerPlan
from layerboost.measured import Measured, tensor_digest
from layerboost.model.hybrid import Hybrid, LogitsHead
from layerboost.passes import Plans, count_layers, finals, neighbours
from layerboost.progress import Advance, unheard
from layerboost.scoring import CHUNK_ELEMENTS, batch_rows, log_probabilities

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a context, and of the continuation that is scored
Likelihoods = dict[Pair, tuple[float, bool]]  # log-probability in nats, and whether greedy decoding would write it
Texts = dict[tuple[str, str], str]  # what is written after a prompt, under generation settings in JSON
Asked = dict[str, dict[str, Any]]  # per name of a task, group or tag, what the harness loads under it

# The metric of a document is the first of these that the task has, or else its own first.
MAIN_METRICS = ("acc", "acc_norm", "exact_match", "bits_per_byte")
_SEED = 1234  # the harness's own: few-shot examples are the same for every plan
_NEW_TOKENS = 256  # what the harness lets a model write where a task sets no limit


def task_scores(
    model: Hybrid,
    tokenizer: Any,
    plans: Plans,
    asked: Asked,
    *,
    limit: int | None = None,
    advance: Advance = unheard,
    kept: Measured | None = None,
) -> tuple[list[dict[str, np.ndarray]], float]:
    """What every plan scores on each document of harness tasks.

    Every score is the harness's aggregate over that document alone, of the first of `MAIN_METRICS` that the task has
    (otherwise of its first metric) under its first filter, with its sign turned where lower is better. Writing is
    greedy, whatever the task says; no chat template is applied; a group or tag counts as all of its tasks together.

    Args:
        asked: from `load_tasks`.
        limit: documents of each task, its first; all of them by default.
        advance: hears of one step per plan.
        kept: answers that are known are not computed again.

    Returns:
        Per plan, per name, `[D]` float64, higher is better, with the documents in the same order for every plan; and
        the passes of all requests through the whole model, where a layer run for several plans counts once.

    Raises:
        DataError: the harness cannot work with a task's data.
    """
    kept = kept or Measured()
    player = _player_class()(model, tokenizer)
    _play(player, asked, limit)
    pairs, prompts = list(player.likelihoods), list(player.texts)
    likelihoods, computed, tokens = _likelihoods(
        model, player.length, pairs, plans, kept, unheard if prompts else advance
    )
    scores, written = [], 0
    for plan, player.likelihoods in zip(plans, likelihoods, strict=True):
        player.texts, count = _texts(model, tokenizer, player.length, prompts, plan, kept)
        written += count
        scores.append(_play(player, asked, limit))
        if prompts:
            advance()
        if len(player.likelihoods) > len(pairs) or len(player.texts) > len(prompts):
            raise DataError(
                f"{', '.join(asked)}: the harness asks other questions every time; leave out what is random"
            )
    if not plans or not tokens + written:
        return scores, 0.0
    return scores, (computed / len(model.decoder_layers) + written) / (tokens + written / len(plans))


def task_results(
    model: Any, tokenizer: Any, asked: Asked, *, limit: int | None = None, batch: int = 8, advance: Advance = unheard
) -> dict[str, dict[str, TaskScore]]:
    """What the harness finds for one model: the numbers are those that it gives for the checkpoint's folder.

    Nothing is cached: the harness's cache would not know a hybrid from its original.

    Args:
        asked: from `load_tasks`.
        limit: documents of each task, its first; all of them by default.
        batch: requests at once; other batches round otherwise.
        advance: hears of one step per name.

    Returns:
        Per task and metric. A group that has a score of its own stands for its tasks; other groups and tags do not.

    Raises:
        DataError: the harness cannot work with a task's data, or finds nothing.
    """
    found: dict[str, dict[str, TaskScore]] = {}
    for name, loaded in asked.items():
        with _harness(f"task {name}"), torch.random.fork_rng():
            from lm_eval import evaluator
            from lm_eval.models.huggingface import HFLM

            _prepare(loaded["tasks"].values())
            torch.manual_seed(_SEED)  # of tasks that draw what is written
            judge = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
            results = evaluator.evaluate(judge, loaded, limit=limit, log_samples=False)
        own = _metrics(results, name)
        found |= {name: own} if own else {task: _metrics(results, task) for task in loaded["tasks"]}
        if not any(found.get(task) for task in (name, *loaded["tasks"])):
            raise DataError(f"task {name}: lm-eval finds no metric for it; use another task")
        advance()
    return found


def _metrics(results: dict[str, Any], task: str) -> dict[str, TaskScore]:
    """A task's row of the harness's results, where a metric is called `acc,none`: by its filter, if it has one."""
    row = results["results"].get(task, {})
    better = results["higher_is_better"].get(task, {})
    found = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            found[metric if kind == "none" else f"{metric}, {kind}"] = TaskScore(
                value=_finite(value), stderr=_finite(row.get(f"{metric}_stderr,{kind}")),
                higher_is_better=better.get(metric), documents=row["sample_len"],
            )  # fmt: skip
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def task_files(folder: Path | None) -> dict[str, str]:
    """Digests of the files in a folder of tasks: what they are, their code, and data beside them that they name."""
    if folder is None:
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if path.suffix in (".yaml", ".py")]
    said = "".join(path.read_text(encoding="utf-8", errors="replace") for path in own)
    return {f"task {path.relative_to(folder)}": file_digest(path) for path in files if path in own or path.name in said}


def load_tasks(names: Sequence[str], folder: Path | None = None) -> Asked:
    """Per name, the harness's `tasks` by their own names, and its `groups`.

    Args:
        folder: where further task YAMLs are, which may name functions in Python files beside them.

    Raises:
        UsageError: there is no such task, or one asks for code from elsewhere.
        DataError: a task's data are not on this machine.
        EnvironmentTrouble: the harness is not installed.
    """
    if not names:
        return {}
    with _harness("lm-eval's tasks cannot be listed"):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder) if folder else None)
    found = {}
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(_unknown(name, manager, folder))
        _refuse_code(manager, [name])
        with _harness(f"task {name} cannot be read from this machine, and tasks are not downloaded"):
            found[name] = dict(manager.load([name]))
        _refuse_code(manager, found[name]["tasks"])
    return found


def _refuse_code(manager: Any, tasks: Iterable[str]) -> None:
    for task in tasks:
        config = getattr(manager.task_index.get(task), "cfg", None) or {}
        if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
            raise UsageError(f"task {task} asks for trust_remote_code; code that comes with data is not run")


def _unknown(name: str, manager: Any, folder: Path | None) -> str:
    message = f"lm-eval has no task {name!r}"
    if close := difflib.get_close_matches(name, manager.all_tasks, n=3):
        message += f"; did you mean {', '.join(close)}?"
    if folder is None:
        return message
    root = folder.resolve()
    own = [task for task, entry in manager.task_index.items() if entry.yaml_path and root in entry.yaml_path.parents]
    return f"{message}; {folder} has {', '.join(sorted(own)[:20]) or 'no task'}"


@contextmanager
def _harness(what: str) -> Iterator[None]:
    """The harness at work: silent, offline, and any trouble of its own a line that begins with `what`."""
    try:
        import datasets
        import evaluate
        import huggingface_hub
        import lm_eval  # noqa: F401
    except ImportError as trouble:
        raise EnvironmentTrouble(f"tasks need lm-eval ({trouble}): pip install 'layerboost[tasks]'") from None
    disabled = logging.root.manager.disable
    try:
        with ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(null))
            stack.enter_context(redirect_stderr(null))
            stack.callback(logging.disable, disabled)
            logging.disable(logging.CRITICAL)
            # these libraries read HF_HUB_OFFLINE once, when they are imported
            stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(datasets.config, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(evaluate.config, "HF_EVALUATE_OFFLINE", True))
            yield
    except LayerBoostError:
        raise
    except Exception as trouble:  # tasks are other people's code: anything may come out of it
        if out_of_memory(trouble):
            raise
        line = next(iter(str(trouble).splitlines()), "")
        raise DataError(f"{what}: {type(trouble).__name__}: {line}") from None


@cache
def _player_class() -> Any:
    with _harness("lm-eval cannot be used"):
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class PlayedLM(TemplateLM):
        """A model for the harness that answers from tables, and adds what they lack with a dummy answer.

        Tokens are those of the harness's own `HFLM`: pairs are split by `TemplateLM`.
        """

        def __init__(self, model: Hybrid, tokenizer: Any) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.length = int(model.config.max_position_embeddings)
            self.likelihoods: Likelihoods = {}
            self.texts: Texts = {}
            self._encoded: dict[tuple[str, bool], list[int]] = {}

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            for token in found:
                if token is not None:
                    return token
            raise CheckpointError("the tokenizer has neither a beginning nor an end of text: no text can begin")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
            key = string, add_special_tokens
            if key not in self._encoded:  # the harness asks once per plan
                self._encoded[key] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
            return self._encoded[key]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return [self._likelihood(context, continuation) for _, context, continuation in requests]

        def _likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
            pair = tuple(context) or (self.prefix_token_id,), tuple(continuation)
            return self.likelihoods.setdefault(pair, (0.0, False))

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            totals = []
            for (string,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(string), prefix_token=self.prefix_token_id, max_seq_len=self.length, context_len=1
                )
                totals.append(sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return [
                self.texts.setdefault((prompt, json.dumps(settings, sort_keys=True, default=str)), "")
                for prompt, settings in (request.args for request in requests)
            ]

    return PlayedLM


def _prepare(tasks: Iterable[Any]) -> None:
    """As `lm_eval.simple_evaluate` does, so that few-shot examples are the same every time."""
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)


def _play(player: Any, asked: Asked, limit: int | None) -> dict[str, np.ndarray]:
    """Per name, `[D]` scores that the harness computes from a player's answers."""
    scores = {}
    for name, loaded in asked.items():
        tasks = loaded["tasks"]
        with _harness(f"task {name}"):
            from lm_eval import evaluator

            _prepare(tasks.values())
            found = evaluator.evaluate(player, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
            values = [_per_document(task, found["samples"][own]) for own, task in tasks.items()]
            scores[name] = np.concatenate(values)
    return scores


def _per_document(task: Any, samples: list[dict[str, Any]]) -> np.ndarray:
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    names = samples[0]["metrics"]
    metric = next((name for name in MAIN_METRICS if name in names), names[0])
    aggregate = task.aggregation().get(metric, np.mean)
    sign = -1 if task.higher_is_better().get(metric) is False else 1
    return np.array([sign * float(aggregate([sample[metric]])) for sample in samples])


@torch.no_grad()
def _likelihoods(
    model: Hybrid, length: int, pairs: Sequence[Pair], plans: Plans, kept: Measured, advance: Advance
) -> tuple[list[Likelihoods], int, int]:
    """Per plan, what the pairs get; and layers times tokens computed, and tokens.

    Args:
        length: the model's context, tokens; what is longer loses its beginning.
    """
    head = LogitsHead(model)
    found: list[Likelihoods] = [{} for _ in plans]
    pairs = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))  # little padding, and the largest batch first
    computed = tokens = start = stepped = 0
    while start < len(pairs):
        longest = min(length, len(pairs[start][0]) + len(pairs[start][1]))
        rows = batch_rows(longest, model.config.vocab_size, model.config.hidden_size, 1)
        some = pairs[start : start + rows]
        start += len(some)
        inputs, targets, scored = (part.to(model.device) for part in _padded(some, length))
        tokens += inputs.numel()
        batch = tensor_digest(inputs, targets, scored)
        keys = [kept.key("task", batch, [layer.label for layer in plan]) for plan in plans]
        unknown = [p for p, key in enumerate(keys) if key not in kept]
        for chosen in neighbours([plans[p] for p in unknown], inputs.numel() * model.config.hidden_size):
            part = [plans[unknown[i]] for i in chosen]
            computed += inputs.numel() * count_layers(part)
            for _, p, final in finals(model, [inputs], part):
                values, hits = _scores(final[scored], head, targets[scored])
                values, hits, owner = values.cpu(), hits.cpu(), scored.nonzero()[:, 0].cpu()  # not all have float64
                total = torch.zeros(len(some), dtype=torch.float64)
                total.index_add_(0, owner, values.double())
                missed = torch.bincount(owner[~hits], minlength=len(some))
                kept[keys[unknown[chosen[p]]]] = [total.tolist(), (missed == 0).tolist()]
        for own, key in zip(found, keys, strict=True):
            own.update(zip(some, zip(*kept[key], strict=True), strict=True))
        steps = len(plans) * start // len(pairs) - stepped
        stepped += steps
        advance(steps)
    return found, computed, tokens


def _padded(pairs: Sequence[Pair], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T]` each: inputs, the tokens that follow them, and which of these count.

    Padding is on the right, where nothing that counts can see it.
    """
    whole = [torch.tensor((context + continuation)[-length - 1 :]) for context, continuation in pairs]
    counts = [
        torch.arange(len(tokens) - 1) >= len(tokens) - 1 - len(continuation)
        for tokens, (_, continuation) in zip(whole, pairs, strict=True)
    ]
    parts = [tokens[:-1] for tokens in whole], [tokens[1:] for tokens in whole], counts
    inputs, targets, scored = (pad_sequence(part, batch_first=True) for part in parts)
    return inputs, targets, scored


def _scores(hidden: Tensor, head: LogitsHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`[K, E]` and `[K]` to each target's log-probability in nats and whether it is the likeliest, `[K]` each."""
    values, hits = [hidden.new_zeros(0)], [targets.new_zeros(0, dtype=torch.bool)]
    rows = max(1, CHUNK_ELEMENTS // head.out_features)
    for some, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        found = log_probabilities(some, head)
        values.append(found.gather(-1, target[:, None])[:, 0])
        hits.append(found.argmax(-1) == target)
    return torch.cat(values), torch.cat(hits)


class _Until(StoppingCriteria):
    """Stops a row once what it has written contains one of some strings."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


@torch.no_grad()
def _texts(
    model: Hybrid,
    tokenizer: Any,
    length: int,
    prompts: Sequence[tuple[str, str]],
    plan: Sequence[LayerPlan],
    kept: Measured,
) -> tuple[Texts, int]:
    """What a plan writes greedily after each prompt, and the tokens it worked on."""
    found: Texts = {}
    worked = 0
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for settings, group in groupby(sorted(prompts, key=lambda prompt: prompt[1]), key=lambda prompt: prompt[1]):
        stops, new = _settings(json.loads(settings))
        if new >= length:
            raise DataError(f"a task wants {new} tokens written, and the model's context is {length}; use another task")
        encoded = [(prompt, tokenizer.encode(prompt[0])[new - length :]) for prompt in group]
        encoded.sort(key=lambda pair: -len(pair[1]))
        longest = len(encoded[0][1]) + new
        rows = batch_rows(longest, model.config.vocab_size, model.config.hidden_size, 1)
        for start in range(0, len(encoded), rows):
            some = encoded[start : start + rows]
            ids = pad_sequence([torch.tensor(ids) for _, ids in some], batch_first=True, padding_side="left")
            there = [torch.ones(len(ids), dtype=torch.long) for _, ids in some]
            mask = pad_sequence(there, batch_first=True, padding_side="left")
            key = kept.key("written", tensor_digest(ids, mask), new, stops, [layer.label for layer in plan])
            if key not in kept:
                with model.mixed(dict(enumerate(plan))):
                    whole = model.generate(
                        input_ids=ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        max_new_tokens=new,
                        do_sample=False,
                        stopping_criteria=[_Until(tokenizer, stops, ids.shape[1])],
                        pad_token_id=padding,
                    )
                texts = tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
                kept[key] = [whole.numel(), texts]
            written, texts = kept[key]
            worked += written
            for (prompt, _), text in zip(some, texts, strict=True):
                for stop in stops:
                    text = text.split(stop)[0]
                found[prompt] = text
    return found, worked


def _settings(given: dict[str, Any]) -> tuple[list[str], int]:
    """The strings that end a text, and how many tokens it has at most."""
    until = given.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [int(given[name]) for name in names if given.get(name) is not None]
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop], [*limits, _NEW_TOKENS][0]
