"""Train the reference model: small, Qwen3-shaped, with real in-context recall, from nothing but Python itself.

    # the shipped model: 43 minutes of one core, then 11 of two
    python scripts/train_reference.py --out first --tokens 10M
    python scripts/train_reference.py --start first --seed 1 --threads 2 --out src/layerboost/reference --tokens 3M
    # a larger one
    python scripts/train_reference.py --out big --hidden 256 --layers 12 --device cuda --tokens 200M

Recall does not come by itself at this size. What brings it: every layer alike starts with a weak induction circuit
(a head that looks at the previous token and writes it down, heads that match the current token against what was
written and copy), and a curriculum from short probes to long text. Needs torch >= 2.11, transformers >= 5.16,
tokenizers and this package's `src` on the path. torch's Muon computes in bfloat16: times are those of a processor with
instructions for it; one without took six times as long, and wants --muon-float32.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from layerboost.data.corpus import standard_library
from layerboost.data.probes import PROBES, ProbeMaker, ordinary_tokens, probe_sequences
from layerboost.data.sequences import Sequences, text_sequences, token_stream

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Stage:
    length: int
    probe_share: float
    step_tokens: int
    until: float  # share of all tokens at which the stage ends at the latest
    matrix_lr: float
    pass_accuracy: float = 0.9  # probe accuracy at which it ends earlier


STAGES = (
    Stage(64, 1.0, 1024, 0.06, 0.006),
    Stage(64, 0.7, 1024, 0.12, 0.006),
    Stage(128, 0.45, 2048, 0.25, 0.01),
    Stage(256, 0.35, 2048, 0.60, 0.01, 2.0),
    Stage(512, 0.35, 4096, 0.80, 0.01, 2.0),
    Stage(1024, 0.35, 4096, 1.01, 0.01, 2.0),
)

# What a model that was trained so goes on with: all lengths in turn, and twice as many needles, which are learnt last.
MORE = (Stage(256, 0.5, 4096, 1.0, 0.006), Stage(512, 0.5, 4096, 1.0, 0.006), Stage(1024, 0.5, 4096, 1.0, 0.006))
MORE_PROBES = ("copy", "key_value", "needle", "needle")


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in standard_library().split("train")[::2]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def build(args: argparse.Namespace, vocabulary: int) -> Qwen3ForCausalLM:
    heads = args.hidden // args.head_dim
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=args.head_dim,
        max_position_embeddings=STAGES[-1].length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(config)
    seed_induction(model, args.seed)
    return model


@torch.no_grad()
def seed_induction(model: Qwen3ForCausalLM, seed: int) -> None:
    """Start every layer alike with a weak induction circuit; no layer is singled out.

    Key/value head 0 attends to the previous token (its keys and queries hold a constant, rotated one step apart) and
    writes that token, seen through A, into the subspace B of the residual stream. The other heads match the current
    token seen through A against what stands in B, and copy. Everything carries noise of 0.3.
    """
    config = model.config
    hidden, head = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    g = torch.Generator().manual_seed(seed + 5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    embedding = model.model.embed_tokens.weight
    embedding.copy_(0.1 * normal(*embedding.shape))
    constant = normal(hidden)
    constant /= constant.norm()
    embedding.add_(0.8 * embedding.norm(dim=1).mean() * constant)

    def matrix() -> torch.Tensor:
        m = normal(head, hidden) / hidden**0.5
        return m - (m @ constant)[:, None] * constant

    seen, written = matrix(), matrix()
    frequency = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2) / head)
    frequency = torch.cat([frequency, frequency])
    fast, slow = (1 + 5 * f.float()[:, None] for f in (frequency > 0.15, frequency < 0.05))

    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 0)
        return x * angle.cos()[:, None] + torch.cat([-b, a]) * angle.sin()[:, None]

    def noisy(m: torch.Tensor) -> torch.Tensor:
        return m + 0.3 * normal(*m.shape) / hidden**0.5

    for layer in model.model.layers:
        attention = layer.self_attn
        query = attention.q_proj.weight.view(heads, head, hidden)
        key = attention.k_proj.weight.view(groups, head, hidden)
        value = attention.v_proj.weight.view(groups, head, hidden)
        out = attention.o_proj.weight.view(hidden, heads, head)
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            weight.copy_(0.6 * normal(*weight.shape) / hidden**0.5)
        layer.mlp.down_proj.weight.zero_()
        key[0].copy_(noisy(0.6 * normal(head, 1) * fast * constant))
        value[0].copy_(noisy(seen))
        for group in range(1, groups):
            key[group].copy_(noisy(written) * slow)
            value[group].copy_(normal(head, hidden) / hidden**0.5)
        for h in range(heads):
            group = h // (heads // groups)
            if group == 0:
                query[h].copy_(rotate(key[0], -frequency))
                out[:, h].copy_(0.08 * written.T)
            else:
                query[h].copy_(noisy(seen) * slow)
                out[:, h].copy_(0.16 * value[group].T)
        attention.q_norm.weight.fill_(2.5)
        attention.k_norm.weight.fill_(2.5)


class Batches:
    """Random training batches: text and densely asked probes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, seed: int) -> None:
        documents = standard_library().split("train")
        self.stream = token_stream(documents, tokenizer, tokens=10**9, piece=4096, seed=seed)
        self.rng = np.random.default_rng(seed)
        self.maker = ProbeMaker(ordinary_tokens(tokenizer, vocabulary), self.stream, self.rng)

    def draw(self, rows: int, length: int, probe_share: float, probes: tuple[str, ...]) -> tuple[Sequences, int]:
        """`rows` sequences, text first, and how many of them are text."""
        asked = round(rows * probe_share)
        starts = self.rng.integers(0, len(self.stream) - length, rows - asked)
        tokens = torch.from_numpy(self.stream[starts[:, None] + np.arange(length)])
        scored = torch.ones_like(tokens, dtype=torch.bool)
        scored[:, :1] = False
        parts = [Sequences(tokens, scored)]
        first = self.rng.integers(len(probes))
        for i, probe in enumerate(probes):
            share = (asked + (i + first) % len(probes)) // len(probes)
            if share:
                parts.append(probe_sequences(self.maker, probe, count=share, length=length, distance=None))
        return Sequences.concatenate(parts), rows - asked


