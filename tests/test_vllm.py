"""Hybrids on the real vLLM engine, in float32 on CPU, against the stock transformers model with hooks.

Without vLLM these tests are skipped. Engines run inside the test's process unless a test says otherwise.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("vllm")

import httpx
import peft
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import stock_class
from layerboost.model.loading import load_model, load_original
from tests.tiny import FAMILIES, FULL, NONE, linear, make_checkpoint, reference_logits, some_tokens, tokenizer, window

W = 7
# first and last layer without attention, one with all of it, windows in between: one of them with a sink
PLAN = [NONE, FULL, window(W), NONE, window(W, sink=True), NONE]
# what the kernels of vLLM's CPU backend take
SIZES = {"head_dim": 32, "hidden_size": 128, "num_hidden_layers": len(PLAN), "max_position_embeddings": 512}
QKV, OUT = (4 * 32 + 2 * 2 * 32, 128), (128, 4 * 32)  # shapes of an attention's projections at these sizes
OWN = {
    "gpt_neox": {"num_key_value_heads": 4},  # the family has no groups, but vLLM reads the key
    "gemma3_text": {"tie_word_embeddings": False},  # tied, it is certain that every token repeats
}
NATIVE = {
    "mistral": {"sliding_window": 9},
    "gemma2": {},
    "gemma3_text": {},
    "starcoder2": {"sliding_window": 9},
}
ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 16,
    "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**24, "block_size": 32,
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
LENGTHS = (W - 1, W, W + 1, 40, 150)
CLOSE = 2e-4  # of a logprob, in nats
TIE = 1e-3  # below this gap either of two tokens is right
TOP = 5


@pytest.fixture(scope="module", autouse=True)
def _environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@dataclass
class Hybrid:
    path: Path
    base: Path
    layers: list[LayerPlan]
    mixers: dict[int, nn.Module]

    def reference(self, tokens: Tensor, layers: list[LayerPlan] | None = None) -> Tensor:
        return reference_logits(self.base, layers or self.layers, tokens, mixers=self.mixers)


def make_base(folder, family, **changes):
    return make_checkpoint(folder, family, **(SIZES | OWN.get(family, {}) | changes))


def make_hybrid(folder, base, layers):
    """A saved hybrid whose sinks have learned something."""
    hybrid = load_original(base)
    hybrid.convert(layers)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith(".mixer.sink"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hybrid.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Hybrid(folder, base, layers, hybrid.own_mixers())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def hybrid(llama, tmp_path_factory):
    return make_hybrid(tmp_path_factory.mktemp("hybrid"), llama, PLAN)


@contextlib.contextmanager
def engine(path, **settings):
    with contextlib.ExitStack() as stack:
        stack.callback(cleanup_dist_env_and_memory)
        llm = LLM(str(path), **(ENGINE | settings))
        stack.callback(llm.llm_engine.engine_core.shutdown)
        yield llm


def prompts_of(lengths):
    return [some_tokens(1, length, seed=length)[0].tolist() for length in lengths]


def generate(llm, prompts, tokens=12, **request):
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=TOP, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **request)


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(outputs):
    return [
        [{token: found.logprob for token, found in step.items()} for step in output.outputs[0].logprobs]
        for output in outputs
    ]


@torch.no_grad()
def expected(compute, prompts, answers):
    """Per answer its logprobs over the vocabulary, `[T, V]`, from one pass over prompt and answer.

    Sequences are filled up on the right, which causal models cannot see.
    """
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = torch.ones(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    logprobs = compute(batch).float().log_softmax(-1)
    return [
        row[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        for row, prompt, answer in zip(logprobs, prompts, answers, strict=True)
    ]


def difference(rows, logprobs):
    """The largest between what came back and what should have, in nats."""
    return max(
        abs(value - row[token].item())
        for answer_rows, answer in zip(rows, logprobs, strict=True)
        for row, step in zip(answer_rows, answer, strict=True)
        for token, value in step.items()
    )


def assert_greedy(rows, answers):
    for answer_rows, answer in zip(rows, answers, strict=True):
        chosen = answer_rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert (answer_rows.amax(-1) - chosen).max() < TIE


def assert_agrees(outputs, compute, close=CLOSE):
    prompts, answers = [output.prompt_token_ids for output in outputs], tokens_of(outputs)
    rows = expected(compute, prompts, answers)
    every = torch.cat(rows)
    assert -(every.exp() * every).sum(-1).mean() > 0.5, "nearly certain of every token: this could not fail"
    assert_greedy(rows, answers)
    assert difference(rows, logprobs_of(outputs)) < close


def counted(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def parameters_of(llm):
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return dict(executor.driver_worker.worker.model_runner.model.named_parameters())


def layer_of(name):
    return int(name.split("layers.")[1].split(".")[0])


def from_transformers(family):
    """Whether vLLM has no code of its own for the family."""
    stock = stock_class(family).__name__
    return ModelRegistry.models[stock].load_model_cls().__module__.startswith("vllm.model_executor.models.transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_plan_says(tmp_path, family):
    made = make_hybrid(tmp_path / "hybrid", make_base(tmp_path / "base", family), PLAN)
    with engine(made.path) as llm:
        assert_agrees(generate(llm, prompts_of(LENGTHS)), made.reference)


@pytest.mark.parametrize("family", NATIVE)
def test_full_keeps_native_windows(tmp_path, family):
    base = make_base(tmp_path / "base", family, **NATIVE[family])
    made = make_hybrid(tmp_path / "hybrid", base, [FULL, NONE, FULL, window(3), FULL, FULL])
    with engine(made.path) as llm:
        assert_agrees(generate(llm, prompts_of((8, 9, 10, 150))), made.reference)


def test_native_windows_of_cohere2_are_one_wider_in_vllm(tmp_path):
    """vLLM's own reading of this family, with or without a plan: a layer that keeps its window keeps vLLM's."""
    made = make_hybrid(
        tmp_path / "hybrid", make_base(tmp_path / "base", "cohere2"), [FULL, NONE, FULL, FULL, NONE, FULL]
    )
    wider = [window(10), NONE, window(10), FULL, NONE, FULL]
    with engine(made.path) as llm:
        assert_agrees(generate(llm, prompts_of(LENGTHS)), lambda tokens: made.reference(tokens, wider))


def test_all_full_is_bit_equal_to_the_base_in_the_same_engine(tmp_path, llama):
    made = make_hybrid(tmp_path, llama, [FULL] * len(PLAN))
    with engine(llama) as llm:
        base = generate(llm, prompts_of(LENGTHS))
    with engine(made.path) as llm:
        ours = generate(llm, prompts_of(LENGTHS))
    assert tokens_of(ours) == tokens_of(base)
    assert logprobs_of(ours) == logprobs_of(base)


@pytest.mark.parametrize(
    "layers",
    [[FULL] * 5 + [NONE], [window(W)] * 6, [window(3), FULL, window(W), window(3), NONE, window(64)]],
    ids=["none last", "window all", "three windows"],
)
def test_plans(tmp_path, llama, layers):
    made = make_hybrid(tmp_path, llama, layers)
    with engine(made.path) as llm:
        assert_agrees(generate(llm, prompts_of(LENGTHS)), made.reference)


@pytest.mark.parametrize("wrong", [W - 1, W + 1])
def test_a_window_off_by_one_is_seen(hybrid, outputs, wrong):
    layers = [window(wrong, plan.sink) if plan.window else plan for plan in PLAN]
    prompts = prompts_of(LENGTHS)
    rows = expected(lambda tokens: hybrid.reference(tokens, layers), prompts, tokens_of(outputs))
    assert difference(rows, logprobs_of(outputs)) > 100 * CLOSE


def test_sinks_that_were_not_loaded_are_seen(hybrid, outputs):
    layers = [window(W) if plan.window else plan for plan in PLAN]
    rows = expected(lambda tokens: hybrid.reference(tokens, layers), prompts_of(LENGTHS), tokens_of(outputs))
    assert difference(rows, logprobs_of(outputs)) > 100 * CLOSE


@pytest.fixture(scope="module")
def outputs(hybrid):
    """What the hybrid answers when nothing is special about the engine."""
    with engine(hybrid.path) as llm:
        return generate(llm, prompts_of(LENGTHS))


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_prompts_in_chunks_and_blocks_of_any_size(hybrid, outputs, block_size):
    with engine(hybrid.path, block_size=block_size, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        ours = generate(llm, prompts_of(LENGTHS))
    assert_agrees(ours, hybrid.reference)
    assert tokens_of(ours) == tokens_of(outputs)


def test_a_prefix_out_of_the_cache(hybrid, outputs):
    with engine(hybrid.path, block_size=16, enable_prefix_caching=True, disable_log_stats=False) as llm:
        first = generate(llm, prompts_of(LENGTHS))
        hits = counted(llm, "prefix_cache_hits")
        again = generate(llm, prompts_of(LENGTHS))
        assert counted(llm, "prefix_cache_hits") - hits >= 128
    assert tokens_of(first) == tokens_of(again) == tokens_of(outputs)
    assert_agrees(again, hybrid.reference)


def test_preempted_requests(hybrid):
    """With room for a few of them only, requests are put off and computed again."""
    prompts = [some_tokens(1, 40, seed=seed)[0].tolist() for seed in range(12)]
    settings = {"block_size": 16, "enable_prefix_caching": False, "disable_log_stats": False}
    with engine(hybrid.path, **settings) as llm:
        ample = generate(llm, prompts, tokens=60)
        assert counted(llm, "num_preemptions") == 0
    with engine(hybrid.path, num_gpu_blocks_override=80, max_model_len=128, **settings) as llm:
        tight = generate(llm, prompts, tokens=60)
        assert counted(llm, "num_preemptions") > 0
    assert tokens_of(tight) == tokens_of(ample)
    assert_agrees(tight, hybrid.reference)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_removed_attentions_have_no_cache_and_no_memory(tmp_path, monkeypatch, family):
    assert from_transformers(family) == (family == "starcoder2")
    made = make_hybrid(tmp_path / "hybrid", make_base(tmp_path / "base", family), PLAN)
    allocated = Counter()
    empty = torch.empty

    def counting(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        allocated[tuple(tensor.shape)] += tensor.device.type != "meta"
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    with engine(made.path) as llm:
        monkeypatch.setattr(torch, "empty", empty)
        kept = {index for index, plan in enumerate(PLAN) if plan.mixer != "no_attention"}
        core = llm.llm_engine.engine_core.engine_core
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        cached = {name for group in groups for name in group.layer_names}
        known = set(llm.llm_engine.vllm_config.compilation_config.static_forward_context)
        assert {layer_of(name) for name in cached} == {layer_of(name) for name in known} == kept
        assert len(cached) == len(known) == len(kept)
        parameters = parameters_of(llm)
    attention = {name: parameter for name, parameter in parameters.items() if "self_attn" in name}
    assert {layer_of(name) for name in attention} == kept
    assert all(parameter.device.type == "cpu" for parameter in parameters.values())
    # after loading, kernels may hold weights in a form of their own: so what was allocated is counted by shape
    assert allocated[QKV] == len(kept)
    if not from_transformers(family):  # there vLLM first builds every layer of transformers, parameter by parameter
        assert allocated[OUT] == len(kept)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_two_ranks(tmp_path, family):
    made = make_hybrid(tmp_path / "hybrid", make_base(tmp_path / "base", family), PLAN)
    with engine(made.path, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_agrees(generate(llm, prompts_of(LENGTHS)), made.reference)


@pytest.mark.slow
def test_compiled_plans_do_not_share_a_graph(tmp_path, llama, monkeypatch):
    """Two plans of the same shapes under the same name, one after the other, with one cache of compiled graphs."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for layers in (PLAN, PLAN[::-1], PLAN):
        made = make_hybrid(tmp_path / "hybrid", llama, layers)
        compiled = compilation_counter.num_aot_compiles
        with engine(made.path, enforce_eager=False) as llm:
            assert compilation_counter.num_aot_compiles == compiled + 1
            assert_agrees(generate(llm, prompts_of(LENGTHS)), made.reference)
    assert len(list((tmp_path / "torch_compile_cache/torch_aot_compile").iterdir())) == 2


