"""Signals of a teacher: the same from a server as from here, resumed, refused, and small."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial

import pytest
import torch
from safetensors import safe_open

from layerboost import convert, heal
from layerboost.artifacts import Plan, lock
from layerboost.data.sequences import Sequences
from layerboost.errors import EnvironmentTrouble, UsageError
from layerboost.heal import served
from layerboost.heal.losses import top_k_kl
from layerboost.heal.signals import signals
from layerboost.heal.student import Healer
from layerboost.model.loading import load_original
from tests.stub_server import Stub, answering
from tests.test_heal import settings_with
from tests.tiny import FULL, NONE, make_checkpoint, some_tokens, window

kept = sys.modules["layerboost.heal.signals"]  # the package has a function of that name
LAYERS = [NONE, window(8), FULL, NONE]
TOP = 12
ROUNDING = 4e-3  # of a log-probability, in nats: half precision, near -8
SETTINGS = settings_with(losses={"forward_kl": 1.0}, top_k=TOP)


@pytest.fixture(scope="module")
def healer(tiny):
    return Healer(load_original(tiny), LAYERS, SETTINGS)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(kept, "_ROWS", 2)


def packed_rows():
    """Five rows of 24 tokens: of one document, of three, with padding, with a document of one token, and with gaps."""
    positions = torch.stack(
        [
            torch.arange(24),
            torch.cat([torch.arange(n) for n in (9, 5, 10)]),
            torch.cat([torch.arange(15), torch.full((9,), -1)]),
            torch.cat([torch.arange(n) for n in (23, 1)]),
            torch.arange(24),
        ]
    )
    mask = positions > 0
    mask[4, 3:20] = False
    return Sequences(some_tokens(5, 24), mask, positions)


class Teacher(Stub):
    model, most, lock = None, 20, threading.Lock()
    asked: list = []  # noqa: RUF012

    def complete(self, asked):
        self.asked.append(asked)
        top, prompt = asked["prompt_logprobs"], asked["prompt"]
        if top > self.most:
            message = f"Requested prompt logprobs of {top}, which is greater than max allowed: {self.most}"
            self.reply({"error": {"message": message}}, 400)
            return
        with self.lock, torch.no_grad():
            rows = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        steps = [None]
        for row, token in zip(rows[:-1], prompt[1:], strict=True):
            best = row.topk(top)
            found = {i: v for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}
            found[token] = row[token].item()  # which vLLM adds where it is not among the best
            steps.append({str(i): {"logprob": v, "rank": 1, "decoded_token": ""} for i, v in found.items()})
        self.reply({"choices": [{"prompt_logprobs": self.spoil(steps)}]})


@pytest.fixture
def server(tiny):
    handler = type("Handler", (Teacher,), {"model": load_original(tiny), "asked": []})
    with answering(handler) as url:
        yield handler, url


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*")}


def of(folder, healer, rows, **changes):
    return signals(folder, healer, rows, **({"top_k": TOP, "teacher": "digest"} | changes))


def assert_same(found, wanted, rows):
    """The same log-probabilities, and the same ids but for ties."""
    for number in range(len(rows)):
        ours, theirs = found[torch.tensor([number])], wanted[torch.tensor([number])]
        assert ours.ids.shape == theirs.ids.shape == (int(rows.scored[number].sum()), TOP)
        torch.testing.assert_close(ours.log_probabilities, theirs.log_probabilities, atol=ROUNDING, rtol=0)
        assert (ours.ids == theirs.ids).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------ a served teacher


@pytest.mark.parametrize("path", ["", "/", "/v1"])
def test_a_server_gives_what_the_teacher_here_gives(healer, server, tmp_path, path):
    handler, url = server
    rows = packed_rows()
    own = of(tmp_path / "own", healer, rows)
    found = of(tmp_path / "served", healer, rows, url=url + path)
    assert files(tmp_path / "own").keys() == files(tmp_path / "served").keys()
    assert_same(found, own, rows)
    assert {asked["model"] for asked in handler.asked} == {"it"}
    for numbers in ([4, 0], [1, 2, 3]):
        assert_same_batch(found[torch.tensor(numbers)], own[torch.tensor(numbers)])


def assert_same_batch(found, wanted):
    torch.testing.assert_close(found.log_probabilities, wanted.log_probabilities, atol=ROUNDING, rtol=0)


def test_documents_are_sent_one_by_one_and_padding_never(healer, server, tmp_path):
    handler, url = server
    rows = packed_rows()
    of(tmp_path, healer, rows, url=url)
    sent = sorted(len(asked["prompt"]) for asked in handler.asked[served._CHECKED :])
    assert sent == sorted([24, 9, 5, 10, 15, 23, 24])  # and not the one of a single token, which predicts nothing
    assert [len(tokens) for tokens, _ in served.documents(rows)] == [24, 9, 5, 10, 15, 23, 1, 24]
    assert [len(tokens) for tokens, _ in served.documents(Sequences(rows.tokens, rows.scored))] == [24] * 5


def test_a_whole_healing_from_a_server(tiny, server, tmp_path):
    """As close as from the teacher here; and once all is there, no server is needed."""
    handler, url = server
    handler.most = 64
    hybrid = convert.run(tiny, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    config = settings_with(losses={"forward_kl": 1.0}, top_k=64, signals=tmp_path / "own", tokens=1_024)
    own = heal.run(hybrid, tiny, config, out=tmp_path / "a")
    config = settings_with(**config.model_dump() | {"signals": tmp_path / "served", "signals_from": url})
    found = heal.run(hybrid, tiny, config, out=tmp_path / "b")
    assert [p.kl for p in found.curve] == pytest.approx([p.kl for p in own.curve], rel=1e-2)
    nobody = settings_with(**config.model_dump() | {"signals_from": "http://127.0.0.1:9", "seed": 1, "data_seed": 0})
    heal.run(hybrid, tiny, nobody, out=tmp_path / "c")


def test_a_server_of_another_model_is_refused(healer, server, tmp_path):
    handler, url = server
    handler.model = load_original(make_checkpoint(tmp_path / "other", "qwen3", seed=1))
    with pytest.raises(
        UsageError, match=r"serves it, which is another model than the teacher: .* differ by \d+\.\d\d nats"
    ):
        of(tmp_path / "signals", healer, packed_rows(), url=url)
    handler.model = load_original(make_checkpoint(tmp_path / "larger", "qwen3", vocab_size=300))
    with pytest.raises(UsageError, match=r"differ by (inf|[0-9.]+) nats"):
        of(tmp_path / "signals", healer, packed_rows(), url=url)
    assert not (tmp_path / "signals").exists()  # or it would refuse other settings


def test_documents_that_are_scored_late_are_compared_too(healer, server, tmp_path):
    handler, url = server
    handler.model = load_original(make_checkpoint(tmp_path / "other", "qwen3", seed=1))
    late = torch.zeros(2, 400, dtype=torch.bool)
    late[:, 300:] = True
    with pytest.raises(UsageError, match="is another model than the teacher"):
        of(tmp_path / "signals", healer, Sequences(some_tokens(2, 400), late), url=url)


def test_rounding_is_not_another_model(tiny, healer, server, tmp_path):
    handler, url = server
    handler.model = load_original(tiny).to(torch.bfloat16)
    of(tmp_path / "signals", healer, packed_rows(), url=url)
    assert len(files(tmp_path / "signals")) == 3


def test_a_server_that_gives_too_few_names_the_flag(healer, server, tmp_path):
    handler, url = server
    handler.most = 5
    with pytest.raises(
        EnvironmentTrouble, match=r"answered 400: .*max allowed: 5.*needs --max-logprobs 12 and --max-model-len 25"
    ):
        of(tmp_path, healer, packed_rows(), url=url)


@pytest.mark.parametrize(
    "spoil",
    [lambda steps: None, lambda steps: steps[:-1], lambda steps: [{"x": {"logprob": -1}}] * len(steps),
     lambda steps: [{"1": {"logprob": -1}}] * len(steps), lambda steps: [[1, 2]] * len(steps)],
    ids=["none", "too short", "words", "too few", "lists"],
)  # fmt: skip
def test_what_does_not_answer_as_vllm_does_is_said(healer, server, tmp_path, spoil):
    handler, url = server
    handler.spoil = staticmethod(spoil)
    with pytest.raises(
        EnvironmentTrouble, match="did not answer with 12 prompt_logprobs per token as vLLM's server does"
    ):
        of(tmp_path, healer, packed_rows(), url=url)


def test_what_is_no_server_is_said(healer, server, tmp_path):
    handler, url = server
    rows = packed_rows()
    with pytest.raises(
        EnvironmentTrouble, match=r"cannot be reached: .*start it with vllm serve MODEL --max-logprobs 12"
    ):
        of(tmp_path, healer, rows, url="http://127.0.0.1:9")
    with pytest.raises(EnvironmentTrouble, match=r"cannot be reached: .*unknown url type"):
        of(tmp_path, healer, rows, url="127.0.0.1:9")
    with pytest.raises(EnvironmentTrouble, match=r"cannot be reached: .*unknown url type"):
        of(tmp_path, healer, rows, url="nowhere")
    handler.names = ("one", "two")
    with pytest.raises(EnvironmentTrouble, match="serves 2 models"):
        of(tmp_path, healer, rows, url=url)
    handler.do_GET = lambda self: self.reply({"error": "not here"})
    with pytest.raises(EnvironmentTrouble, match="did not answer as an OpenAI server does"):
        of(tmp_path, healer, rows, url=url)


def test_a_server_needs_a_folder():
    with pytest.raises(ValueError, match="set signals to a folder too"):
        settings_with(losses={"forward_kl": 1.0}, signals_from="http://127.0.0.1:8000")


@contextlib.contextmanager
def vllm_server(base, folder):
    """What people start, with the limits that vLLM has by itself."""
    from tests.test_vllm import ENGINE, ENVIRONMENT

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {name: value for name, value in ENGINE.items() if name != "enforce_eager"}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *flags], stdout=log, stderr=log, cwd=folder,
            start_new_session=True, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]  # noqa: PT018
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_vllm_gives_what_the_teacher_here_gives(tmp_path):
    pytest.importorskip("vllm")
    from tests.test_vllm import make_base

    base = make_base(tmp_path / "base", "llama")
    healer = Healer(load_original(base), [*LAYERS, FULL, NONE], SETTINGS)
    rows = packed_rows()
    with vllm_server(base, tmp_path) as url:
        found = of(tmp_path / "served", healer, rows, url=url)
        with pytest.raises(EnvironmentTrouble, match=r"answered 400: .*needs --max-logprobs 33"):
            of(tmp_path / "many", healer, rows, url=url, top_k=33)
    assert_same(found, of(tmp_path / "own", healer, rows), rows)


# -------------------------------------------------------------------------------------------------------- the files


def test_a_kill_between_files_costs_no_file_that_was_written(healer, tmp_path, monkeypatch):
    rows = packed_rows()
    whole = of(tmp_path / "whole", healer, rows)
    real, calls = kept._ask, itertools.count()

    def dying(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kept, "_ask", dying)
        with pytest.raises(KeyboardInterrupt):
            of(tmp_path / "parts", healer, rows)
    first = files(tmp_path / "parts")
    assert list(first) == ["rows-000000.safetensors"]
    found = of(tmp_path / "parts", healer, rows)
    assert first.items() <= files(tmp_path / "parts").items()
    assert len(files(tmp_path / "parts")) == 3
    assert_same(found, whole, rows)


def test_what_is_whole_may_be_read_while_another_holds_it(healer, tmp_path):
    rows = packed_rows()
    with lock(tmp_path / "signals"), pytest.raises(EnvironmentTrouble, match="is being written"):
        of(tmp_path / "signals", healer, rows)
    of(tmp_path / "signals", healer, rows)
    with lock(tmp_path / "signals"):
        of(tmp_path / "signals", healer, rows)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path):
    path.write_bytes(path.with_name("rows-000002.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, swap, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
                         ids=["cut", "a bit", "another file", "empty", "gone"])  # fmt: skip
def test_a_damaged_file_is_written_again(healer, tmp_path, damage):
    rows = packed_rows()
    of(tmp_path, healer, rows)
    before, path = files(tmp_path), tmp_path / "rows-000001.safetensors"
    wanted = path.read_bytes()
    damage(path)
    of(tmp_path, healer, rows)
    assert path.read_bytes() == wanted
    assert {name for name, at in files(tmp_path).items() if before[name] != at} == {path.name}


def test_others_signals_are_refused(healer, server, tmp_path):
    rows = packed_rows()
    of(tmp_path, healer, rows)
    shorter = Sequences(rows.tokens, rows.scored & (torch.arange(24) < 20), rows.positions)
    refused = partial(pytest.raises, UsageError, match="were written for another teacher, other rows or another top_k")
    for other in (rows[torch.tensor([1, 0, 2, 3, 4])], rows[:4], shorter):
        with refused():
            of(tmp_path, healer, other)
    for changes in ({"top_k": 5}, {"teacher": "other"}, {"url": server[1]}):
        with refused():
            of(tmp_path, healer, rows, **changes)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(258, torch.uint16), (2**16 + 8, torch.int32)])
def test_ids_take_two_bytes_where_the_vocabulary_is_small(tmp_path, vocabulary, dtype):
    folder = make_checkpoint(tmp_path / "base", "qwen3", vocab_size=vocabulary, tie_word_embeddings=False)
    healer = Healer(load_original(folder), LAYERS, SETTINGS)
    rows = packed_rows()
    with torch.no_grad():
        healer.model.lm_head.weight[:-20] *= 0.1  # the last ids are the likeliest
    found = of(tmp_path / "signals", healer, rows)
    with safe_open(tmp_path / "signals" / "rows-000000.safetensors", framework="pt") as file:
        assert file.get_tensor("ids").dtype == dtype
        assert file.get_tensor("log_probabilities").dtype == torch.float16
    ours = found[torch.tensor([0])]
    assert ours.ids.max() == vocabulary - 1
    assert ours.ids.min() >= 0
    logits = healer.model(rows.tokens[:1]).logits[0, :-1].log_softmax(-1)
    assert top_k_kl(logits, ours.ids, ours.log_probabilities).abs().max() < 0.01
