"""Is a window's cost linear in the sequence, and how much less is it than the masked quadratic path?

    python benchmarks/linear_cost.py

Measures one layer's attention, prefill (forward) and training (forward and backward), as

    ours     layerboost's sliding_window_attention
    masked   scaled_dot_product_attention with the window as a mask, which is what transformers runs on CPU

and the prefill of a whole two-layer model: all of its layers windowed by layerboost, against the same model with the
window in transformers' own way (Mistral's sliding_window). Same inputs, one run, interleaved; the first round warms up.
Prints CPU-time ratios with their range, peak memory of each in a process of its own (Linux), and checks that outputs
and gradients agree.

The C library hands tensors above 32 MiB back to the system and asks for them anew, page by page, each time: a cost that
grows faster than the tensors, and hits any code that allocates. All paths run with an allocator that keeps its memory,
as it would in a server; `--default-allocator` leaves it as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from layerboost.layer_plan import LayerPlan, full_plan
from layerboost.model.config import hybrid_config
from layerboost.model.hybrid import model_class
from layerboost.model.operators import sliding_window_attention


def tensors(args, tokens, grad):
    generator = torch.Generator().manual_seed(0)
    shapes = ((args.heads, tokens), (args.groups, tokens), (args.groups, tokens))
    return [torch.randn(1, *shape, args.size, generator=generator, requires_grad=grad) for shape in shapes]


def ours(q, k, v, window):
    return sliding_window_attention(q, k, v, window=window)


def masked(q, k, v, window):
    place = torch.arange(q.shape[2])
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def attention(args, path, tokens, train):
    q, k, v = tensors(args, tokens, train)

    def work():
        out = {"ours": ours, "masked": masked}[path](q, k, v, args.window)
        return torch.autograd.grad(out.sum(), (q, k, v)) if train else out

    return work


def model(args, path, tokens, train):
    config = MistralConfig(
        vocab_size=256, hidden_size=args.heads * args.size, intermediate_size=2 * args.heads * args.size,
        num_hidden_layers=2, num_attention_heads=args.heads, num_key_value_heads=args.groups, head_dim=args.size,
        max_position_embeddings=2**17, sliding_window=None if path == "ours" else args.window,
    )  # fmt: skip
    torch.manual_seed(0)
    if path == "masked":
        made = MistralForCausalLM(config)
    else:
        made = model_class("mistral")(hybrid_config(config, full_plan(2)))
        made.convert([LayerPlan("sliding_attention", args.window)] * 2)
    made = made.eval()
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(1))

    def work():
        with torch.set_grad_enabled(train):
            return made(ids, use_cache=False, logits_to_keep=1).logits

    return work


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**36), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
WHAT = {
    "attention, prefill": (attention, False),
    "attention, training": (attention, True),
    "two-layer model, prefill": (model, False),
}


def cpu_seconds(work):
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_memory(args, what, path, tokens):
    """Bytes that one call adds to the peak of a process of its own."""
    asked = [sys.executable, __file__, "--peak", json.dumps([what, path, tokens]), *args.shape]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


def print_peak(args):
    what, path, tokens = json.loads(args.peak)
    make, train = WHAT[what]
    make(args, path, 64, train)()  # libraries load and allocate before they are measured
    work = make(args, path, tokens, train)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    work()
    print(memory("VmHWM") - before)


def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def spread(values):
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def check(args):
    """Both paths give the same, outputs and gradients."""
    q, k, v = tensors(args, 2_048, True)
    results = []
    for path in (ours, masked):
        out = path(q, k, v, args.window)
        results.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, args.size)).sum(), (q, k, v))])
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    assert worst < 1e-4, worst
    one, two = (model(args, path, 2_048, False)() for path in ("ours", "masked"))
    assert torch.allclose(one, two, atol=1e-4), (one - two).abs().max()
    print(f"outputs and gradients at 2,048 tokens differ by at most {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--short", type=int, default=4_096)
    parser.add_argument("--long", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.default_allocator or args.peak or KEEP_MEMORY.items() <= os.environ.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    args.shape = [f"--{key}={getattr(args, key)}" for key in ("window", "heads", "groups", "size", "threads")]
    torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(args)
        return
    check(args)
    print(f"window {args.window}, {args.heads} heads of {args.size}, {args.groups} key/value heads, float32, "
          f"{args.threads} thread(s), {args.repeats} repeats; CPU time, median (smallest to largest)")  # fmt: skip
    for what, (make, train) in WHAT.items():
        cells = [("ours", args.short), ("ours", args.long), ("masked", args.long)]
        works = [make(args, path, tokens, train) for path, tokens in cells]
        times = [[cpu_seconds(work) for work in works] for _ in range(args.repeats + 1)][1:]
        growth = [long / short for short, long, _ in times]
        gain = [slow / long for _, long, slow in times]
        peaks = [peak_memory(args, what, path, tokens) / 2**20 for path, tokens in cells]
        print(f"{what}:")
        print(f"  time at {args.long:,} / time at {args.short:,}: {spread(growth)}")
        print(f"  masked quadratic / ours at {args.long:,}: {spread(gain)}")
        print(f"  peak memory, MiB: ours {peaks[0]:.0f} at {args.short:,}, {peaks[1]:.0f} at {args.long:,}; "
              f"masked {peaks[2]:.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
