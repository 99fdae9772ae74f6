"""Base and hybrid on vLLM, each in a process of its own, under the same loads in turn."""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from layerboost.artifacts import Load, Ratio, Record, Served, ServingCell, WholeBytes
from layerboost.bench import vllm_worker
from layerboost.errors import DataError, EnvironmentTrouble
from layerboost.layer_plan import LayerPlan, full_plan
from layerboost.model.config import native_windows
from layerboost.model.mixers import HeadShape
from layerboost.progress import progress, say
from layerboost.vllm import check_servable, require_vllm
from layerboost.vllm.kv import KVLayout, good_block_size, kv_layout

_HIT_RATE_LIMIT = 0.01
_SHARE_OF_GPU = 0.45  # of two engines on one device; vLLM does not start where less than that is free
# processes that keep their memory, as servers do, on threads that may run where they like
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33),
}  # fmt: skip


class Serving(Record):
    """What the engines are asked to do.

    Attributes:
        concurrency: requests at once, one load for each.
        prompt_tokens, output_tokens: of every request; outputs are exactly so long.
        rounds: requests per place: a load has `rounds` times `concurrency` of them.
        kv: memory for keys and values: `ample` holds all requests of the highest concurrency, `limited` the share
            `limited_share` of them, both counted for the base; or a number of bytes.
        decode_batch, decode_lengths: loads of `decode_batch` requests and so many output tokens, for the latency of
            decoding; none unless lengths are given.
        block_size: tokens per block of the cache; None fits the narrowest window.
        max_batched_tokens: most tokens of one step; None is vLLM's own.
        dtype: None is float32 on CPU, elsewhere the checkpoint's own, or bfloat16 for one in float32.
        eager: without compilation and CUDA graphs; None is so on CPU alone.
        tensor_parallel: devices per engine.
    """

    concurrency: list[Annotated[int, Field(ge=1)]] = Field([50, 100, 200], min_length=1)
    prompt_tokens: int = Field(256, ge=1)
    output_tokens: int = Field(64, ge=1)
    rounds: int = Field(1, ge=1)
    kv: list[Literal["ample", "limited"] | WholeBytes] = Field(["ample", "limited"], min_length=1)
    limited_share: float = Field(0.25, gt=0, le=1)
    decode_batch: int = Field(16, ge=1)
    decode_lengths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    block_size: int | None = Field(None, ge=1)
    max_batched_tokens: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    eager: bool | None = None
    tensor_parallel: int = Field(1, ge=1)

    def loads(self) -> list[Load]:
        return [
            Load(
                concurrency=places, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens,
                requests=places * self.rounds,
            )
            for places in self.concurrency
        ]  # fmt: skip

    def decode_loads(self) -> list[Load]:
        return [
            Load(
                concurrency=self.decode_batch, prompt_tokens=self.prompt_tokens, output_tokens=length,
                requests=self.decode_batch,
            )
            for length in self.decode_lengths
        ]  # fmt: skip


def label(cell: ServingCell) -> str:
    """`concurrency 200, 256+64 tokens, KV limited`."""
    load = cell.load
    return f"concurrency {load.concurrency}, {load.prompt_tokens}+{load.output_tokens} tokens, KV {cell.kv}"


def measure(
    folders: dict[str, Path],
    base_config: PreTrainedConfig,
    layers: list[LayerPlan],
    serving: Serving,
    *,
    repeats: int,
    random_weights: bool,
) -> tuple[list[ServingCell], dict[str, Any]]:
    """Every load with every cache size, both models in turn.

    Returns:
        The cells, and what vLLM decided.

    Raises:
        DataError: prompt and output do not fit the model, or prompts were found in a prefix cache.
        EnvironmentTrouble: vLLM is missing, or does not start.
        PlanError: vLLM cannot run the plan.
    """
    require_vllm()
    check_servable(layers)
    longest = longest_of(serving, base_config.max_position_embeddings)
    options = _options(base_config, layers, serving, longest, random_weights)
    cells: list[ServingCell] = []
    facts: dict[str, Any] = {}
    sizes = [(kv, kv_memory(kv, base_config, layers, serving, options)) for kv in serving.kv]
    devices = min(serving.tensor_parallel, HeadShape.of(base_config).groups)
    for kv, memory in sizes:
        loads = serving.loads() + (serving.decode_loads() if kv == "ample" else [])
        options["kv_cache_memory_bytes"] = memory
        with _engines(folders, options) as engines:
            facts = engines["base"].facts
            say(f"KV cache {kv}: {memory:,} bytes; {facts['blocks']:,} blocks of {facts['block_size']} tokens, base")
            cells += _interleaved(engines, loads, str(kv), memory, repeats, devices)
    return cells, facts