def test_an_adapter_of_the_hybrid(tmp_path, hybrid):
    tuned = peft.get_peft_model(load_model(hybrid.path), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(tmp_path)
    tuned.eval()
    request = LoRARequest("adapter", 1, str(tmp_path))
    with engine(hybrid.path, enable_lora=True, max_lora_rank=8) as llm:
        assert_agrees(generate(llm, prompts_of(LENGTHS)), hybrid.reference)
        adapted = generate(llm, prompts_of(LENGTHS), lora_request=request)
    assert_agrees(adapted, lambda tokens: tuned(tokens, use_cache=False).logits)
    without = expected(hybrid.reference, prompts_of(LENGTHS), tokens_of(adapted))
    assert difference(without, logprobs_of(adapted)) > 100 * CLOSE


@pytest.mark.parametrize(
    ("layers", "reason"),
    [([FULL] * 5 + [linear("linear")], "layer 5: .*linear_attention"), ([NONE] * 6, "no layer has attention")],
    ids=["linear", "none all"],
)
def test_plans_that_cannot_be_served_are_refused(tmp_path, llama, layers, reason):
    made = make_hybrid(tmp_path, llama, layers)
    with pytest.raises(PlanError, match=reason), engine(made.path):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("self_attn.mixer.sink", "model.layers.4.self_attn.mixer.sink"),
        ("post_attention_layernorm.weight", "model.layers.4.post_attention_layernorm.weight"),
        ("self_attn.o_proj.weight", "no tensor for o_proj of layer 4's attention"),
        ("self_attn.k_proj.weight", "no tensor for k_proj of layer 4's attention"),
    ],
)
def test_a_checkpoint_without_a_tensor_is_refused(tmp_path, llama, name, message):
    made = make_hybrid(tmp_path, llama, PLAN)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"model.layers.4.{name}"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)), engine(made.path):
        pass


