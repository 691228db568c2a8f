"""Tab "Text": writing, decoding noisy latents, and the way from noise to text step by step, with a `TokComModel`."""

import html
import time
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any

import torch

from tokcom_hf.evaluation.tokcom_denoising import BlockDenoiser
from tokcom_hf.models.tokcom_denoise import Predictions
from tokcom_hf.models.tokcom_flow_matching import denoising_steps, flow_path, interpolate, step_times

MARK = 'style="background: rgba(240, 80, 60, 0.3); color: inherit"'
# Pieces of a text, each with "wrong" where its tokens differ from the input's, or None.
Marked = list[tuple[str, str | None]]


def write(
    pipe: Any, prompt: str, chunks: int, block_size: int, num_steps: int, temperature: float, seed: int
) -> tuple[str, str]:
    """Continues a prompt, or writes from nothing where it is empty.

    Args:
        pipe: `tokcom-generation` pipeline.
        chunks: chunks to write.
        block_size: chunks that are denoised together, 0 for all, -1 for the model's own number.

    Returns:
        The text with its prompt, and a sentence about tokens and seconds.
    """
    started = time.perf_counter()
    result = pipe(
        prompt or None, num_chunks=chunks, num_generate_chunks=chunks, num_steps=num_steps, temperature=temperature,
        block_size=None if block_size < 0 else block_size, seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    tokens = chunks * pipe.model.config.vae.chunk_size
    return result[0]["generated_text"], f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens a second."


def token_rows(pipe: Any, text: str) -> tuple[torch.Tensor, int]:
    """Ids (1, length) of a text on the model's device, padded with EOS to whole chunks, and the count before padding.

    A text longer than the model's training length is cut there.

    Raises:
        ValueError: the text makes no token.
    """
    config, tokenizer = pipe.model.config, pipe.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids[: config.max_chunks * config.vae.chunk_size]
    if not ids:
        raise ValueError("The text makes no token; give some text.")
    filled = ids + [tokenizer.eos_token_id] * (-len(ids) % config.vae.chunk_size)
    return torch.tensor([filled], device=pipe.model.device), len(ids)


def marked(tokenizer: Any, ids: torch.Tensor, true_ids: torch.Tensor) -> tuple[Marked, float]:
    """A decoded text (tokens,) with its wrong tokens marked, and its token accuracy."""
    right = (ids == true_ids).tolist()
    starts = [0, *(n for n in range(1, len(right)) if right[n] != right[n - 1]), len(right)]
    pieces: Marked = [
        (tokenizer.decode(ids[start:end], skip_special_tokens=False), None if right[start] else "wrong")
        for start, end in pairwise(starts)
    ]
    return pieces, sum(right) / len(right)


def as_html(pieces: Marked) -> str:
    """The text with its wrong pieces marked."""
    parts = [f"<mark {MARK}>{html.escape(piece)}</mark>" if wrong else html.escape(piece) for piece, wrong in pieces]
    return f'<div style="white-space: pre-wrap; overflow-wrap: anywhere">{"".join(parts)}</div>'


def steps_table(rows: Iterable[tuple[int, float, Marked, float]]) -> str:
    """What `denoise` yields, as an HTML table."""
    cells = [
        f"<tr><td>{step}</td><td>{t:.2f}</td><td>{accuracy:.0%}</td><td>{as_html(pieces)}</td></tr>"
        for step, t, pieces, accuracy in rows
    ]
    head = "<th>step</th><th>t</th><th>right</th><th style='width: 100%'>decoded</th>"
    return f"<table style='width: 100%'><tr>{head}</tr>{''.join(cells)}</table>"


@torch.no_grad()
def reconstruct(pipe: Any, text: str, noise: float, seed: int) -> tuple[Marked, str]:
    """A text through the latents and back, with Gaussian noise of `noise` standard deviations of the latents on them.

    Returns:
        The decoded text, and a sentence with its token accuracy.
    """
    model, (ids, count) = pipe.model, token_rows(pipe, text)
    latents = model.encode(ids)
    # Noise in units of each dimension's deviation, as in `tokcom_reconstruction.py`; one chunk alone has one deviation.
    deviation = latents.std(dim=(0, 1)) if latents.shape[1] > 1 else latents.std()
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    decoded = model.decode(latents + noise * deviation * drawn)
    pieces, accuracy = marked(pipe.tokenizer, decoded[0, :count], ids[0, :count])
    return pieces, f"{accuracy:.1%} of {count} tokens right, read from {latents.shape[1]} latents."


@torch.no_grad()
def denoise(
    pipe: Any, text: str, start: float, num_steps: int, seed: int
) -> Iterator[tuple[int, float, Marked, float]]:
    """A text's latents mixed with noise at time `start`, then denoised step by step as `denoise_reconstruct` does.

    A model with a context encoder denoises each block after the true tokens that precede it.

    Args:
        start: 0 = pure noise, 1 = the clean latents.
        num_steps: flow steps from 0 to 1; a later `start` takes proportionally fewer.

    Yields:
        Step (0 before the first), time t, what the decoder reads from the latents at t, and its token accuracy.
    """
    model, config, (ids, count) = pipe.model, pipe.model.config, token_rows(pipe, text)
    generator = torch.Generator().manual_seed(seed)
    clean = model.standardize(model.encode(ids))
    noise = (torch.randn(clean.shape, generator=generator) * config.noise_std).to(clean)
    x = interpolate(noise, clean, torch.full((1,), start).to(clean))
    times = step_times(config, denoising_steps(num_steps, start), start) if start < 1 else [1.0]
    path = flow_path(
        Predictions(model, BlockDenoiser(model, ids).predict), x, times, config.sampler, config.noise_std, generator
    )
    for step, (t, x_t) in enumerate(zip(times, chain([x], path))):
        decoded = model.decode(model.unstandardize(x_t))
        yield step, t, *marked(pipe.tokenizer, decoded[0, :count], ids[0, :count])