def longest_of(serving: Serving, context: int) -> int:
    """Tokens of the longest request; raises DataError where it does not fit the model."""
    longest = max(load.prompt_tokens + load.output_tokens for load in serving.loads() + serving.decode_loads())
    if longest > context:
        raise DataError(f"prompt and output make {longest} tokens, the model takes {context}; choose shorter ones")
    return longest


def _options(
    base_config: PreTrainedConfig, layers: list[LayerPlan], serving: Serving, longest: int, random_weights: bool
) -> dict[str, Any]:
    """vLLM's engine arguments that both models get."""
    on_cpu = not torch.cuda.is_available()
    block = serving.block_size or good_block_size(layers, on_cpu)
    options: dict[str, Any] = {
        "dtype": serving.dtype or ("float32" if on_cpu else _short(base_config.dtype)),
        "load_format": "dummy" if random_weights else "auto",
        "enforce_eager": on_cpu if serving.eager is None else serving.eager,
        "max_model_len": longest,
        "max_num_seqs": max(load.concurrency for load in serving.loads() + serving.decode_loads()),
        "block_size": block,
        "tensor_parallel_size": serving.tensor_parallel,
    }
    if not on_cpu:
        options["gpu_memory_utilization"] = _SHARE_OF_GPU
    if serving.max_batched_tokens is not None:
        options["max_num_batched_tokens"] = serving.max_batched_tokens
    return options


def _short(dtype: torch.dtype | str | None) -> str:
    """What vLLM makes of a checkpoint's dtype on a GPU, said aloud: the cache is counted in it."""
    name = str(dtype).removeprefix("torch.")
    return name if name == "float16" else "bfloat16"


