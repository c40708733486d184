"""Train the bundled model: `python benchmarks/train_demo.py --minutes 60`; `--out DIR` writes it elsewhere.

Trains a Llama-architecture code model that can lose sublayers the way a large model can. Large models are deep and
redundant. A small model that is trained plainly is not, so no mask would make it faster. Two means help, and the
model card names both:

* Stochastic depth on sublayers (Huang et al. 2016; LayerSkip, arXiv 2404.16710): every step drops each attention and
  MLP branch independently. The probability rises with depth, and layer 0 is never dropped.
* Distillation: in the last part of the run a randomly thinned network learns from the full one.

The run has a time budget, not a number of steps: the learning rate follows the elapsed share of it. A run cannot be
resumed: a checkpoint is a finished model with a higher loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skipsearch.demo.corpus import modules

VOCAB = 4096
SHAPE = {"num_hidden_layers": 20, "hidden_size": 256, "intermediate_size": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONTEXT = 512
SHORT = 256  # most of the run uses short rows: attention's cost grows with their length
TOKENS_PER_PASS, PASSES = 4096, 2
DISTIL_FROM = 0.65  # share of the time budget after which thinned networks are distilled
PEAK_LR, WARMUP, HOLD = 3e-3, 0.02, 0.3
END_OF_TEXT = "<|endoftext|>"
BUNDLED = Path(__file__).resolve().parents[1] / "skipsearch" / "demo" / "model"

# The model card (README.md), filled in with the figures of the run.
CARD = """\
---
license: apache-2.0
language: code
---
# skipsearch demo model

A Llama-architecture causal language model of Python source: {layers} layers, {parameters:,} parameters,
byte-level BPE of 4096 tokens, context 512, weights in bfloat16. It exists so that skipsearch can be tried and
tested offline on trained weights and real text.

**Data.** The source files of CPython's standard library, as installed beside the training interpreter
(Python Software Foundation License): {corpus_tokens:,} tokens. One module in sixteen, chosen by a hash of
its path (`skipsearch.demo.corpus`), was left out; those modules supply calibration and held-out prompts.

**Recipe.** `python benchmarks/train_demo.py --minutes {minutes} --seed {seed}`: {steps} steps,
{training_tokens_seen:,} tokens seen, {threads} CPU threads, bf16 autocast, Muon for the matrices and AdamW for
the rest. *It was trained to be skippable*: every attention and MLP branch from layer 1 on was dropped at random
(probability rising with depth from about 0.15 to 0.5, spread around that from step to step), and in the last
third of the run randomly thinned networks were distilled towards the full one. Large models tolerate skipping
because they are deep and redundant; a plainly trained model of this size does not. Speed-ups on this model say
how well the tool works, not what to expect from another model.

**Result.** Held-out loss {held_out_loss} nats a token over {held_out_tokens:,} tokens of unseen modules (fp32
arithmetic on the shipped weights).

**Not for** writing code that anyone runs, for judging language models, or for text other than Python.
"""

Branch = Callable[..., Tensor]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB tokens, which can encode every byte string."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of token ids [T]; the end-of-text token follows each text."""
    end = tokenizer.eos_token_id
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([t for row in rows for t in (*row.ids, end)], dtype=torch.int64)


def attention_branch(layer: Any, x_BTD: Tensor, rope: tuple[Tensor, Tensor], causal: Tensor) -> Tensor:
    out = layer.self_attn(layer.input_layernorm(x_BTD), position_embeddings=rope, attention_mask=causal)
    return x_BTD + out[0]


def mlp_branch(layer: Any, x_BTD: Tensor) -> Tensor:
    return x_BTD + layer.mlp(layer.post_attention_layernorm(x_BTD))


def output_head(model: Any, x_BTD: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(x_BTD)).float()


