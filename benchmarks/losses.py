"""What the loss of healing costs, with the head's products, forward and backward, beside a KL over all logits at once.

    python benchmarks/losses.py                                      # on a GPU, if there is one, in bfloat16
    TORCHDYNAMO_DISABLE=1 python benchmarks/losses.py                # the KL without its compiled kernel
    python benchmarks/losses.py --tokens 512 --hidden 256 --threads 1  # quick enough for a CPU, float32

Random hidden states; ways in turn, `--repeats` times after one round that warms up. Prints milliseconds and the ratio
to all logits at once, median (smallest to largest): by CPU time on the CPU, by wall clock on a GPU, with peak memory.
"""

import argparse
import time
from statistics import median

import torch
from torch.nn import functional as F

from layerboost.heal.losses import chunked, forward_kl, mixed_logits_loss, top_k_kl

CUDA = torch.cuda.is_available()
WHOLE = "all logits at once"


def ways(args):
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    torch.manual_seed(0)
    head = torch.nn.Linear(args.hidden, args.vocabulary, bias=False).to(device, dtype).requires_grad_(False)
    student, teacher = (torch.randn(args.tokens, args.hidden).to(device, dtype) for _ in range(2))
    student.requires_grad_()
    targets = torch.zeros(args.tokens, dtype=torch.long, device=device)
    ids = torch.randint(args.vocabulary, (args.tokens, args.top_k), device=device)
    kept = torch.full_like(ids, -10.0, dtype=torch.float32)

    def whole():
        with torch.no_grad():
            expected = head(teacher).float().log_softmax(-1)
        found = head(student).float().log_softmax(-1)
        return F.kl_div(found, expected, log_target=True, reduction="none").sum()

    return {
        WHOLE: whole,
        "chunks, by autograd": lambda: chunked(
            student, teacher, head, lambda s, t, span: forward_kl(s, t, targets[span])
        ),
        "chunks, KL": lambda: mixed_logits_loss({"forward_kl": 1.0}, student, teacher, targets, head),
        "chunks, kept signals": lambda: chunked(
            student, None, head, lambda s, _, span: top_k_kl(s, ids[span], kept[span])
        ),
    }  # fmt: skip


def now():
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(values, digits):
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--hidden", type=int, default=2_048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = ways(args)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    peaks = dict.fromkeys(made, 0)
    for _ in range(args.repeats + 1):
        for name, loss in made.items():
            before = torch.cuda.memory_allocated() if CUDA else 0
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            started = now()
            loss().backward()
            seconds[name].append(now() - started)
            peaks[name] = torch.cuda.max_memory_allocated() - before if CUDA else 0
    print(f"{torch.cuda.get_device_name() if CUDA else f'CPU, {args.threads} thread(s)'}; {args.tokens} tokens, width "
          f"{args.hidden}, vocabulary {args.vocabulary:,}")  # fmt: skip
    for name, each in seconds.items():
        took, base = each[1:], seconds[WHOLE][1:]
        memory = f", peak {peaks[name] / 2**30:.2f} GiB" if CUDA else ""
        ratios = [b / t for t, b in zip(took, base, strict=True)]
        print(f"{name}: {spread([1_000 * t for t in took], 1)} ms, {spread(ratios, 2)} times as fast{memory}")


if __name__ == "__main__":
    main()
