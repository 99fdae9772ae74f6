"""What healing costs beside the plain way to distil: transformers' Trainer, two models, and a KL over full logits.

    python benchmarks/healing.py

The plain way holds the original as a frozen teacher beside the converted hybrid, which has the same LoRA (by peft) as
ours, and takes the KL of all logits at once. Both train the same plan from the same random weights on the same rows of
random tokens, with the same AdamW and clipping: that all of their losses agree is asserted. Ways of ours:

    online          one set of weights is teacher and student; layers before the first change run once
    signals         the teacher's likeliest tokens were kept before, and it runs no more
    default losses  as online, with the losses that healing has by default

Every way runs in a process of its own, in turn, `--repeats` times; its first step warms up. Prints ratios to the plain
way, median (smallest to largest): tokens per second, by CPU time and by wall clock, and peak memory: above that of the
process after imports on the CPU (float32, Linux), all that torch allocated on a GPU (bfloat16). Then where the time
goes. `--scored` is the share of tokens that count, at the end of each row, as answers do: the plain way computes all.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import peft
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from layerboost.data.sequences import Sequences
from layerboost.heal import Config
from layerboost.heal.signals import signals
from layerboost.heal.student import Counts, Healer
from layerboost.heal.targets import find_targets
from layerboost.heal.training import make_optimizer
from layerboost.layer_plan import KEEP, LayerPlan, full_plan
from layerboost.model.config import hybrid_config
from layerboost.model.hybrid import model_class
from layerboost.progress import say

WAYS = ("plain", "online", "signals", "default losses")
PARTS = ("teacher's layers", "student's layers", "head", "loss", "head's gradient", "rest of backward, and AdamW")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


# ------------------------------------------------------------------------------------------------------ what is trained


def plan_of(args):
    given = {"F": KEEP, "W": LayerPlan("sliding_attention", args.window), "N": LayerPlan("no_attention")}
    return [given[letter] for letter in args.plan]


def build(args):
    config = Qwen3Config(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=len(args.plan), num_attention_heads=args.heads, num_key_value_heads=args.heads // 2,
        head_dim=args.hidden // args.heads, max_position_embeddings=4 * args.length, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = model_class("qwen3")(hybrid_config(config, full_plan(len(args.plan)))).eval()
    return config, model.to(torch.bfloat16) if CUDA else model


def data(args):
    shape = (args.batch * (args.steps + 1), args.length)
    tokens = torch.randint(0, args.vocabulary, shape, generator=torch.Generator().manual_seed(1))
    first = max(1, round((1 - args.scored) * args.length))
    return Sequences(tokens, (torch.arange(args.length) >= first).expand(shape).contiguous())


def settings(args, way):
    losses = {} if way == "default losses" else {"losses": {"forward_kl": 1.0}}
    return Config(rank=args.rank, batch=args.batch, length=args.length, top_k=args.top_k, **losses)


# ------------------------------------------------------------------------------------------------------------ the ways


class Plain(Trainer):
    """Distillation as one writes it down."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["tokens"]).logits
        student = model(input_ids=inputs["tokens"]).logits
        scored = inputs["scored"][:, 1:]
        expected, found = (logits[:, :-1].float().log_softmax(-1) for logits in (teacher, student))
        kl = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        return (kl * scored).sum() / scored.sum()

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Steps(TrainerCallback):
    def __init__(self, meter):
        self.meter = meter

    def on_step_end(self, *_, **__):
        self.meter.step()


def plain(args, meter, folder):
    config, student = build(args)
    with torch.device(DEVICE):
        teacher = Qwen3ForCausalLM(config).eval().requires_grad_(False).to(student.dtype)
    teacher.load_state_dict(student.state_dict())
    plan, base, wanted = plan_of(args), student.base_model_prefix, settings(args, "plain")
    names = [f"{base}.{target.name}" for target in find_targets(student, plan, wanted)]
    student.convert(plan)
    student.requires_grad_(False)
    torch.manual_seed(wanted.seed)
    lora = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=names)
    student = peft.get_peft_model(student, lora).to(DEVICE)
    rows = data(args)
    told = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=args.batch, max_steps=args.steps + 1, use_cpu=not CUDA,
        learning_rate=0.5 / args.hidden, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Plain(
        student, told, callbacks=[Steps(meter)],
        train_dataset=[{"tokens": t, "scored": s} for t, s in zip(rows.tokens, rows.scored, strict=True)],
    )  # fmt: skip
    trainer.teacher = teacher
    meter.time(teacher.model, "forward", "teacher's layers")
    meter.time(student.base_model.model.base_model, "forward", "student's layers")
    meter.time_head(teacher.lm_head)
    meter.time_head(student.base_model.model.lm_head)
    meter.time(trainer, "compute_loss", "loss", keep=True)
    meter.start()
    trainer.train()


def ours(args, meter, folder, way):
    model = build(args)[1]
    healer = Healer(model, plan_of(args), settings(args, way)).to(DEVICE)
    rows, optimizer, kept = data(args), make_optimizer(healer), None
    if way == "signals":
        started = seconds()
        kept = signals(folder, healer, rows, args.top_k, "random weights")
        meter.told["writing"] = [now - then for now, then in zip(seconds(), started, strict=True)]
        meter.told["bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    meter.time(model.base_model, "forward", lambda: f"{'student' if torch.is_grad_enabled() else 'teacher'}'s layers")
    meter.time_head(model.lm_head)
    meter.time(healer, "_logits_loss", "loss")
    meter.time(healer, "_inner_loss", "loss")
    meter.start()
    for numbers in torch.arange(len(rows)).split(args.batch):
        optimizer.zero_grad(set_to_none=True)
        batch = rows[numbers]
        loss = healer.backward(batch, Counts.of(batch), kept and kept[numbers])
        torch.nn.utils.clip_grad_norm_(healer.parameters.values(), 1.0)
        optimizer.step()
        meter.losses.append(loss.item())
        meter.step()


# ---------------------------------------------------------------------------------------------------------- measuring


def seconds():
    """CPU time of all threads, and wall clock."""
    if CUDA:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def mark():
    """A moment: of CPU time, or on the GPU's own clock, which nothing waits for."""
    if not CUDA:
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end):
    return start.elapsed_time(end) / 1_000 if CUDA else end - start


