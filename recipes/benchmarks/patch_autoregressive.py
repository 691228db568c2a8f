"""Measures what chunking alone gives: TokCom's context encoder with an autoregressive head per chunk, no latents.

    python recipes/benchmarks/patch_autoregressive.py                          # embedded text, toy size, about a minute
    python recipes/benchmarks/patch_autoregressive.py --match_tokcom outputs/tokcom --train_file train.txt \
        --validation_file development.txt

A causal Llama reads the tokens before a chunk; a light causal transformer over [context state, tokens of the chunk so far]
then draws the chunk's tokens one after another. With `--match_tokcom` the context has the shape, tokenizer and row length of
that model, and training uses as many operations as all its stages together. The metrics are those of
recipes/evaluate_tokcom.py, so that the row fits into its table. Prints the row and writes `patch_autoregressive.json`.
"""

import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, LlamaConfig, LlamaModel

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.evaluation.text_generation import Sampler
from tokcom_hf.evaluation.text_protocol import SamplingPlan, held_out_prefixes, measure_sampler
from tokcom_hf.evaluation.text_report import print_row
from tokcom_hf.metrics.compute import count_training_flops
from tokcom_hf.metrics.text import TextJudge
from tokcom_hf.metrics.token_sampling import sample_tokens
from tokcom_hf.models.shared_cache_name import CACHE
from tokcom_hf.models.shared_cross_entropy import chunked_cross_entropy
from tokcom_hf.trainers.muon import MuonWithAdamW, split_for_muon
from tokcom_hf.trainers.tokcom_budget import tokcom_budget