class Net:
    """The forward pass with some branches dropped; each branch is a function that torch.compile can share."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.model, self.depth = model, model.config.num_hidden_layers
        wrap: Callable[[Branch], Branch] = torch.compile if compiled else lambda f: f
        self.attention, self.mlp, self.head = wrap(attention_branch), wrap(mlp_branch), wrap(output_head)

    def __call__(self, ids_BT: Tensor, dropped: set[tuple[int, str]] = frozenset()) -> Tensor:  # type: ignore[assignment]
        base = self.model.model
        width = ids_BT.shape[1]
        causal = torch.full((width, width), -1e30).triu(1)[None, None].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            x_BTD = base.embed_tokens(ids_BT)
            rope = base.rotary_emb(x_BTD, torch.arange(width)[None])
            for i, layer in enumerate(base.layers):
                if (i, "attention") not in dropped:
                    x_BTD = self.attention(layer, x_BTD, rope, causal)
                if (i, "mlp") not in dropped:
                    x_BTD = self.mlp(layer, x_BTD)
            return self.head(self.model, x_BTD)


def sample_dropped(layers: int, strength: float, rng: random.Random) -> set[tuple[int, str]]:
    """Branches to drop, each with probability strength * (0.15 in layer 1 to 0.5 in the last), at most 0.9."""
    return {
        (i, kind)
        for i in range(1, layers)
        for kind in ("attention", "mlp")
        if rng.random() < min(0.9, strength * (0.15 + 0.35 * (i - 1) / (layers - 2)))
    }


def learning_rate(share: float) -> float:
    """Warm-up, then constant, then linear decay to 2 %, by the elapsed share of the time budget."""
    if share < WARMUP:
        return PEAK_LR * (share + 1e-3) / WARMUP
    return PEAK_LR * max(0.02, min(1.0, (1 - share) / (1 - HOLD)))


def cross_entropy(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten())


@torch.no_grad()
def held_out_loss(net: Net, ids: Tensor, rows: int = 10**9) -> float:
    """Mean loss of the full model in nats per token, over at most `rows` windows of the context length."""
    count = min(rows, (len(ids) - 1) // CONTEXT)
    total = 0.0
    for r in range(count):
        window = ids[r * CONTEXT : (r + 1) * CONTEXT + 1][None]
        total += float(cross_entropy(net(window[:, :-1]), window[:, 1:]))
    return total / count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Replace `out` by a complete bf16 checkpoint, in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        state = {k: v.bfloat16() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        model.save_pretrained(new, state_dict=state)
        config = json.loads((new / "config.json").read_text())
        config["dtype"] = "bfloat16"
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(new)
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(new, out)


def new_model(shape: dict[str, int]) -> LlamaForCausalLM:
    """A random model whose residual branches start small, in proportion to the depth."""
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape, **HEADS,
    )  # fmt: skip
    config._attn_implementation = "eager"  # compiled, it trains a third faster than the CPU backward of sdpa
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def windows(ids: Tensor, width: int) -> Tensor:
    """Random windows [B, width + 1] of the corpus, TOKENS_PER_PASS tokens in all."""
    starts = torch.randint(0, len(ids) - width - 1, (TOKENS_PER_PASS // width,))
    return torch.stack([ids[s : s + width + 1] for s in starts.tolist()])


def depth_pass(net: Net, window: Tensor, rng: random.Random) -> str:
    """Backward through a network with dropped branches, or the full one in a fifth of the passes; returns a note."""
    full = rng.random() < 0.2
    dropped = set() if full else sample_dropped(net.depth, rng.uniform(0.4, 2.0), rng)
    loss = cross_entropy(net(window[:, :-1], dropped), window[:, 1:])
    (loss / PASSES).backward()
    return f"{len(dropped):2d} dropped {loss.item():.3f}"


def distillation_pass(net: Net, window: Tensor, rng: random.Random) -> str:
    """Backward through the full network, and through a thinned one towards its output; returns a note."""
    teacher = net(window[:, :-1])
    loss = cross_entropy(teacher, window[:, 1:])
    (loss / PASSES).backward()
    target = teacher.detach().softmax(-1).flatten(0, 1)
    dropped = sample_dropped(net.depth, rng.uniform(0.8, 2.2), rng)
    soft = F.cross_entropy(net(window[:, :-1], dropped).flatten(0, 1), target)
    (soft / PASSES).backward()
    return f"full {loss.item():.3f}, {len(dropped):2d} dropped {soft.item():.3f}"


def train(minutes: float, out: Path, seed: int, compiled: bool, shape: dict[str, int]) -> None:
    """Train within the time budget; writes the model, its card and the figures of the run (training.json) to `out`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    texts = [text for _, text in modules(held_out=False)]
    rng.shuffle(texts)
    tokenizer = train_tokenizer(texts[::3])
    ids, held = encode(tokenizer, texts), encode(tokenizer, [t for _, t in modules(held_out=True)])
    print(f"{len(ids):,} training tokens, {len(held):,} held-out tokens", flush=True)
    model = new_model(shape)
    net = Net(model, compiled)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]
    seen = step = 0
    begin = saved = time.monotonic()
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = learning_rate(share)
        width, one_pass = (SHORT, depth_pass) if share < DISTIL_FROM else (CONTEXT, distillation_pass)
        notes = [one_pass(net, windows(ids, width), rng) for _ in range(PASSES)]
        seen += PASSES * TOKENS_PER_PASS
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            rate = seen / (time.monotonic() - begin)
            print(f"{share:6.1%} step {step} {seen / 1e6:.2f}M tokens {rate:.0f}/s | {notes[0]}", flush=True)
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            save(model, tokenizer, out)
            print(f"{share:6.1%} held-out loss {held_out_loss(net, held, 40):.3f}", flush=True)
    save(model, tokenizer, out)
    net = Net(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager"), False)
    facts = {
        "held_out_loss": round(held_out_loss(net, held), 4), "held_out_tokens": len(held),
        "training_tokens_seen": seen, "corpus_tokens": len(ids), "steps": step, "minutes": round(minutes, 1),
        "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "layers": net.depth,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    (out / "README.md").write_text(CARD.format(**facts))
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--seed", type=int, default=0)
    has_compiler = bool(shutil.which("g++") or shutil.which("clang++"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=has_compiler)
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    train(args.minutes, args.out, args.seed, args.compile, {name: getattr(args, name) for name in SHAPE})


if __name__ == "__main__":
    main()