def predict(model: Qwen3ForCausalLM, batch: Sequences, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the scored tokens alone, those tokens, and the row of each."""
    tokens, scored = batch.tokens.to(device), batch.scored.to(device)[:, 1:]
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[scored]
    return model.lm_head(hidden), tokens[:, 1:][scored], scored.nonzero()[:, 0]


@torch.no_grad()
def score(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, length: int, device: str) -> dict:
    """Held-out NLL in nats per token, and recall accuracy at distances of at least half the length."""
    model.eval()
    documents = standard_library().split("held_out")
    hay = token_stream(documents, tokenizer, tokens=200_000, piece=4 * length, seed=1)
    maker = ProbeMaker(ordinary_tokens(tokenizer, model.config.vocab_size), hay, np.random.default_rng(1))
    result = {}
    text = text_sequences(documents, tokenizer, count=count, length=length, seed=2)
    sets = {"nll": text} | {
        probe: probe_sequences(maker, probe, count=count, length=length, distance=length // 2) for probe in PROBES
    }
    for name, sequences in sets.items():
        total = counted = 0.0
        for batch in sequences.batches(max(1, 8192 // length)):
            logits, target, _ = predict(model, batch, device)
            if name == "nll":
                total += F.cross_entropy(logits.float(), target, reduction="sum").item()
            else:
                total += (logits.argmax(-1) == target).sum().item()
            counted += len(target)
        result[name] = round(total / counted, 4)
    model.train()
    return result


def orthogonal(grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """torch's Newton-Schulz iteration for Muon, in the gradient's own type in place of bfloat16."""
    a, b, c = coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(args.vocabulary)
        model = build(args, len(tokenizer))
    model = model.to(args.device).train()
    batches = Batches(tokenizer, len(tokenizer), args.seed)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(batches.stream):,} tokens of text", flush=True
    )

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0, momentum=0.95)
    adam = torch.optim.AdamW(
        [{"params": [model.model.embed_tokens.weight], "peak": 3e-4}, {"params": norms, "peak": 3e-3}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    curve: list[dict] = []
    stage = seen = step = 0
    accuracy, text_loss = 0.0, math.nan
    started, next_score = time.monotonic(), 0.0
    while seen < args.tokens:
        now = MORE[step % len(MORE)] if args.start else STAGES[stage]
        if (
            not args.start
            and stage + 1 < len(STAGES)
            and (seen / args.tokens > now.until or accuracy > now.pass_accuracy)
        ):
            stage, accuracy = stage + 1, 0.0
            now = STAGES[stage]
            print(f"stage {stage}: {now} at {seen:,} tokens", flush=True)
        probes = ("copy", "key_value", "needle")
        if args.start:
            probes = MORE_PROBES
        elif stage == 0:
            probes = probes[:1] if accuracy < 0.6 else probes[:2]
        elif stage == 1:
            probes = probes[:2]
        rows = now.step_tokens * args.batch_scale // now.length
        batch, text_rows = batches.draw(rows, now.length, now.probe_share, probes)
        rate = min(1.0, (step + 1) / 20) * min(1.0, (1 - seen / args.tokens) / 0.4 + 0.02)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * rate
        for group in muon.param_groups:
            group["lr"] = now.matrix_lr * rate
        logits, target, row = predict(model, batch, args.device)
        loss = F.cross_entropy(logits.float(), target, reduction="none")
        # a row with few questions still counts: its tokens weigh one over the root of their number
        weight = torch.bincount(row, minlength=rows).float().rsqrt()[row]
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        ((loss * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
        asked = row >= text_rows
        if step % 5 == 0:
            hit = (logits.argmax(-1) == target)[asked].float().mean().item()
            accuracy = 0.8 * accuracy + 0.2 * hit
            text_loss = loss[~asked].mean().item()
            if not math.isfinite(loss.mean().item()):
                raise SystemExit(f"loss is not finite at step {step}")
        seen += rows * now.length
        step += 1
        if step % 50 == 0:
            speed = seen / (time.monotonic() - started)
            print(
                f"step {step} tokens {seen:,} probes {accuracy:.3f} text {text_loss:.3f} {speed:.0f} tok/s", flush=True
            )
        if seen / args.tokens >= next_score:
            next_score += 0.05
            curve.append(
                {
                    "tokens": seen,
                    "seconds": round(time.monotonic() - started),
                    "length": now.length,
                    "at_256": score(model, tokenizer, 48, 256, args.device),
                }
            )
            print(json.dumps(curve[-1]), flush=True)
            save(model, tokenizer, out, args, curve)
    curve.append(
        {
            "tokens": seen,
            "seconds": round(time.monotonic() - started),
            "length": STAGES[-1].length,
            "at_256": score(model, tokenizer, 400, 256, args.device),
            "at_512": score(model, tokenizer, 200, 512, args.device),
            "at_1024": score(model, tokenizer, 100, 1024, args.device),
        }
    )
    print(json.dumps(curve[-1]), flush=True)
    save(model, tokenizer, out, args, curve)


def save(model, tokenizer, out: Path, args: argparse.Namespace, curve: list[dict]) -> None:
    """The checkpoint in bf16, the tokenizer, and the curve with everything needed to repeat it."""
    state = {name: value.to(torch.bfloat16).cpu() for name, value in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied
    model.save_pretrained(out, state_dict=state)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
    record = {
        "before": json.loads((Path(args.start) / "training.json").read_text()) if args.start else None,
        "arguments": vars(args),
        "corpus_digest": standard_library().digest,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def token_count(text: str) -> int:
    return int(float(text[:-1]) * {"k": 1e3, "M": 1e6}[text[-1]]) if text[-1] in "kM" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=token_count, default=10_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--start", help="go on from this folder, with other data: give another --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-float32", action="store_true", help="for processors without bfloat16 instructions")
    parser.add_argument("--batch-scale", type=int, default=1, help="multiplies the tokens of every step; for GPUs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    if args.muon_float32:
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal
    train(args)


if __name__ == "__main__":
    main()