@dataclass
class RunArguments:
    """Shape, budget and measurement."""

    output_dir: str = field(default="outputs/patch_autoregressive", metadata={"help": "Folder of the JSON."})
    match_tokcom: str | None = field(
        default=None, metadata={"help": "TokCom folder whose context, tokenizer, row length and compute are matched."}
    )
    hidden_size: int = field(default=128, metadata={"help": "Width of context and head where nothing is matched."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the context where nothing is matched."})
    head_dim: int = field(default=32, metadata={"help": "Width of an attention head where nothing is matched."})
    head_layers: int = field(default=1, metadata={"help": "Layers of the causal transformer inside a chunk."})
    chunk_size: int = field(default=4, metadata={"help": "Tokens per chunk where nothing is matched."})
    length: int = field(default=128, metadata={"help": "Tokens per row where nothing is matched."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; none trains one on the corpus."})
    tokenizer_vocab_size: int = field(default=1024, metadata={"help": "Size of a tokenizer trained on the corpus."})
    steps: int | None = field(default=None, metadata={"help": "Training steps; none: 200, or the matched compute."})
    batch_size: int = field(default=4, metadata={"help": "Rows per step."})
    learning_rate: float = field(
        default=4e-3, metadata={"help": "Learning rate of AdamW (tables, norms); cosine to 0."}
    )
    muon_learning_rate: float = field(
        default=0.01, metadata={"help": "Learning rate of Muon (matrices); cosine to 0."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of both optimizers."})
    warmup_steps: int = field(default=30, metadata={"help": "Steps of linear warm-up."})
    ema_decay: float = field(default=0.99, metadata={"help": "Decay of the averaged weights, which are measured."})
    seed: int = field(default=42, metadata={"help": "Seed of weights and batches."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Sampling seeds."})
    num_samples: int = field(default=16, metadata={"help": "Generated rows per seed."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of tokens."})
    num_prefixes: int = field(default=300, metadata={"help": "Number of prefixes for BrierLM."})
    prefix_length: int = field(default=64, metadata={"help": "Tokens per prefix."})
    draws: int = field(default=4, metadata={"help": "Continuations drawn per prefix."})


class PatchAutoregressive(nn.Module):
    """Causal context over tokens, and a causal transformer of `head_layers` inside each chunk.

    Args:
        config: shape of the context; its last id is the start token, which is never predicted.
        chunk_size: tokens of a chunk.
        head_layers: layers of the transformer over [context state, tokens of the chunk so far].
    """

    def __init__(self, config: LlamaConfig, chunk_size: int = 4, head_layers: int = 1):
        super().__init__()
        self.chunk_size, self.start_id = chunk_size, config.vocab_size - 1
        self.context = LlamaModel(config)
        inner = deepcopy(config)
        inner.num_hidden_layers = head_layers
        self.head = LlamaModel(inner)
        # One embedding table serves the context, the head and the output.
        self.head.embed_tokens = self.context.embed_tokens

    @property
    def device(self) -> torch.device:
        return self.context.device

    def get_input_embeddings(self) -> nn.Module:
        return self.context.embed_tokens

    @property
    def table(self) -> torch.Tensor:
        """Output table (vocabulary without the start token, hidden)."""
        return self.context.embed_tokens.weight[: self.start_id]

    def read(self, input_ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Ids (batch, n) → states (batch, n + 1, hidden) before each id and after the last, and the KV cache.

        With a cache the ids continue the cached ones, and the states (batch, n, hidden) are those after each id.
        """
        if cache is None:
            start = input_ids.new_full((len(input_ids), 1), self.start_id)
            input_ids = torch.cat([start, input_ids], dim=1)
        outputs = self.context(input_ids, use_cache=True, **{CACHE: cache})
        return outputs.last_hidden_state, outputs[CACHE]

    def inside(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Context states (chunks, hidden) and first k tokens (chunks, k) of chunks → head states (chunks, k + 1, hidden)."""
        embedded = torch.cat([states[:, None], self.context.embed_tokens(tokens)], dim=1)
        return self.head(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def forward(self, input_ids: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Cross-entropy in nats per token over the whole chunks of (batch, length) ids from token `offset` on."""
        size = self.chunk_size
        chunks = (input_ids.shape[1] - offset) // size
        states, _ = self.read(input_ids[:, : offset + (chunks - 1) * size])
        states = states[:, offset::size].flatten(0, 1)
        tokens = input_ids[:, offset : offset + chunks * size].reshape(-1, size)
        hidden = self.inside(states, tokens[:, :-1])
        return chunked_cross_entropy(hidden.flatten(0, 1), self.table, tokens.flatten())


@dataclass
class PatchSampler(Sampler):
    """Samples from a `PatchAutoregressive`, and gives log-probabilities of continuations."""

    model: PatchAutoregressive
    temperature: float = 1.0
    batch_size: int = 256

    @torch.no_grad()
    def continuations(self, prefixes: np.ndarray, draws: int, length: int, seed: int) -> np.ndarray:
        model, generator, parts = self.model, torch.Generator().manual_seed(seed), []
        given = torch.as_tensor(prefixes, dtype=torch.long).to(model.device)
        for ids in given.split(max(1, self.batch_size // draws)):
            states, cache = model.read(ids)
            cache.batch_repeat_interleave(draws)
            state = states[:, -1].repeat_interleave(draws, 0)
            drawn: list[torch.Tensor] = []
            while len(drawn) * model.chunk_size < length:
                if drawn:
                    states, cache = model.read(drawn[-1], cache)
                    state = states[:, -1]
                chunk = state.new_zeros((len(state), 0), dtype=torch.long)
                for _ in range(model.chunk_size):
                    logits = model.inside(state, chunk)[:, -1] @ model.table.T
                    chunk = torch.cat([chunk, sample_tokens(logits, self.temperature, generator)[:, None]], dim=1)
                drawn.append(chunk)
            parts.append(torch.cat(drawn, dim=1)[:, :length].view(len(ids), draws, length).cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def log_probs(self, prefixes: np.ndarray, continuations: np.ndarray) -> np.ndarray | None:
        model, draws, length, parts = self.model, *continuations.shape[1:], []
        size = max(1, self.batch_size // draws)
        given, flat = (torch.as_tensor(part).to(model.device) for part in (prefixes, continuations))
        for ids, wanted in zip(given.split(size), flat.flatten(0, 1).split(size * draws)):
            states, cache = model.read(ids)
            cache.batch_repeat_interleave(draws)
            state, found = states[:, -1].repeat_interleave(draws, 0), []
            for begin, end in pairwise([*range(0, length, model.chunk_size), length]):
                tokens = wanted[:, begin:end]
                logits = model.inside(state, tokens[:, :-1]) @ model.table.T
                found.append((logits / self.temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0])
                if end < length:
                    states, cache = model.read(tokens, cache)
                    state = states[:, -1]
            parts.append(torch.cat(found, dim=1).view(len(ids), draws, length).cpu())
        return torch.cat(parts).numpy()


def train(model: PatchAutoregressive, tokens: torch.Tensor, length: int, steps: int, run: RunArguments) -> float:
    """Trains on windows at random positions of the text; afterwards the model holds the averaged weights.

    Returns:
        mean loss of the last tenth of the steps, nats per token.
    """
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = MuonWithAdamW(
        *split_for_muon(model), run.muon_learning_rate, run.learning_rate, weight_decay=run.weight_decay
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(1, run.warmup_steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average, losses = [p.detach().clone() for p in model.parameters()], []
    bar = tqdm(range(steps), desc="training", unit=" steps")
    for step in bar:
        starts = torch.randint(len(tokens) - length, (run.batch_size, 1), generator=generator).to(tokens.device)
        offset = int(torch.randint(model.chunk_size, (1,), generator=generator))
        loss = model(tokens[starts + torch.arange(length, device=tokens.device)], offset)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(run.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        losses.append(loss.item())
        bar.set_postfix(nats=f"{np.mean(losses[-20:]):.3f}")
    for parameter, mean in zip(model.parameters(), average):
        parameter.data.copy_(mean)
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def main() -> None:
    """Trains and measures the model; prints and saves its row."""
    values = parse_recipe(__doc__, {"run": RunArguments, "data": TextSource})
    run, source = RunArguments(**values["run"]), TextSource(**values["data"])
    run.seeds = run.seeds if isinstance(run.seeds, list) else [run.seeds]
    if run.draws < 2 or not run.seeds:
        raise RecipeError(f"--draws must be at least 2 and --seeds not empty, got {run.draws} and {run.seeds}.")
    length, tokenizer, tokcom = run.length, run.tokenizer, None
    if run.match_tokcom is not None:
        tokcom = AutoModel.from_pretrained(run.match_tokcom)
        if getattr(tokcom.config, "context", None) is None:
            raise RecipeError(f"{run.match_tokcom!r} has no context encoder to match; leave --match_tokcom out.")
        run.chunk_size = tokcom.config.vae.chunk_size
        length, tokenizer = tokcom.config.max_chunks * run.chunk_size, run.match_tokcom
    if run.chunk_size < 1 or length < 2 * run.chunk_size:
        raise RecipeError(f"--length must hold two chunks of {run.chunk_size} tokens, got {length}.")
    data = load_source(source, length, tokenizer, run.tokenizer_vocab_size)
    vocabulary = len(data.tokenizer)
    torch.manual_seed(run.seed)
    model = PatchAutoregressive(context_config(run, tokcom, vocabulary, length), run.chunk_size, run.head_layers)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train_ids, held_out = np.asarray(data.train.token_ids, dtype=np.int64), full_rows(data.validation)
    tokens = torch.from_numpy(train_ids).to(model.device)
    if len(tokens) <= length:
        raise RecipeError(f"The training text has {len(tokens)} tokens, but one row takes {length}; give more text.")
    example = tokens[:length].expand(run.batch_size, -1)
    step_flops = count_training_flops(lambda: model(example))
    model.zero_grad()
    steps = run.steps or 200
    if tokcom is not None and run.steps is None:
        steps = max(1, round(tokcom_budget(run.match_tokcom, tokcom, data.train)["flops"] / step_flops))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; {steps} steps of {run.batch_size * length} tokens, {step_flops:.3g} operations")
    started = time.perf_counter()
    loss = train(model, tokens, length, steps, run)
    seconds = time.perf_counter() - started

    with torch.no_grad():
        nats = float(
            np.mean([float(model(rows)) for rows in torch.from_numpy(held_out[:64]).to(model.device).split(8)])
        )
    judge = TextJudge(train_ids, held_out, vocabulary + 1)
    prefixes = held_out_prefixes(held_out.reshape(-1), run.num_prefixes, run.prefix_length)
    sampler = PatchSampler(model, run.temperature)
    row = measure_sampler(sampler, judge, run.seeds, SamplingPlan(run.num_samples, length, prefixes, run.draws))
    print(f"nats per token: {loss:.3f} in training, {nats:.3f} held out")
    print_row("patch-autoregressive", row, header=True)
    out = Path(run.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": vars(run) | {"data": vars(source), "length": length, "steps": steps}, "parameters": parameters,
        "flops": step_flops * steps, "tokens": steps * run.batch_size * length, "seconds": seconds,
        "train_nats": loss, "held_out_nats": nats, "row": row,
        "sample": data.tokenizer.decode(sampler.rows(1, length, run.seeds[0])[0]),
    }  # fmt: skip
    (out / "patch_autoregressive.json").write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"results in {out}")


def context_config(run: RunArguments, tokcom: Any, vocabulary: int, length: int) -> LlamaConfig:
    """Shape of the context, from the matched TokCom or from the arguments; the last id is the start token."""
    if tokcom is not None:
        config = deepcopy(tokcom.config.context)
    else:
        heads = max(1, run.hidden_size // run.head_dim)
        config = LlamaConfig(
            hidden_size=run.hidden_size, intermediate_size=3 * run.hidden_size, num_hidden_layers=run.num_layers,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=run.head_dim,
        )  # fmt: skip
    config.vocab_size = vocabulary + 1
    config.max_position_embeddings = max(length + 1, 1024)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


if __name__ == "__main__":
    run_recipe(main)
