"""One vLLM engine in a process of its own, measured when the bench asks for it.

A process per engine gives each its own memory figure and CPU time. The load is closed: as many requests as the
concurrency says are with the engine until none is left. Engine, scheduler and figures are vLLM's own.
"""

import contextlib
import os
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from layerboost.artifacts import Load, Served


def serve(connection: Connection, log: Path, options: dict[str, Any]) -> None:
    """Run an engine until the other side hangs up.

    Sends `("ready", facts)` once, then for each `(load, seed)` received `("measured", Served)`; or `("failed", text)`.
    """
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        engine = _Engine(options)
        connection.send(("ready", engine.facts()))
        while True:
            load, seed = connection.recv()
            connection.send(("measured", engine.measure(load, seed)))
    except EOFError:
        pass
    except BaseException as trouble:
        with contextlib.suppress(OSError):
            connection.send(("failed", f"{type(trouble).__name__}: {trouble}"))
        raise


class _Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.stats: list[tuple[Any, Any]] = []
        arguments = EngineArgs(
            **options, skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=False, seed=0
        )
        self.engine = LLMEngine.from_engine_args(arguments, stat_loggers=[self._logger()])

    def _logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self.stats

        class Recorder(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                stats.append((scheduler_stats, iteration_stats))

            def log_engine_initialized(self) -> None: ...

        return Recorder

    def facts(self) -> dict[str, Any]:
        """What vLLM decided: cache, limits, versions."""
        import vllm

        config = self.engine.vllm_config
        return {
            "vllm": vllm.__version__,
            "device": config.device_config.device_type,
            "threads": torch.get_num_threads(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "eager": config.model_config.enforce_eager,
        }

    def measure(self, load: Load, seed: int) -> Served:
        """One load from the first request in to the last token out."""
        prompts = self._prompts(load, seed)
        self.stats.clear()
        _reset_peak_memory()
        cpu, wall = _cpu_seconds(), time.perf_counter()
        finished, steps = self._drive(prompts, load)
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
        metrics = [output.metrics for output in finished]
        first = sorted(m.first_token_latency for m in metrics)
        between = sorted((m.last_token_ts - m.first_token_ts) / max(1, load.output_tokens - 1) for m in metrics)
        seen = [scheduler for scheduler, _ in self.stats if scheduler is not None]
        queries = sum(s.prefix_cache_stats.queries for s in seen if s.prefix_cache_stats)
        hits = sum(s.prefix_cache_stats.hits for s in seen if s.prefix_cache_stats)
        return Served(
            seconds=wall,
            cpu_seconds=cpu,
            steps=steps,
            output_tokens=sum(len(output.outputs[0].token_ids) for output in finished),
            ttft=median(first),
            ttft_p99=_percentile(first, 0.99),
            tpot=median(between),
            tpot_p99=_percentile(between, 0.99),
            running=mean(s.num_running_reqs for s in seen),
            running_max=max(s.num_running_reqs for s in seen),
            preemptions=sum(m.num_preemptions for m in metrics),
            prefix_hit_rate=hits / queries if queries else 0.0,
            kv_used=max(s.kv_cache_usage for s in seen),
            kv_used_last=next((s.kv_cache_usage for s in reversed(seen) if s.kv_cache_usage), 0.0),
            peak_memory=_peak_memory(),
        )

    def _prompts(self, load: Load, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        return torch.randint(0, vocabulary, (load.requests, load.prompt_tokens), generator=generator).tolist()

    def _drive(self, prompts: list[list[int]], load: Load) -> tuple[list[Any], int]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False)
        finished: list[Any] = []
        sent = steps = 0
        while len(finished) < len(prompts):
            while sent < len(prompts) and sent - len(finished) < load.concurrency:
                self.engine.add_request(str(sent), {"prompt_token_ids": prompts[sent]}, sampling)
                sent += 1
            finished += [output for output in self.engine.step() if output.finished]
            steps += 1
        return finished, steps


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _cpu_seconds() -> float:
    """Of this process with all its threads, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Bytes: of the device's allocator on CUDA, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
