"""Generation with a `TokComModel`: prompts, and blocks from left to right (what happens inside one: block_sampling.py).

A prompt whose length is no multiple of the chunk size is filled with EOS **in front**, where a document boundary is natural;
nothing ever stands between prompt and continuation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .block_sampling import BlockSampling
from .context_encoder import FinishedChunks
from .flow_matching import interpolate, time_grid


@dataclass
class TokComGenerateOutput(ModelOutput):
    """sequences: (batch, length) ids, prompt first; latents: (batch, generated chunks, latent), the VAE's."""

    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None


class TokComGeneration(BlockSampling):
    """What `TokComModel` does with a trained flow; mixed into it."""

    @torch.no_grad()
    def denoise_reconstruct(
        self,
        input_ids: torch.LongTensor,
        noise_level: float = 0.5,
        num_steps: int = 50,
        sampler: str = "euler",
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor:
        """Mixes latents with noise at t = `noise_level` and lets the denoiser clean them.

        noise_level: 0 = pure noise, 1 = plain reconstruction; takes max(1, int(num_steps · (1 − noise_level))) steps.

        Raises:
            ValueError: noise_level outside [0, 1] or num_steps < 1.
        """
        if not 0.0 <= noise_level <= 1.0:
            raise ValueError(f"noise_level must be in [0, 1], got {noise_level}.")
        _check_steps(num_steps)
        clean = self.standardize(self.encode(input_ids))
        if noise_level == 1.0:
            return self.decode(self.unstandardize(clean))
        level = torch.full((len(clean),), noise_level, device=clean.device, dtype=clean.dtype)
        x = interpolate(self._noise(clean.shape, generator), clean, level)
        times = time_grid(max(1, int(num_steps * (1 - noise_level))), start=noise_level)
        if sampler == "commit":
            raise ValueError("sampler 'commit' draws tokens from pure noise; denoise_reconstruct takes another one.")
        return self._flow(x, times, sampler, generator=generator, **self._posterior_options())[1]

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        prompt_ids: torch.LongTensor | None = None,
        num_chunks: int = 256,
        num_generate_chunks: int = 64,
        num_steps: int = 50,
        batch_size: int = 1,
        sampler: str | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        prompt_mask: torch.LongTensor | None = None,
        time_grid: str = "uniform",
        block_size: int | None = None,
        guidance_scale: float = 1.0,
        final_clean_pass: bool = False,
        posterior_temperature: float = 1.0,
        token_lag: float = 0.0,
        num_return_sequences: int = 1,
        return_dict_in_generate: bool = False,
    ) -> "torch.LongTensor | TokComGenerateOutput":
        """Generates token ids.

        Args:
            prompt_ids: (batch, length), any length, padded on the right where `prompt_mask` is 0; None: no prompt.
            num_chunks: chunks to generate without a prompt.
            num_generate_chunks: chunks to add to a prompt.
            num_steps: flow steps per block (the denoiser runs once per step, twice with "heun" or guidance).
            batch_size: sequences to generate without a prompt.
            sampler: "euler", "renoise" (stochastic), "heun" (second order), or "commit": the tokens of a chunk are drawn one
                after the other, each from its distribution given those before it, without a path from noise; at most one
                pass per token, with fewer `num_steps` several tokens at once. Only with `token_time_std`. None takes the
                config's.
            temperature: of the decoder's token distribution; 0 is greedy.
            generator: CPU generator; makes the output reproducible on any device.
            prompt_mask: (batch, length), 1 = token, 0 = padding.
            time_grid: "uniform", "quadratic" or "cosine".
            block_size: chunks denoised in parallel: 0 = all of them, 1 = chunk by chunk, from left to right; None takes the
                config's.
            guidance_scale: x1 = without prompt + scale · (with prompt − without); 1 = off.
            final_clean_pass: run the denoiser once more at t = 1.
            posterior_temperature: of the token distributions whose mean is x1, or that "commit" draws from; below 1 the
                flow commits earlier. Only with `clean_latents="posterior_mean"`.
            token_lag: how far the tokens of a chunk wait for each other: 0 not at all, 1 until the first is finished. Only
                with `token_time_std`.
            num_return_sequences: independent continuations of each prompt, side by side in the batch; a prompt is read once
                for all of them. Without prompts, sequences per one of `batch_size`.
            return_dict_in_generate: return a `TokComGenerateOutput` with the latents beside the ids.

        Returns:
            ids (batch · num_return_sequences, longest prompt + generated), prompt first; after a row's first generated EOS,
            and after the end of a shorter row, everything is EOS.

        Raises:
            ValueError: a count below 1, an empty prompt, or prompt ids outside the vocabulary.
        """
        _check_steps(num_steps)
        sampler = self.config.sampler if sampler is None else sampler
        block_size = self.config.block_size if block_size is None else block_size
        wanted = num_chunks if prompt_ids is None else num_generate_chunks
        counts = {
            "The number of chunks to generate": wanted, "The batch_size": batch_size,
            "num_return_sequences": num_return_sequences,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if block_size < 0:
            raise ValueError(f"block_size must not be negative (0 = all chunks in parallel), got {block_size}.")
        chunk = self.config.vae.chunk_size
        if prompt_ids is None:
            prompt = self._noise((batch_size, 0, self.config.vae.latent_size), generator)
            mask, lengths = None, torch.zeros(batch_size, dtype=torch.long)
        else:
            prompt_ids = prompt_ids.to(self.device)
            filled, mask, lengths = self._fill_prompt(prompt_ids, prompt_mask)
            prompt = self.standardize(self.encode(filled))
        new_latents, new_ids = self._blocks(
            prompt, mask, wanted, num_return_sequences, num_steps, sampler, time_grid, block_size, guidance_scale,
            final_clean_pass, temperature, generator, self._check_lag(token_lag, sampler),
            **self._posterior_options(posterior_temperature),
        )  # fmt: skip
        new_latents, new_ids = self.unstandardize(new_latents), self._end_at_eos(new_ids)
        if prompt_ids is None:
            return TokComGenerateOutput(new_ids, new_latents) if return_dict_in_generate else new_ids
        fill = self._fill_id()
        width = int(lengths.max()) + wanted * chunk
        output = new_ids.new_full((len(new_ids), width), fill)
        for row, length in enumerate(lengths.tolist()):
            own = slice(row * num_return_sequences, (row + 1) * num_return_sequences)
            output[own, :length] = prompt_ids[row][_row_mask(prompt_mask, prompt_ids, row)]
            output[own, length : length + new_ids.shape[1]] = new_ids[own]
        return TokComGenerateOutput(output, new_latents) if return_dict_in_generate else output

    def _check_lag(self, lag: float, sampler: str) -> float:
        if sampler == "commit" and self.config.token_time_std == 0:
            raise ValueError("sampler 'commit' needs a model trained with token_time_std > 0 (this one: 0).")
        if lag < 0 or (lag > 0 and (self.config.token_time_std == 0 or sampler in ("heun", "commit"))):
            raise ValueError(
                f"token_lag must be 0, or positive for a model trained with token_time_std > 0 (this one: "
                f"{self.config.token_time_std}) and another sampler than heun and commit; got {lag} with {sampler!r}."
            )
        return lag

    def _posterior_options(self, temperature: float = 1.0) -> dict[str, Any]:
        """Arguments of every forward of one generation; the head of the token distributions is put together once."""
        if temperature <= 0:
            raise ValueError(f"posterior_temperature must be positive, got {temperature}.")
        if temperature != 1.0 and self.config.clean_latents != "posterior_mean":
            raise ValueError(
                "posterior_temperature belongs to models with clean_latents='posterior_mean'; this one predicts latents. "
                "Use temperature for the decoder's distribution."
            )
        head = self.token_head() if self.config.clean_latents == "posterior_mean" else None
        return {"posterior_temperature": temperature, "token_head": head}

    def _blocks(
        self, prompt, mask, wanted, copies, num_steps, sampler, grid, block_size, guidance_scale, final_clean_pass,
        temperature, generator, lag, **options,
    ) -> tuple[torch.Tensor, torch.LongTensor]:  # fmt: skip
        """Denoises block after block, `copies` times for each prompt; each sees its prompt and the finished blocks.

        Returns:
            Latents of the flow (batch · copies, wanted, latent), and their ids (batch · copies, wanted · chunk_size).
        """
        times = time_grid(num_steps, grid)
        cached = self.config.denoiser.attention == "block_causal"
        past, latents, ids = None, [], []
        options["known"] = {}
        if cached and prompt.shape[1]:
            past = self._extend_cache(None, prompt, mask, 0)
            past = past if copies == 1 else past.repeated(copies)
        finished = prompt.repeat_interleave(copies, 0)
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
        for start in range(0, wanted, block_size or wanted):
            size = min(block_size or wanted, wanted - start)
            x = self._noise((len(finished), size, finished.shape[2]), generator)
            prefix = finished if finished.shape[1] else None
            x, new_ids = self._flow(
                x,
                times,
                sampler,
                prefix,
                past,
                mask,
                guidance_scale,
                final_clean_pass,
                generator,
                lag,
                temperature,
                **options,
            )
            latents.append(x)
            ids.append(new_ids)
            if start + size == wanted:
                break
            if self._all_ended(ids):
                # What would follow every row's EOS is not looked at; EOS and zeros keep the shape.
                rest = wanted - start - size
                latents.append(x.new_zeros(len(x), rest, x.shape[2]))
                ids.append(ids[0].new_full((len(x), rest * self.config.vae.chunk_size), self._fill_id()))
                break
            # What follows sees the latents of the block's text, exact as in training, not what the flow left of them.
            x = self.standardize(self.encode(ids[-1]))
            if cached:
                past = self._extend_cache(past, x, mask, finished.shape[1])
            finished = torch.cat([finished, x], dim=1)
        return torch.cat(latents, dim=1), torch.cat(ids, dim=1)

    def _extend_cache(self, past: FinishedChunks | None, block: torch.Tensor, mask, start: int) -> FinishedChunks:
        """A finished block (clean, t = 1) appended to those before it."""
        padding = (
            None if mask is None else nn.functional.pad(mask, (0, start + block.shape[1] - mask.shape[1]), value=1)
        )
        return self.finish(block, past, start, padding)

    # ------------------------------------------------------------------ helpers
    def _noise(self, shape, generator: torch.Generator | None) -> torch.Tensor:
        """x0 ~ N(0, noise_std²), drawn on the CPU so that a seed means the same on every device."""
        return (torch.randn(shape, generator=generator) * self.config.noise_std).to(self.device, self.dtype)

    def _fill_id(self) -> int:
        eos = self.config.eos_token_id
        return self.config.vae.omni_token_id if eos is None else eos

    def _fill_prompt(self, prompt_ids: torch.LongTensor, prompt_mask: torch.LongTensor | None):
        """Right-padded prompts → (ids filled in front to whole chunks, chunk mask or None, lengths (batch,))."""
        if prompt_ids.dim() != 2 or prompt_ids.shape[1] == 0:
            raise ValueError(f"prompt_ids must be (batch, length) with length ≥ 1, got {tuple(prompt_ids.shape)}.")
        if prompt_ids.min() < 0 or prompt_ids.max() >= self.config.vae.vocab_size:
            raise ValueError(
                f"prompt_ids must be in 0 … {self.config.vae.vocab_size - 1}, got {int(prompt_ids.min())} … "
                f"{int(prompt_ids.max())}; was the prompt written by this model's tokenizer?"
            )
        chunk = self.config.vae.chunk_size
        rows = [prompt_ids[row][_row_mask(prompt_mask, prompt_ids, row)] for row in range(len(prompt_ids))]
        lengths = torch.tensor([len(row) for row in rows])
        if int(lengths.min()) == 0:
            raise ValueError(
                "Every prompt needs at least one token; generate without prompt_ids to start from nothing."
            )
        width = -(-int(lengths.max()) // chunk) * chunk
        filled = prompt_ids.new_full((len(rows), width), self._fill_id())
        mask = torch.zeros(len(rows), width // chunk, dtype=torch.long, device=prompt_ids.device)
        for index, row in enumerate(rows):
            filled[index, width - len(row) :] = row
            mask[index, (width - len(row)) // chunk :] = 1
        return filled, None if bool(mask.all()) else mask, lengths

    def _end_at_eos(self, ids: torch.LongTensor) -> torch.LongTensor:
        if self.config.eos_token_id is None:
            return ids
        ended = (ids == self.config.eos_token_id).cummax(dim=1).values
        return ids.masked_fill(ended, self.config.eos_token_id)

    def _all_ended(self, ids: list[torch.Tensor]) -> bool:
        if self.config.eos_token_id is None:
            return False
        return bool((torch.cat(ids, dim=1) == self.config.eos_token_id).any(dim=1).all())


def _row_mask(prompt_mask: torch.LongTensor | None, prompt_ids: torch.LongTensor, row: int) -> torch.Tensor:
    if prompt_mask is None:
        return torch.ones_like(prompt_ids[row], dtype=torch.bool)
    return prompt_mask[row].to(prompt_ids.device).bool()


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
