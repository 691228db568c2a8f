"""TokComModel: text → latents (VAE), noise → latents (denoiser), latents → text (VAE).

    ids of a chunk ─ encoder ─► z, standardised: x1              x0 ~ N(0, noise_std²)
    all tokens before a block ─ context ─► c                     x_t = (1 − t) · x0 + t · x1
    denoiser(x_t, t, c) ─► x̂1                                    loss |x̂1 − x1|² / (1 − t)², cross-entropy of decoder(x̂1)
    c ─ heads ─► tokens of the block's first chunk, cross-entropy: trains the context

`forward` is this training objective; generation is in tokcom_generation.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_tokcom import TokComConfig
from .modeling_tokcom_denoiser import DenoisedModel
from .modeling_tokcom_vae import TokComVAE
from .shared_layer_outputs import as_asked
from .shared_strict_loading import StrictLoading
from .tokcom_context_encoder import ContextEncoder
from .tokcom_flow_matching import denoising_steps, interpolate, sampling_times, training_times
from .tokcom_generation import (
    Prompt,
    TokComGenerateOutput,
    denoise_blocks,
    draw_noise,
    ended,
    execution_device,
    generate_blocks,
)
from .tokcom_generation_settings import GenerationSettings, check_sampler
from .tokcom_objective import add_flow_losses, add_head_losses, block_shape, check_shapes, cut_blocks
from .tokcom_token_stream import TokenStream

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_tokcom import TokComGenerationPipeline  # noqa: F401


@dataclass
class TokComOutput(ModelOutput):
    """Output of `TokComModel.forward`.

    loss: scalar, the weighted sum of the others.
    flow_loss: squared error of the velocity per latent dimension. mse_loss: that of the clean latents.
    cross_entropy_loss: nats per token of the decoder on the predicted latents; None with cross_entropy_weight=0.
    next_token_loss, later_token_loss: nats per token of the context's heads: of the next token, and the mean of the later
        ones of a chunk; None without a context.
    clean_latents: predictions in the flow's space, (rows, blocks, chunks, latent).
    """

    loss: torch.FloatTensor | None = None
    flow_loss: torch.FloatTensor | None = None
    mse_loss: torch.FloatTensor | None = None
    cross_entropy_loss: torch.FloatTensor | None = None
    next_token_loss: torch.FloatTensor | None = None
    later_token_loss: torch.FloatTensor | None = None
    clean_latents: torch.FloatTensor | None = None


class TokComModel(StrictLoading, GenerationMixin):
    """VAE, denoiser, context and latent statistics in one folder."""

    config_class = TokComConfig
    base_model_prefix = "tokcom"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block", "DenoiserBlock", "LlamaDecoderLayer"]
    _tied_weights_keys = {"vae.lm_head.weight": "vae.embed_tokens.weight"}
    # Folders written before the flow knew statistics lack them; zero and one change nothing.
    _keys_to_ignore_on_load_missing = [r"^latent_mean$", r"^latent_std$"]

    def __init__(self, config: TokComConfig):
        super().__init__(config)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        # A change of either config can be told from it.
        self.eos_of_config = config.eos_token_id
        self.vae = TokComVAE(config.vae)
        self.denoiser = DenoisedModel(config.denoiser)
        self.context = None
        if config.context is not None:
            self.context = ContextEncoder(config.context, config.vae.chunk_size, config.vae.omni_token_id)
        self.register_buffer("latent_mean", torch.zeros(config.vae.latent_size))
        self.register_buffer("latent_std", torch.ones(config.vae.latent_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokComModel):
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    # ------------------------------------------------------------------ training
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        offset: int = 0,
        block_size: int = 0,
        self_conditioned: bool = False,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> TokComOutput | tuple:
        """The objective of stage two on rows of tokens; the VAE stays as it is.

        A row is cut into `blocks` blocks of `chunks` chunks from token `offset` on, as `block_shape` of tokcom_objective.py
        says: the first of `noise_draws` noisy copies of all of them, then the next.

        Args:
            input_ids: (rows, length).
            attention_mask: (rows, length), 1 = token, 0 = padding on the right.
            latents: what `encode` gives for the rows, (rows, length / chunk_size, latent): saves encoding; with offset 0.
            noise: x0, (rows, blocks, chunks, latent); drawn here where None.
            timesteps: t in [0, 1], (rows, blocks) or (rows, blocks, chunks); chunks at t = 1 count in no loss. Drawn where
                None.
            context_mask: (rows, blocks), False hides a block's context from the denoiser; None hides none.
            offset: tokens before the first block. Only with a context.
            block_size: chunks per block, 0 for the whole row. Only with a context.
            self_conditioned: the denoiser predicts twice and sees its first prediction. Only with `self_conditioning`.
            return_loss: False leaves the losses out. (`Trainer` evaluates a model without labels by its loss only where this
                argument is there.)
            return_dict: False returns a tuple; None takes the config's.

        Raises:
            ValueError: arguments whose shapes do not fit, or that this configuration cannot use.
        """
        config, rows = self.config, len(input_ids)
        # 1. Cut the rows into blocks: clean latents x1, labels, and which chunks hold a token.
        shape = (rows, *block_shape(config, input_ids.shape[1], offset, block_size))
        check_shapes(
            config, input_ids, shape, attention_mask=attention_mask, latents=latents, noise=noise, timesteps=timesteps,
            context_mask=context_mask,
        )  # fmt: skip
        blocks = cut_blocks(self, input_ids, attention_mask, latents, offset, shape)
        # 2. Noisy latents x_t.
        if noise is None:
            noise = torch.randn(shape).to(blocks.x1) * config.noise_std
        if timesteps is None:
            timesteps = training_times(shape[:2], config.time_distribution, config.time_mean, config.time_std)
        timesteps = timesteps.to(blocks.x1.device, torch.float32)
        t = (timesteps if timesteps.dim() == 3 else timesteps.unsqueeze(-1)).expand(shape[:3])
        x_t = interpolate(noise.to(blocks.x1), blocks.x1, t.to(blocks.x1.dtype))
        # 3. What is known before each block.
        states, condition = None, None
        if self.context is not None:
            states = self.context(input_ids)
            condition = states[:, blocks.starts].repeat(1, config.noise_draws, 1)
            if context_mask is not None:
                condition = condition * context_mask.to(condition).unsqueeze(-1)
            condition = condition.flatten(0, 1)
        # 4. Predictions of x1; the blocks of all rows are one batch.
        x_t, timesteps = x_t.flatten(0, 1), timesteps.flatten(0, 1)
        arguments: dict[str, Any] = {"context": condition, "attention_mask": blocks.chunk_mask(), "return_dict": True}
        if self_conditioned:
            with torch.no_grad():
                arguments["self_condition"] = self.denoiser(x_t, timesteps, **arguments).clean_latents
        predicted = self.denoiser(x_t, timesteps, **arguments).clean_latents.view(shape)
        # 5. Losses.
        output = TokComOutput(clean_latents=predicted)
        if return_loss:
            add_flow_losses(self, output, blocks, t)
        if return_loss and states is not None:
            add_head_losses(self, output, states, input_ids, attention_mask, blocks.starts)
        return as_asked(output, config, return_dict)

    # ------------------------------------------------------------------ latents
    def fit_latents(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets what `standardize` subtracts and divides by, (latent,) each, in the VAE's units."""
        with torch.no_grad():
            self.latent_mean.copy_(mean)
            self.latent_std.copy_(std)

    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents → the space of the flow."""
        if not self.config.standardize_latents:
            return latents
        # Several devices: the statistics stay on the model's own.
        mean, std = self.latent_mean.to(latents.device), self.latent_std.to(latents.device)
        return (latents - mean) / std

    def unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        """The space of the flow → VAE latents."""
        if not self.config.standardize_latents:
            return latents
        return latents * self.latent_std.to(latents.device) + self.latent_mean.to(latents.device)

    def encode(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """ids (batch, length) → VAE latents (batch, length / chunk, latent)."""
        return self.vae.encode(input_ids)

    def decode(self, latents: torch.Tensor) -> torch.LongTensor:
        """VAE latents (batch, chunks, latent) → ids (batch, chunks · chunk_size)."""
        return self.vae.decode(latents)

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
        sampler: str | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor:
        """Mixes latents with noise at t = `noise_level` and lets the denoiser clean them.

        With a context every block is denoised behind the tokens that really precede it, `block_size` chunks at a time.

        Args:
            input_ids: (batch, length), a multiple of the chunk size.
            noise_level: 0 = pure noise, 1 = plain reconstruction.
            num_steps: of a whole flow; max(1, int(num_steps · (1 − noise_level))) are taken.
            sampler: None takes the config's.
            generator: CPU generator of the noise.

        Raises:
            ValueError: noise_level outside [0, 1], num_steps < 1 or an unknown sampler.
        """
        if num_steps < 1 or not 0.0 <= noise_level <= 1.0:
            raise ValueError(
                f"num_steps must be at least 1 and noise_level in [0, 1], got {num_steps} and {noise_level}."
            )
        sampler = check_sampler(self.config.sampler if sampler is None else sampler)
        clean = self.standardize(self.encode(input_ids))
        if noise_level < 1.0:
            level = torch.full((len(clean),), noise_level).to(clean)
            x = interpolate(draw_noise(self, clean.shape, 1.0, generator), clean, level)
            times = sampling_times(denoising_steps(num_steps, noise_level), self.config.step_power, noise_level)
            clean = denoise_blocks(self, x, input_ids, times, sampler, generator)
        return self.decode(self.unstandardize(clean))

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        num_chunks: int | None = None,
        num_generate_chunks: int | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        *,
        attention_mask: torch.LongTensor | None = None,
        block_size: int | None = None,
        guidance_scale: float | None = None,
        best_of: int | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_return_sequences: int | None = None,
        do_sample: bool | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any | None = None,
        return_dict_in_generate: bool | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> torch.LongTensor | TokComGenerateOutput:
        """Generates token ids. An argument that is None is taken from `generation_config`, or has the default named here.

        Args:
            input_ids: prompts of any length, (batch, length); None: no prompt.
            num_chunks: chunks to generate without a prompt, 256.
            num_generate_chunks: chunks to add to a prompt, 64.
            num_steps: steps of the flow per block, the config's. Each runs the denoiser once, twice with "heun" or guidance.
            batch_size: sequences to generate without a prompt, 1.
            sampler: "euler", "heun" (second order) or "renoise" (stochastic); None takes the config's.
            temperature: factor of all noise that the flow draws: 1 (default) as in training; at 0 there is one text.
            generator: CPU generator of the noise; makes the output reproducible on any device.
            attention_mask: (batch, length), 1 = token, 0 = padding on either side, which the model does not see.
            block_size: chunks that are denoised together: 1 from left to right, 0 all at once; None takes the config's.
            guidance_scale: x1 = without context + scale · (with context − without) (arXiv 2207.12598); 1 (default) = off.
            best_of: draws of each block, of which the one is kept whose text encodes back nearest to the drawn latents, 1.
            max_new_tokens: tokens to generate per sequence, exactly so many: the last chunk is cut.
            max_length: the same with the tokens of the prompt counted in, padding too. Give one of the four lengths.
            num_return_sequences: independent continuations of each prompt, side by side in the batch, 1. Without prompts,
                sequences per one of `batch_size`.
            do_sample: False is temperature 0; True, and None, another temperature.
            eos_token_id: an id or several that end a sequence; None takes the config's.
            pad_token_id: what follows the end of a sequence; None: the (first) end token again.
            streamer: of transformers: gets the prompt, then the tokens of each finished block one by one.
            return_dict_in_generate: return a `TokComGenerateOutput` with the latents beside the ids.
            generation_config: None takes `model.generation_config`, which is saved with the model. It may hold any of these
                arguments but tensors, generator and streamer.

        Returns:
            ids (batch · num_return_sequences, length + generated): the prompt as given, padding included, and what follows.
            After a row's first generated end token everything is `pad_token_id`.

        Raises:
            TypeError: an unknown keyword, or ids that are no integers.
            ValueError: arguments that contradict each other or would not act, values out of range, an empty prompt, or ids
                outside the vocabulary.
        """
        prompt = Prompt.of(self, input_ids, attention_mask)
        settings = GenerationSettings.of(
            self, input_ids, generation_config,
            {
                "num_chunks": num_chunks, "num_generate_chunks": num_generate_chunks, "max_new_tokens": max_new_tokens,
                "max_length": max_length, "num_steps": num_steps, "batch_size": batch_size, "do_sample": do_sample,
                "temperature": temperature, "sampler": sampler, "block_size": block_size, "best_of": best_of,
                "guidance_scale": guidance_scale, "num_return_sequences": num_return_sequences,
                "return_dict_in_generate": return_dict_in_generate, "eos_token_id": eos_token_id,
                "pad_token_id": pad_token_id,
            },
        )  # fmt: skip
        if input_ids is None:
            input_ids = torch.empty(settings.batch_size, 0, dtype=torch.long)
        start = input_ids.to(execution_device(self)).repeat_interleave(settings.num_return_sequences, 0)
        stream = TokenStream(streamer, settings)
        stream.start(start)
        latents, ids = generate_blocks(self, prompt, settings, generator, stream)
        stream.end()
        output = torch.cat([start, ended(ids[:, : settings.new_tokens], settings)], dim=1)
        return TokComGenerateOutput(output, latents) if settings.return_dict_in_generate else output

    def adjust_generation_fn(self, *args, **kwargs):
        """As in transformers, where a folder without generation_config.json gives one that loses our own settings."""
        super().adjust_generation_fn(*args, **kwargs)
        stored = self.generation_config.to_diff_dict()
        stored.pop("_from_model_config", None)
        self.generation_config = GenerationConfig(**stored)

    # ------------------------------------------------------------------ embeddings
    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.vae.get_output_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """That of the VAE, and of the context with it: `new_num_tokens` counts the omni token's row, `len(tokenizer) + 1`.

        Raises:
            ValueError: as `TokComVAE.resize_token_embeddings`, or where the EOS token would be dropped.
        """
        eos = self.config.eos_token_id
        if eos is not None and new_num_tokens is not None and eos >= new_num_tokens - 1:
            raise ValueError(
                f"{new_num_tokens} rows, one of them the omni token's, leave none for eos_token_id={eos}."
            )
        if self.context is not None and self.context.model.embed_tokens.weight.is_meta:
            raise ValueError("The embedding of a context with offloaded weights cannot be resized.")
        embedding = self.vae.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.context is not None:
            self.context.resize(embedding.num_embeddings, self.config.vae.omni_token_id, mean_resizing)
        return embedding
