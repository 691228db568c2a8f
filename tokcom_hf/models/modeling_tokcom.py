"""TokComModel: text → latents (VAE), noise → latents (denoiser), latents → text (VAE).

All public methods speak token ids. A prompt whose length is no multiple of the chunk size is filled with EOS **in front**,
where a document boundary is natural; nothing ever stands between prompt and continuation.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .chunked_cross_entropy import LOGITS_AT_ONCE
from .configuration_tokcom import TokComConfig
from .flow_matching import interpolate, sample, time_grid
from .layers import KeyValue
from .modeling_tokcom_denoiser import DenoisedModel, DenoisedModelOutput
from .modeling_tokcom_vae import TokComVAE
from .pipeline_tokcom import custom_pipelines


@dataclass
class TokComGenerateOutput(ModelOutput):
    """sequences: (batch, length) ids, prompt first; latents: (batch, generated chunks, latent), the VAE's."""

    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None


class TokComModel(PreTrainedModel):
    """VAE, denoiser and latent statistics in one folder."""

    config_class = TokComConfig
    base_model_prefix = "tokcom"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block", "DenoiserBlock"]
    _tied_weights_keys = {"vae.lm_head.weight": "vae.embed_tokens.weight"}

    def __init__(self, config: TokComConfig):
        super().__init__(config)
        self.vae = TokComVAE(config.vae)
        self.denoiser = DenoisedModel(config.denoiser)
        self.register_buffer("latent_mean", torch.zeros(config.vae.latent_size))
        self.register_buffer("latent_std", torch.ones(config.vae.latent_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokComModel):
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the folder also names its pipeline, whose code travels as one of this file's imports."""
        self.config.custom_pipelines = custom_pipelines()
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            # Only the folder names it: a config in memory that did would make pipeline() look for remote code.
            del self.config.custom_pipelines

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.vae.get_output_embeddings()

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, **kwargs) -> DenoisedModelOutput:
        """One forward of the denoiser in the flow's (standardised) space; arguments as `DenoisedModel`.

        With `clean_latents="posterior_mean"` the output's `token_hidden` (batch, chunks, chunk_size, hidden) times the VAE's
        head gives logits of each token, and `clean_latents` is the mean latent of their softmax at `posterior_temperature`.
        """
        temperature = kwargs.pop("posterior_temperature", 1.0)
        output = self.denoiser(latents, timesteps, **kwargs)
        if self.config.clean_latents == "posterior_mean":
            hidden = output.clean_latents.unflatten(-1, (self.config.vae.chunk_size, -1))
            output.token_hidden = hidden
            # Trained by cross-entropy alone the mean needs no graph.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.mse_weight > 0):
                output.clean_latents = self.standardize(self._mean_latents(hidden, temperature))
        return output

    def _mean_latents(self, token_hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """(batch, chunks, chunk_size, hidden) → (batch, chunks, latent), a bounded number of logits at a time."""
        flat = token_hidden.flatten(0, 1)
        rows = max(1, LOGITS_AT_ONCE // (self.config.vae.chunk_size * self.config.vae.vocab_size))
        omni = torch.tensor([self.config.vae.omni_token_id], device=flat.device)
        means = []
        for part in flat.split(rows):
            logits = self.vae.lm_head(part).float() / temperature
            logits = logits.index_fill(-1, omni, torch.finfo(logits.dtype).min)
            means.append(self.vae.expected_latents(logits.softmax(-1).to(part.dtype)))
        return torch.cat(means).view(*token_hidden.shape[:2], -1)

    # ------------------------------------------------------------------ latents
    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents → the space of the flow."""
        if not self.config.standardize_latents:
            return latents
        return (latents - self.latent_mean) / self.latent_std

    def unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        """The space of the flow → VAE latents."""
        if not self.config.standardize_latents:
            return latents
        return latents * self.latent_std + self.latent_mean

    def encode(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """ids (batch, length) → VAE latents (batch, length / chunk, latent)."""
        return self.vae.encode(input_ids)

    def decode(
        self, latents: torch.Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.LongTensor:
        """VAE latents (batch, chunks, latent) → ids (batch, chunks · chunk_size)."""
        return self.vae.decode(latents, temperature, generator)

    @torch.no_grad()
    def reconstruct(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """ids → latents → ids, shapes (batch, length)."""
        return self.decode(self.encode(input_ids))

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
        x = self._flow(x, times, sampler, generator=generator)
        return self.decode(self.unstandardize(x))

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        prompt_ids: torch.LongTensor | None = None,
        num_chunks: int = 256,
        num_generate_chunks: int = 64,
        num_steps: int = 50,
        batch_size: int = 1,
        sampler: str = "euler",
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        prompt_mask: torch.LongTensor | None = None,
        time_grid: str = "uniform",
        block_size: int | None = None,
        guidance_scale: float = 1.0,
        final_clean_pass: bool = False,
        posterior_temperature: float = 1.0,
        return_dict_in_generate: bool = False,
    ) -> "torch.LongTensor | TokComGenerateOutput":
        """Generates token ids.

        Args:
            prompt_ids: (batch, length), any length, padded on the right where `prompt_mask` is 0; None: no prompt.
            num_chunks: chunks to generate without a prompt.
            num_generate_chunks: chunks to add to a prompt.
            num_steps: flow steps per block (the denoiser runs once per step, twice with "heun" or guidance).
            batch_size: sequences to generate without a prompt.
            sampler: "euler", "renoise" (stochastic) or "heun" (second order).
            temperature: of the decoder's token distribution; 0 is greedy.
            generator: CPU generator; makes the output reproducible on any device.
            prompt_mask: (batch, length), 1 = token, 0 = padding.
            time_grid: "uniform", "quadratic" or "cosine".
            block_size: chunks denoised in parallel; None = all of them, 1 = chunk by chunk, from left to right.
            guidance_scale: x1 = without prompt + scale · (with prompt − without); 1 = off.
            final_clean_pass: run the denoiser once more at t = 1.
            posterior_temperature: of the token distributions whose mean is x1; below 1 the flow commits earlier. Only with
                `clean_latents="posterior_mean"`.
            return_dict_in_generate: return a `TokComGenerateOutput` with the latents beside the ids.

        Returns:
            ids (batch, longest prompt + generated), prompt first; after a row's first generated EOS, and after the end of
            a shorter row, everything is EOS.

        Raises:
            ValueError: a count below 1, an empty prompt, or prompt ids outside the vocabulary.
        """
        _check_steps(num_steps)
        wanted = num_chunks if prompt_ids is None else num_generate_chunks
        for name, value in (("chunks to generate", wanted), ("batch_size", batch_size), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"The number of {name} must be at least 1, got {value}.")
        chunk = self.config.vae.chunk_size
        if prompt_ids is None:
            prompt = self._noise((batch_size, 0, self.config.vae.latent_size), generator)
            mask, lengths = None, torch.zeros(batch_size, dtype=torch.long)
        else:
            prompt_ids = prompt_ids.to(self.device)
            filled, mask, lengths = self._fill_prompt(prompt_ids, prompt_mask)
            prompt = self.standardize(self.encode(filled))
        finished = self._blocks(
            prompt, mask, wanted, num_steps, sampler, time_grid, block_size, guidance_scale, final_clean_pass,
            generator, **self._posterior_options(posterior_temperature),
        )  # fmt: skip
        new_latents = self.unstandardize(finished[:, prompt.shape[1] :])
        new_ids = self.decode(new_latents, temperature, generator)
        new_ids = self._end_at_eos(new_ids)
        if prompt_ids is None:
            return TokComGenerateOutput(new_ids, new_latents) if return_dict_in_generate else new_ids
        fill = self._fill_id()
        width = int(lengths.max()) + wanted * chunk
        output = new_ids.new_full((len(new_ids), width), fill)
        for row, length in enumerate(lengths.tolist()):
            output[row, :length] = prompt_ids[row][_row_mask(prompt_mask, prompt_ids, row)]
            output[row, length : length + new_ids.shape[1]] = new_ids[row]
        return TokComGenerateOutput(output, new_latents) if return_dict_in_generate else output

    def _posterior_options(self, temperature: float) -> dict[str, float]:
        if temperature <= 0:
            raise ValueError(f"posterior_temperature must be positive, got {temperature}.")
        if temperature != 1.0 and self.config.clean_latents != "posterior_mean":
            raise ValueError(
                "posterior_temperature belongs to models with clean_latents='posterior_mean'; this one predicts latents. "
                "Use temperature for the decoder's distribution."
            )
        return {"posterior_temperature": temperature}

    def _blocks(
        self, prompt, mask, wanted, num_steps, sampler, grid, block_size, guidance_scale, final_clean_pass, generator,
        **options,
    ) -> torch.Tensor:  # fmt: skip
        """Denoises block after block; each sees the prompt and the finished blocks."""
        times = time_grid(num_steps, grid)
        cached = self.config.denoiser.attention == "block_causal"
        finished, past = prompt, None
        if cached and prompt.shape[1]:
            past = self._extend_cache(None, prompt, mask, 0)
        while finished.shape[1] < prompt.shape[1] + wanted:
            size = min(block_size or wanted, prompt.shape[1] + wanted - finished.shape[1])
            x = self._noise((len(prompt), size, prompt.shape[2]), generator)
            prefix = finished if finished.shape[1] else None
            x = self._flow(
                x, times, sampler, prefix, past, mask, guidance_scale, final_clean_pass, generator, **options
            )
            finished = torch.cat([finished, x], dim=1)
            if finished.shape[1] < prompt.shape[1] + wanted:
                if self._all_ended(finished[:, prompt.shape[1] :]):
                    # What would follow every row's EOS is not looked at; zeros keep the shape.
                    rest = prompt.shape[1] + wanted - finished.shape[1]
                    return nn.functional.pad(finished, (0, 0, 0, rest))
                if cached:
                    past = self._extend_cache(past, x, mask, finished.shape[1] - size)
        return finished

    def _flow(
        self, x, times, sampler, prefix=None, past=None, mask=None, guidance_scale=1.0, final_clean_pass=False,
        generator=None, **options,
    ):  # fmt: skip
        """Runs the sampler on x (batch, chunks, latent), given clean latents to its left or their cached keys and values.

        options: further arguments of `forward`.
        """
        memory: dict[str, torch.Tensor | None] = {"given": None, "free": None}

        def predict(x_t, t, key, prefix, past):
            start = 0 if prefix is None else prefix.shape[1]
            padding = (
                None
                if mask is None or prefix is None
                else nn.functional.pad(mask, (0, start - mask.shape[1] + x_t.shape[1]), value=1)
            )
            condition = memory[key] if self.config.denoiser.self_conditioning else None
            if past is not None:
                time = torch.full((len(x_t),), t, device=x_t.device)
                clean = self(
                    x_t, time, self_condition=condition, attention_mask=padding, past_key_values=past,
                    position_offset=start, **options,
                ).clean_latents  # fmt: skip
            elif prefix is None:
                time = torch.full((len(x_t),), t, device=x_t.device)
                clean = self(x_t, time, self_condition=condition, **options).clean_latents
            else:
                time = torch.full((len(x_t),), t, device=x_t.device)
                if self.config.clean_prefix:
                    time = torch.full((len(x_t), start + x_t.shape[1]), t, device=x_t.device)
                    time[:, :start] = 1.0
                if condition is not None:
                    condition = torch.cat([prefix, condition], dim=1)
                elif self.config.denoiser.self_conditioning:
                    condition = torch.cat([prefix, torch.zeros_like(x_t)], dim=1)
                whole = torch.cat([prefix, x_t], dim=1)
                clean = self(whole, time, self_condition=condition, attention_mask=padding, **options)
                clean = clean.clean_latents[:, start:]
            memory[key] = clean
            return clean

        def denoise(x_t, t):
            given = predict(x_t, t, "given", prefix, past)
            if guidance_scale == 1.0 or prefix is None:
                return given
            free = predict(x_t, t, "free", None, None)
            return free + guidance_scale * (given - free)

        x = sample(denoise, x, times, sampler, self.config.noise_std, generator)
        return denoise(x, 1.0) if final_clean_pass else x

    def _extend_cache(self, past: list[KeyValue] | None, block: torch.Tensor, mask, start: int) -> list[KeyValue]:
        """Keys and values of a finished block (clean, t = 1) appended to those before it."""
        padding = (
            None if mask is None else nn.functional.pad(mask, (0, start + block.shape[1] - mask.shape[1]), value=1)
        )
        ones = torch.ones(len(block), device=block.device)
        new = self.denoiser(
            block, ones, None, padding, past_key_values=past, position_offset=start, return_key_values=True
        ).key_values
        if past is None:
            return new
        return [(torch.cat([k, nk], dim=2), torch.cat([v, nv], dim=2)) for (k, v), (nk, nv) in zip(past, new)]

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

    def _all_ended(self, latents: torch.Tensor) -> bool:
        if self.config.eos_token_id is None:
            return False
        ids = self.decode(self.unstandardize(latents))
        return bool((ids == self.config.eos_token_id).any(dim=1).all())


def _row_mask(prompt_mask: torch.LongTensor | None, prompt_ids: torch.LongTensor, row: int) -> torch.Tensor:
    if prompt_mask is None:
        return torch.ones_like(prompt_ids[row], dtype=torch.bool)
    return prompt_mask[row].to(prompt_ids.device).bool()


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