class Meter:
    """Seconds of every step, and of the parts that it is told to time, each without those inside it."""

    def __init__(self):
        self.losses, self.told, self.steps, self.parts = [], {}, [], Counter()
        self._open, self._timed = [], []
        self._before = 0 if CUDA else memory("VmRSS")

    def start(self):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._last = seconds()

    def step(self):
        self.steps.append([now - then for now, then in zip(seconds(), self._last, strict=True)])
        if len(self.steps) > 1:  # the first warms up
            for what, around, start, end in self._timed:
                self.parts[what] += between(start, end)
                if around:
                    self.parts[around] -= between(start, end)
        self._timed.clear()
        self._last = seconds()

    @contextlib.contextmanager
    def _part(self, what):
        what, around = what() if callable(what) else what, self._open[-1] if self._open else None
        self._open.append(what)
        start = mark()
        yield
        self._timed.append((what, around, start, mark()))
        self._open.pop()

    def time(self, owner, name, what, keep=False):
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args, **kwargs):
            with self._part(what):
                found = plain(*args, **kwargs)
            if keep:
                self.losses.append(found.item())
            return found

        setattr(owner, name, timed)

    def time_head(self, head):
        self.time(head, "forward", "head")
        inside = contextlib.ExitStack()

        def enter(*_):
            inside.enter_context(self._part("head's gradient"))

        head.register_full_backward_pre_hook(enter)
        head.register_full_backward_hook(lambda *_: inside.close())

    def report(self):
        peak = torch.cuda.max_memory_allocated() if CUDA else memory("VmHWM") - self._before
        cpu, wall = (sum(step[i] for step in self.steps[1:]) for i in (0, 1))
        count = len(self.steps) - 1
        parts = {part: self.parts[part] / count for part in PARTS}
        parts[PARTS[-1]] = (wall if CUDA else cpu) / count - sum(parts.values())
        return {"cpu": cpu / count, "wall": wall / count, "peak": peak, "parts": parts, "losses": self.losses} | (
            self.told
        )


def run_one(args):
    meter = Meter()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.way == "plain":
            plain(args, meter, Path(folder))
        else:
            ours(args, meter, Path(folder), args.way)
        print(json.dumps(meter.report()))


def in_own_process(args, way):
    asked = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    found = subprocess.run(asked, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- telling


def spread(values):
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def check(rounds):
    """The same losses, step by step; signals leave out a little."""
    for found in rounds:
        torch.testing.assert_close(
            torch.tensor(found["online"]["losses"]), torch.tensor(found["plain"]["losses"]),
            rtol=0.05 if CUDA else 1e-3, atol=1e-5,
        )  # fmt: skip


def tell(args, rounds):
    tokens = args.batch * args.length
    base = [found["plain"] for found in rounds]
    print(f"plain: {tokens / median(one['cpu'] for one in base):.1f} tokens per second of CPU time, "
          f"{tokens / median(one['wall'] for one in base):.1f} of wall clock, "
          f"peak {median(one['peak'] for one in base) / 2**30:.2f} GiB")  # fmt: skip
    for way in WAYS[1:]:
        own = [found[way] for found in rounds]
        ratios = [spread([b[key] / a[key] for a, b in zip(own, base, strict=True)]) for key in ("cpu", "wall")]
        less = spread([a["peak"] / b["peak"] for a, b in zip(own, base, strict=True)])
        print(f"{way} over plain: tokens/s {ratios[0]} by CPU time, {ratios[1]} by wall clock; peak memory {less}, "
              f"{median(one['peak'] for one in own) / 2**30:.2f} GiB")  # fmt: skip
    kept = [found["signals"] for found in rounds]
    count = args.steps + 1
    print(f"writing signals over one healing with them, CPU time: "
          f"{spread([one['writing'][0] / (count * one['cpu']) for one in kept])}; "
          f"{kept[0]['bytes'] / (count * tokens):.0f} bytes per token")  # fmt: skip
    print("\n| seconds per step | " + " | ".join(WAYS) + " |\n|---|" + "---:|" * len(WAYS))
    for part in PARTS:
        cells = [f"{median(found[way]['parts'][part] for found in rounds):.2f}" for way in WAYS]
        print(f"| {part} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="FFWNFN", help="a letter per layer: Full, Window, None")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2_048)
    parser.add_argument("--intermediate", type=int, default=6_144)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--scored", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_one(args)
        return
    rounds = []
    for number in range(args.repeats):
        rounds.append({})
        for way in WAYS:
            rounds[-1][way] = in_own_process(args, way)
            seconds = rounds[-1][way]["wall" if CUDA else "cpu"]
            say(f"{number + 1}/{args.repeats} {way}: {seconds:.2f} s per step")
    device = torch.cuda.get_device_name() if CUDA else f"CPU, float32, {args.threads} thread(s)"
    print(f"{device}; plan {args.plan}, hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.batch} x "
          f"{args.length} tokens, {args.scored:.0%} scored; {args.repeats} repeats of {args.steps} steps")  # fmt: skip
    tell(args, rounds)
    check(rounds)


if __name__ == "__main__":
    main()
