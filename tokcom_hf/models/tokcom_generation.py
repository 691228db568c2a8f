"""Generation with a `TokComModel`: prompts, and blocks from left to right (what happens inside one: block_sampling.py).

A prompt whose length is no multiple of the chunk size is filled with EOS **in front**, where a document boundary is natural;
nothing ever stands between prompt and continuation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .block_sampling import BlockSampling
from .context_encoder import FinishedChunks
from .flow_matching import SAMPLERS, interpolate, time_grid
from .generation_settings import GenerationSettings
from .token_stream import TokenStream


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
        if sampler == "commit":
            raise ValueError("sampler 'commit' draws tokens from pure noise; denoise_reconstruct takes another one.")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
        clean = self.standardize(self.encode(input_ids))
        if noise_level == 1.0:
            return self.decode(self.unstandardize(clean))
        level = torch.full((len(clean),), noise_level, device=clean.device, dtype=clean.dtype)
        x = interpolate(self._noise(clean.shape, generator), clean, level)
        times = time_grid(max(1, int(num_steps * (1 - noise_level))), start=noise_level)
        return self._flow(x, times, sampler, generator=generator, **self._posterior_options())[1]

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        prompt_ids: torch.LongTensor | None = None,
        num_chunks: int | None = None,
        num_generate_chunks: int | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        prompt_mask: torch.LongTensor | None = None,
        time_grid: str | None = None,
        block_size: int | None = None,
        guidance_scale: float | None = None,
        final_clean_pass: bool | None = None,
        posterior_temperature: float | None = None,
        token_lag: float | None = None,
        num_return_sequences: int | None = None,
        return_dict_in_generate: bool | None = None,
        *,
        inputs: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> "torch.LongTensor | TokComGenerateOutput":
        """Generates token ids. An argument that is None is taken from `generation_config`, or has the default named here.

        Args:
            prompt_ids, input_ids, inputs: three names of the same, give one: (batch, length) ids of any length; None: no
                prompt.
            prompt_mask, attention_mask: give one: (batch, length), 1 = token, 0 = padding on either side, which the model
                does not see. They differ in what is returned. With `attention_mask` it is as in transformers: the prompt
                as given, padding included, so that `output[:, input_ids.shape[1]:]` is what was generated. With
                `prompt_mask` padding is left out, and what was generated follows a row's last token.
            num_chunks: chunks to generate without a prompt, 256.
            num_generate_chunks: chunks to add to a prompt, 64.
            max_new_tokens: tokens to generate per sequence instead, exactly so many: the last chunk is cut.
            max_length: the same with the tokens of the prompt counted in, padding too; give one of the four.
            num_steps: flow steps per block, 50 (the denoiser runs once per step, twice with "heun" or guidance).
            batch_size: sequences to generate without a prompt, 1.
            do_sample: None: noise x0 is drawn and the decoder's likeliest tokens are taken, unless `temperature` says
                otherwise. True: noise is drawn, and tokens at `temperature` (1). False: nothing is random: x0 = 0, the
                mean of the noise, and the likeliest tokens.
            temperature: of the decoder's token distribution; 0, the default without `do_sample`, is greedy.
            sampler: "euler", "renoise" (stochastic), "heun" (second order), or "commit": the tokens of a chunk are drawn one
                after the other, each from its distribution given those before it, without a path from noise; at most one
                pass per token, with fewer `num_steps` several tokens at once. Only with `token_time_std`. None takes the
                config's.
            generator: CPU generator of all that is random; makes the output reproducible on any device.
            time_grid: "uniform" (default), "quadratic" or "cosine".
            block_size: chunks denoised in parallel: 0 = all of them, 1 = chunk by chunk, from left to right; None takes the
                config's.
            guidance_scale: x1 = without prompt + scale · (with prompt − without); 1 (default) = off.
            final_clean_pass: run the denoiser once more at t = 1.
            posterior_temperature: of the token distributions whose mean is x1, or that "commit" draws from, 1; below 1 the
                flow commits earlier. Only with `clean_latents="posterior_mean"`.
            token_lag: how far the tokens of a chunk wait for each other: 0 (default) not at all, 1 until the first is
                finished. Only with `token_time_std`.
            num_return_sequences: independent continuations of each prompt, side by side in the batch, 1; a prompt is read
                once for all of them. Without prompts, sequences per one of `batch_size`.
            return_dict_in_generate: return a `TokComGenerateOutput` with the latents beside the ids.
            eos_token_id: an id or several that end a sequence; None takes the config's.
            pad_token_id: what follows the end of a sequence; None: the (first) end token again.
            streamer: of transformers: gets the prompt, then the tokens of each finished block one by one.
            generation_config: None takes `model.generation_config`, which is saved with the model. It may hold any of these
                arguments but tensors, generator and streamer.

        Returns:
            ids (batch · num_return_sequences, longest prompt + generated), prompt first; after a row's first generated end
            token, and after the end of a shorter row, everything is `pad_token_id`.

        Raises:
            TypeError: an unknown keyword, or ids that are no integers.
            ValueError: arguments that contradict each other or would not act, values out of range, an empty prompt, or ids
                outside the vocabulary.
        """
        prompt = _one_of(prompt_ids=prompt_ids, input_ids=input_ids, inputs=inputs)
        given_mask = _one_of(prompt_mask=prompt_mask, attention_mask=attention_mask)
        if prompt is None and given_mask is not None:
            raise ValueError("A mask says which tokens of a prompt are padding; there is no prompt.")
        device, chunk = self._execution_device(), self.config.vae.chunk_size
        width, mask, lengths = 0, None, torch.zeros(0, dtype=torch.long)
        if prompt is not None:
            prompt = prompt.to(device) if torch.is_tensor(prompt) else prompt
            filled, mask, lengths = self._fill_prompt(prompt, given_mask)
            width = int(lengths.max()) if prompt_mask is not None else prompt.shape[1]
        settings = GenerationSettings.of(
            self, prompt, width, generation_config,
            {
                "num_chunks": num_chunks, "num_generate_chunks": num_generate_chunks, "max_new_tokens": max_new_tokens,
                "max_length": max_length, "num_steps": num_steps, "batch_size": batch_size, "do_sample": do_sample,
                "temperature": temperature, "sampler": sampler, "time_grid": time_grid, "block_size": block_size,
                "guidance_scale": guidance_scale, "final_clean_pass": final_clean_pass,
                "posterior_temperature": posterior_temperature, "token_lag": token_lag,
                "num_return_sequences": num_return_sequences, "return_dict_in_generate": return_dict_in_generate,
                "eos_token_id": eos_token_id, "pad_token_id": pad_token_id,
            },
        )  # fmt: skip
        self._check_lag(settings.token_lag, settings.sampler)
        options = self._posterior_options(settings.posterior_temperature)
        if settings.sampler == "commit" and not settings.random:
            options["posterior_temperature"] = 0.0
        copies, stream = settings.num_return_sequences, TokenStream(streamer, settings)
        if prompt is None:
            clean = self._noise((settings.batch_size, 0, self.config.vae.latent_size), generator)
            start = torch.empty(settings.batch_size * copies, 0, dtype=torch.long, device=device)
        else:
            clean, start = self.standardize(self.encode(filled)), prompt.repeat_interleave(copies, 0)
        stream.start(start)
        wanted = -(-settings.new_tokens // chunk)
        latents, ids = self._blocks(clean, mask, wanted, settings, generator, stream, **options)
        stream.end()
        latents, ids = self.unstandardize(latents), _ended(ids[:, : settings.new_tokens], settings)
        output = torch.cat([start, ids], dim=1)
        if prompt_mask is not None:
            output = ids.new_full((len(ids), width + settings.new_tokens), settings.fill_id)
            for row, length in enumerate(lengths.tolist()):
                own = slice(row * copies, (row + 1) * copies)
                output[own, :length] = prompt[row][_row_mask(prompt_mask, prompt, row)]
                output[own, length : length + ids.shape[1]] = ids[own]
        return TokComGenerateOutput(output, latents) if settings.return_dict_in_generate else output

    def _check_lag(self, lag: float, sampler: str) -> None:
        if sampler == "commit" and self.config.token_time_std == 0:
            raise ValueError("sampler 'commit' needs a model trained with token_time_std > 0 (this one: 0).")
        if lag < 0 or (lag > 0 and (self.config.token_time_std == 0 or sampler in ("heun", "commit"))):
            raise ValueError(
                f"token_lag must be 0, or positive for a model trained with token_time_std > 0 (this one: "
                f"{self.config.token_time_std}) and another sampler than heun and commit; got {lag} with {sampler!r}."
            )

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
        self,
        prompt: torch.Tensor,
        mask: torch.Tensor | None,
        wanted: int,
        settings: GenerationSettings,
        generator: torch.Generator | None,
        stream: TokenStream,
        **options,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """Denoises block after block, several times for each prompt; each sees its prompt and the finished blocks.

        Returns:
            Latents of the flow (batch · copies, wanted, latent), and their ids (batch · copies, wanted · chunk_size).
        """
        copies, block_size = settings.num_return_sequences, settings.block_size or wanted
        times = time_grid(settings.num_steps, settings.time_grid)
        cached = self.config.denoiser.attention == "block_causal"
        past, latents, ids = None, [], []
        options["known"] = {}
        if cached and prompt.shape[1]:
            past = self._extend_cache(None, prompt, mask, 0)
            past = past if copies == 1 else past.repeated(copies)
        finished = prompt.repeat_interleave(copies, 0)
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
        for start in range(0, wanted, block_size):
            size = min(block_size, wanted - start)
            shape = (len(finished), size, finished.shape[2])
            x = self._noise(shape, generator) if settings.random else finished.new_zeros(shape)
            x, new_ids = self._flow(
                x,
                times,
                settings.sampler,
                finished if finished.shape[1] else None,
                past,
                mask,
                settings.guidance_scale,
                settings.final_clean_pass,
                generator,
                settings.token_lag,
                settings.temperature,
                **options,
            )
            latents.append(x)
            ids.append(new_ids)
            stream.put(new_ids)
            if start + size == wanted:
                break
            if _all_ended(ids, settings):
                # What would follow every row's end is not looked at; fill ids and zeros keep the shape.
                rest = wanted - start - size
                latents.append(x.new_zeros(len(x), rest, x.shape[2]))
                ids.append(ids[0].new_full((len(x), rest * self.config.vae.chunk_size), settings.fill_id))
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
        noise = torch.randn(shape, generator=generator) * self.config.noise_std
        return noise.to(self._execution_device(), self.dtype)

    def _execution_device(self) -> torch.device:
        """Where the model computes: under offloading its weights are elsewhere, and accelerate's hooks know."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
        place = next((place for place in places if place is not None), None)
        return self.device if place is None else torch.device(place)

    def _fill_id(self) -> int:
        eos = self.config.eos_token_id
        return self.config.vae.omni_token_id if eos is None else eos

    def _fill_prompt(self, prompt_ids: torch.LongTensor, prompt_mask: torch.LongTensor | None):
        """Padded prompts → (ids filled in front to whole chunks, chunk mask or None, lengths (batch,))."""
        if not torch.is_tensor(prompt_ids) or prompt_ids.is_floating_point():
            kind = prompt_ids.dtype if torch.is_tensor(prompt_ids) else type(prompt_ids).__name__
            raise TypeError(f"prompt_ids must be a tensor of token ids (torch.long), got {kind}.")
        if prompt_ids.dim() != 2 or 0 in prompt_ids.shape:
            raise ValueError(f"prompt_ids must be (batch, length), both at least 1, got {tuple(prompt_ids.shape)}.")
        if prompt_ids.min() < 0 or prompt_ids.max() >= self.config.vae.vocab_size:
            raise ValueError(
                f"prompt_ids must be in 0 … {self.config.vae.vocab_size - 1}, got {int(prompt_ids.min())} … "
                f"{int(prompt_ids.max())}; was the prompt written by this model's tokenizer?"
            )
        if prompt_mask is not None and prompt_mask.shape != prompt_ids.shape:
            raise ValueError(
                f"The mask must have the prompt's shape {tuple(prompt_ids.shape)}, got {tuple(prompt_mask.shape)}."
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


def _ended(ids: torch.LongTensor, settings: GenerationSettings) -> torch.LongTensor:
    """Ids (rows, tokens) with `fill_id` behind the first end token of each row."""
    if not settings.eos_token_ids:
        return ids
    end = torch.isin(ids, torch.tensor(settings.eos_token_ids, device=ids.device))
    behind = nn.functional.pad(end.cummax(dim=1).values[:, :-1], (1, 0))
    return ids.masked_fill(behind, settings.fill_id)


def _all_ended(ids: list[torch.LongTensor], settings: GenerationSettings) -> bool:
    so_far = torch.cat(ids, dim=1)
    end = torch.tensor(settings.eos_token_ids, device=so_far.device, dtype=so_far.dtype)
    return bool(torch.isin(so_far, end).any(dim=1).all())


def _one_of(**named: torch.Tensor | None) -> torch.Tensor | None:
    """The one of several names of the same argument that was given, or None."""
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are names of the same argument; give one of them.")
    return next(iter(given.values()), None)


def _row_mask(prompt_mask: torch.LongTensor | None, prompt_ids: torch.LongTensor, row: int) -> torch.Tensor:
    if prompt_mask is None:
        return torch.ones_like(prompt_ids[row], dtype=torch.bool)
    return prompt_mask[row].to(prompt_ids.device).bool()


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