@contextlib.contextmanager
def server(path):
    """What people start, and a client of it. A socket file keeps it off the network."""
    with tempfile.TemporaryDirectory() as folder:  # sockets take short names only
        socket, log = f"{folder}/socket", Path(folder, "log")
        settings = {name: value for name, value in ENGINE.items() if name != "enforce_eager"}
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--uds", socket]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--enforce-eager", *flags], stdout=out, stderr=out, cwd=folder, start_new_session=True
            )
        try:
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=socket), base_url="http://server", timeout=60
            ) as client:
                until = time.monotonic() + 120
                while not answers(client):
                    assert process.poll() is None, log.read_text()[-3000:]
                    assert time.monotonic() < until, log.read_text()[-3000:]
                    time.sleep(0.2)
                yield client
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(client):
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def test_a_server_that_knows_nothing_of_us_serves_hybrids(hybrid):
    prompts = prompts_of(LENGTHS)
    request = {
        "model": str(hybrid.path), "prompt": prompts, "temperature": 0, "max_tokens": 8, "logprobs": TOP,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    with server(hybrid.path) as client:
        choices = client.post("/v1/completions", json=request).raise_for_status().json()["choices"]
    answers = [choice["token_ids"] for choice in choices]
    rows = expected(hybrid.reference, prompts, answers)
    assert_greedy(rows, answers)
    chosen = [
        [{token: value} for token, value in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)]
        for choice in choices
    ]
    assert difference(rows, chosen) < CLOSE