def kv_memory(
    kv: str | int, base_config: PreTrainedConfig, layers: list[LayerPlan], serving: Serving, options: dict[str, Any]
) -> int:
    """Bytes for keys and values, per device.

    Raises:
        DataError: so many bytes do not hold the longest request, for which vLLM would not start.
    """
    shape = HeadShape.of(base_config)
    dtype = getattr(torch, options["dtype"])
    groups = max(1, shape.groups // serving.tensor_parallel)
    native, block = native_windows(base_config), options["block_size"]
    layouts = [
        kv_layout(plan, native, 2 * groups * shape.head_dim * dtype.itemsize, block)
        for plan in (full_plan(len(layers)), layers)
    ]
    least = max(_least_blocks(layout, options["max_model_len"]) * layout.block_bytes for layout in layouts)
    if isinstance(kv, int):
        if kv < least:
            raise DataError(
                f"kv {kv}: the longest request, of {options['max_model_len']} tokens, takes {least} bytes of cache; "
                "give at least as much, or choose shorter requests"
            )
        return kv
    loads = serving.loads() + (serving.decode_loads() if kv == "ample" else [])
    wanted = [
        max(load.concurrency * layout.blocks(0, load.prompt_tokens + load.output_tokens) for load in loads)
        for layout in layouts
    ]
    if kv == "ample":  # one block of the pool is vLLM's own
        ample = max((count + 1) * layout.block_bytes for count, layout in zip(wanted, layouts, strict=True))
        return max(least, ample)
    return max(least, (int(wanted[0] * serving.limited_share) + 1) * layouts[0].block_bytes)


def _least_blocks(layout: KVLayout, tokens: int) -> int:
    """What vLLM wants of the cache to start: room for a whole request in every group, as if no window had passed."""
    return len(layout.windows) * (-(-tokens // layout.block_size) + 1) + 1


def _interleaved(
    engines: dict[str, "Engine"], loads: list[Load], kv: str, memory: int, repeats: int, devices: int = 1
) -> list[ServingCell]:
    """
    Args:
        memory: bytes for keys and values, per device.
        devices: over which keys and values are spread.
    """
    runs: list[dict[str, list[Served]]] = [{name: [] for name in engines} for _ in loads]
    alone = [{name: engine.measure(_one(load), seed=0) for name, engine in engines.items()} for load in loads]
    with progress(f"vllm, KV {kv}", repeats * len(loads) * len(engines)) as advance:
        for repeat in range(repeats):
            for number, load in enumerate(loads):
                for name in sorted(engines, reverse=bool((repeat + number) % 2)):
                    served = engines[name].measure(load, seed=1 + repeat * len(loads) + number)
                    if served.prefix_hit_rate >= _HIT_RATE_LIMIT:
                        raise DataError(f"{served.prefix_hit_rate:.1%} of the prompts came out of a prefix cache")
                    runs[number][name].append(served)
                    advance()
    cells = []
    for load, found, single in zip(loads, runs, alone, strict=True):
        tokens = load.prompt_tokens + load.output_tokens
        blocks = {name: engine.facts["blocks"] for name, engine in engines.items()}  # one of them is vLLM's own
        held = {name: served.kv_used_last * memory * (1 - 1 / blocks[name]) for name, served in single.items()}
        cells.append(
            ServingCell(
                kv=kv, kv_memory=memory, load=load, runs=found,
                kv_bytes_per_token={name: size * devices / tokens for name, size in held.items()},
                kv_capacity={name: int(memory / size * tokens) if size else 0 for name, size in held.items()},
                throughput=paired(found, "seconds"), cpu_throughput=paired(found, "cpu_seconds"),
            )
        )  # fmt: skip
    return cells


def _one(load: Load) -> Load:
    return load.model_copy(update={"concurrency": 1, "requests": 1})


def paired(runs: dict[str, list[Served]], clock: str) -> Ratio:
    """Output tokens per second, hybrid over base, repeat by repeat; both sampled equally many."""
    base, hybrid = ([getattr(served, clock) for served in runs[name]] for name in ("base", "healed"))
    return Ratio.of_times(base, hybrid)


class Engine:
    """The near end of an engine's process."""

    def __init__(self, name: str, process: Any, connection: Connection, log: Path) -> None:
        self.name, self.process, self.connection, self.log = name, process, connection, log
        self.facts = self._answer("ready")

    def measure(self, load: Load, seed: int) -> Served:
        self.connection.send((load, seed))
        served: Served = self._answer("measured")
        return served

    def _answer(self, wanted: str) -> Any:
        try:
            kind, found = self.connection.recv()
        except EOFError:
            self.process.join()
            said = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            kind, found = "failed", f"its process ended with code {self.process.exitcode}: {said}"
        if kind != wanted:
            reason = " ".join(str(found).split())[:400]
            raise EnvironmentTrouble(f"vLLM could not serve the {self.name} model: {reason}")
        return found

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _engines(folders: dict[str, Path], options: dict[str, Any]) -> Iterator[dict[str, Engine]]:
    """One engine for each model, each in a process that started with a clean memory."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_ENVIRONMENT))
        engines = {}
        for name, folder in folders.items():
            near, far = spawn.Pipe()
            log = Path(scratch) / f"{name}.log"
            process = spawn.Process(
                target=vllm_worker.serve, args=(far, log, {"model": str(folder.resolve()), **options})
            )
            process.start()
            far.close()
            try:
                engines[name] = Engine(name, process, near, log)
            except BaseException:
                process.kill()
                raise
            stack.callback(engines[name].close)
        yield engines


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile see, unless the user has set them."""
    missing = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]
