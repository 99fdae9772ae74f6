"""verify on a server: answers that are the hybrid's pass, others do not, and what is no server is said."""

import math

import pytest
import torch

from layerboost import verify
from layerboost.errors import EnvironmentTrouble
from layerboost.model.loading import describe, load_model, load_original, read_config
from layerboost.model.saving import save_hybrid
from layerboost.verify import served
from tests.stub_server import Stub, answering
from tests.tiny import FULL, NONE, make_checkpoint, window


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = make_checkpoint(root / "base", "llama")
    model = load_original(base)
    model.convert([NONE, window(8), FULL, window(8)])
    save_hybrid(model, root / "hybrid", original=base, inputs={}, what="test")
    return root / "hybrid"


@pytest.fixture
def server(folder):
    """The hybrid behind an address, as vLLM's server answers; `spoil` may change what it says."""
    model = load_model(folder)

    class Handler(Stub):
        def complete(self, asked):
            assert asked["temperature"] == 0
            tokens, chosen, steps = asked["prompt"], [], []
            for _ in range(asked["max_tokens"]):
                with torch.no_grad():
                    row = model(torch.tensor([tokens + chosen])).logits[0, -1].log_softmax(-1)
                top = row.topk(asked["logprobs"])
                steps.append(
                    {f"token_id:{i}": v for v, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
                )
                chosen.append(row.argmax().item())
            answer = {"tokens": [f"token_id:{token}" for token in chosen], "top_logprobs": steps}
            self.reply({"choices": [{"logprobs": self.spoil(answer)}]})

    with answering(Handler) as url:
        yield Handler, url


def held(checks):
    return [check.holds for check in checks]


def test_its_own_answers_hold(folder, server):
    _, url = server
    assert held(verify.run(url, folder)) == [True, True]
    assert held(verify.run(url + "/v1/", folder)) == [True, True]


def test_tokens_of_another_vocabulary_do_not(folder, server):
    handler, url = server

    def other_model(answer):
        answer["tokens"][0] = "token_id:99999"
        return answer

    def other_choice(answer):
        answer["top_logprobs"][0]["token_id:99999"] = -20.0
        return answer

    for spoil in (other_model, other_choice):
        handler.spoil = staticmethod(spoil)
        (check,) = verify.run(url, folder)
        assert not check.holds
        assert check.found.startswith("99999, where the hybrid here has")


def test_other_tokens_and_other_logprobs_do_not(folder, server):
    handler, url = server

    def other_token(answer):
        worst = min(answer["top_logprobs"][3], key=answer["top_logprobs"][3].get)
        answer["tokens"][3] = worst
        return answer

    def other_logprobs(answer):
        answer["top_logprobs"][-1] = {token: value + 0.01 for token, value in answer["top_logprobs"][-1].items()}
        return answer

    handler.spoil = staticmethod(other_token)
    assert held(verify.run(url, folder))[0] is False
    handler.spoil = staticmethod(other_logprobs)
    assert held(verify.run(url, folder)) == [True, False]


def test_what_is_no_server_is_said(folder, server):
    handler, url = server
    with pytest.raises(EnvironmentTrouble, match="cannot be reached"):
        verify.run("http://127.0.0.1:9", folder)
    with pytest.raises(EnvironmentTrouble, match="cannot be reached: Invalid IPv6 URL"):
        verify.run("http://[::1:8000", folder)
    handler.names = ("one", "two")
    with pytest.raises(EnvironmentTrouble, match="serves 2 models"):
        verify.run(url, folder)
    handler.names = ("it",)
    handler.spoil = staticmethod(lambda answer: None)
    with pytest.raises(EnvironmentTrouble, match="did not answer with tokens and logprobs"):
        verify.run(url, folder)


@pytest.mark.parametrize("widest", [1, 8, 512, 1_000, 1_024, 4_000])
def test_prompts_end_around_the_widest_window_and_beyond_it(folder, widest):
    config = read_config(folder)
    record = describe(folder, folder, config).model_copy(update={"context": 4_096})
    layers = [NONE, window(1), FULL, window(widest)]
    lengths = {int(name) for name in verify._prompts(record, layers, config.vocab_size)}
    assert {max(1, widest - 1), widest, widest + 1} <= lengths
    assert widest + 64 <= max(lengths) <= max(1_024, widest + 64)
    beyond = [NONE, window(1), FULL, window(4_096)]  # which no prompt could reach
    assert max(int(name) for name in verify._prompts(record, beyond, config.vocab_size)) < 1_024


def test_what_is_no_number_here_does_not_hold(folder):
    answer = served.Answer(tokens=[1, 2], logprobs=[{1: -1.0}, {2: -1.0}])
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert served.differences(model, {"1": torch.tensor([[5]])}, {"1": answer}) == (math.inf, math.inf)
