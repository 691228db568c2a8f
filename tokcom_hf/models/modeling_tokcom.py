"""TokComModel: text → latents (VAE), noise → latents (denoiser), latents → text (VAE).

    ids of a chunk ─ encoder ─► z, standardised: x1              x0 ~ N(0, noise_std²)
    all tokens before a block ─ context ─► c                     x_t = (1 − t) · x0 + t · x1
    denoiser(x_t, t, c) ─► x̂1                                    loss |x̂1 − x1|² / (1 − t)², cross-entropy of its tokens
    c ─ heads ─► the next tokens                                 cross-entropy, which trains the context

`forward` is this training objective; tokcom_generation.py holds the steps of `generate`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init

from .configuration_tokcom import TokComConfig
from .modeling_tokcom_denoiser import DenoisedModel
from .modeling_tokcom_vae import TokComVAE
from .shared_layer_outputs import as_asked
from .shared_strict_loading import StrictLoading
from .shared_tensor_checks import check_ids
from .tokcom_context_encoder import ContextEncoder, read_before
from .tokcom_denoise import denoise
from .tokcom_flow_matching import training_times
from .tokcom_generation import Prompt, TokComGenerateOutput, denoise_text, generate_blocks
from .tokcom_generation_settings import GenerationSettings
from .tokcom_objective import TokComOutput, add_flow_losses, add_text_losses, block_shape, check_shapes, cut_blocks
from .tokcom_recent_tokens import RecentTokens
from .tokcom_token_order import TokenOrder, without_order
from .tokcom_token_posterior import TokenPosterior

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_tokcom import TokComGenerationPipeline  # noqa: F401


class TokComModel(StrictLoading, GenerationMixin):
    """VAE, denoiser, context and the statistics of the latents."""

    config_class = TokComConfig
    base_model_prefix = "tokcom"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block", "DenoiserBlock", "LlamaDecoderLayer"]
    _tied_weights_keys = {"vae.lm_head.weight": "vae.embed_tokens.weight"}
    _keys_to_ignore_on_load_missing = [r"^latent_mean$", r"^latent_std$"]  # zero and one, as folders of early versions

    def __init__(self, config: TokComConfig):
        super().__init__(config)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        # A generation config that still holds this value follows later changes of `config.eos_token_id`.
        self.eos_of_config = config.eos_token_id
        self.vae = TokComVAE(config.vae)
        self.denoiser = DenoisedModel(config.denoiser)
        shape, places = config.context, (config.vae.chunk_size, config.vae.omni_token_id)
        self.context = None if shape is None else ContextEncoder(shape, *places)
        self.posterior = TokenPosterior(config) if config.token_posterior else None
        self.recent = RecentTokens(config) if config.recent_size else None
        self.register_buffer("latent_mean", torch.zeros(config.vae.latent_size))
        self.register_buffer("latent_std", torch.ones(config.vae.latent_size))
        self.order = TokenOrder(config) if config.token_order else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokComModel):
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)
        if isinstance(module, TokenPosterior | TokenOrder):
            module.reset()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        call_times: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        offset: int = 0,
        block_size: int = 0,
        draw_shift: int = 0,
        block_stride: int = 1,
        self_conditioned: bool = False,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> TokComOutput | tuple:
        """The objective of stage two on rows of tokens, cut into blocks once per noise draw; the VAE stays as it is.

        Args:
            input_ids, attention_mask: (rows, length); the mask is 1 for tokens and 0 for padding on the right.
            latents: what `encode` gives for the rows, (rows, length / chunk_size, latent), for offset 0; None encodes them.
            noise: x0, (rows, blocks, chunks, latent); None draws it.
            timesteps: t in [0, 1], (rows, blocks) or (rows, blocks, chunks), no loss at t = 1; None draws them.
            call_times: earlier times, like `timesteps`, at which to call the denoiser. Models with `token_posterior` only.
            context_mask: (rows, blocks), False hides the context from a block; None hides it from no block.
            offset, block_size: tokens before the first block, and chunks per block (0: all). Models with a context only.
            draw_shift, block_stride: tokens by which noise draws lie apart, and blocks by which the blocks of a draw do.
            self_conditioned: predict twice, the second time from the first prediction. Models with `self_conditioning` only.
            return_loss: whether to compute losses; `Trainer` looks for this name in models without labels.
            return_dict: False returns a tuple; None takes the config's.

        Raises:
            ValueError: shapes do not fit, or this configuration cannot use an argument.
        """
        config = self.config
        check_ids(input_ids, config.vae.vocab_size)
        # 1. Cut the rows into blocks: clean latents x1, tokens, padding.
        cuts = (offset, block_size, draw_shift, block_stride)
        shape = (len(input_ids), *block_shape(config, input_ids.shape[1], *cuts))
        check_shapes(config, input_ids, shape, attention_mask=attention_mask, latents=latents, noise=noise,
                     timesteps=timesteps, call_times=call_times, context_mask=context_mask)  # fmt: skip
        blocks = cut_blocks(self, input_ids, attention_mask, latents, shape, offset, draw_shift, block_stride)
        # 2. Draw noise x0 and times t, and mix: x_t = (1 − t) · x0 + t · x1.
        noise = torch.randn(shape) * config.noise_std if noise is None else noise
        if timesteps is None:
            timesteps = training_times(shape[:2], config.time_distribution, config.time_mean, config.time_std)
        point = blocks.mixed(noise, timesteps)
        t = point.timesteps.view(*shape[:2], -1).expand(shape[:3])
        # 3. Read the context: its state before each block.
        states, before = read_before(self, input_ids, blocks.starts, context_mask)
        # 4. Predict x1; the blocks of all rows are one batch.
        earlier = None if call_times is None else blocks.mixed(noise, call_times)
        arguments: dict[str, Any] = {"context": before, "attention_mask": blocks.chunk_mask(), "earlier": earlier}
        arguments["learns"] = True
        if self_conditioned:
            with torch.no_grad():
                arguments["earlier"] = denoise(self, *point, **arguments)
        asked = return_loss and config.cross_entropy_weight > 0
        found = denoise(self, *point, labels=blocks.labels.flatten(0, 1) if asked else None, **arguments)
        output = TokComOutput(clean_latents=found.clean_latents.view(shape), cross_entropy_loss=found.cross_entropy)
        # 5. Add up the losses of the flow, of the tokens and of the text alone.
        if return_loss:
            add_flow_losses(self, output, blocks, t)
            add_text_losses(self, output, states, input_ids, attention_mask, blocks.starts[0], t)
        return as_asked(output, config, return_dict)

    def fit_latents(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets mean and standard deviation of the VAE's latents, (latent,) each, for `standardize`."""
        with torch.no_grad():
            self.latent_mean.copy_(mean)
            self.latent_std.copy_(std)

    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents → the space of the flow."""
        if self.config.standardize_latents:
            # In a model spread over devices, the statistics may be on another one.
            latents = (latents - self.latent_mean.to(latents.device)) / self.latent_std.to(latents.device)
        return latents if self.order is None else self.order.apply_to(latents)

    def unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        """The space of the flow → VAE latents."""
        latents = without_order(self, latents)
        if self.config.standardize_latents:
            latents = latents * self.latent_std.to(latents.device) + self.latent_mean.to(latents.device)
        return latents

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, length) → VAE latents (batch, length / chunk, latent)."""
        return self.vae.encode(input_ids)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents (batch, chunks, latent) → ids (batch, chunks · chunk_size)."""
        return self.vae.decode(latents)

    @torch.no_grad()
    def reconstruct(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids → latents → ids, shapes (batch, length)."""
        return self.decode(self.encode(input_ids))

    @torch.no_grad()
    def denoise_reconstruct(
        self,
        input_ids: torch.Tensor,
        noise_level: float = 0.5,
        num_steps: int = 50,
        sampler: str | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mixes the latents of a text with noise at t = `noise_level`, denoises them and decodes.

        With a context every block of `block_size` chunks is denoised after the tokens that really precede it.

        Args:
            input_ids: (batch, length), a multiple of the chunk size.
            noise_level: in [0, 1]: 0 is pure noise, 1 plain reconstruction.
            num_steps: steps from 0 to 1, of which max(1, int(num_steps · (1 − noise_level))) are taken.
            sampler: "euler", "heun", "multistep", "multirate" or "renoise"; None takes the config's.
            generator: CPU generator of the noise.

        Raises:
            ValueError: noise_level outside [0, 1], num_steps below 1, or an unknown sampler.
        """
        return self.decode(denoise_text(self, input_ids, noise_level, num_steps, sampler, generator))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        num_chunks: int | None = None,
        num_generate_chunks: int | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
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
    ) -> torch.Tensor | TokComGenerateOutput:
        """Generates token ids after prompts, or from nothing.

        None takes the value of `generation_config`, else of the model's config, else the default named here.

        Args:
            input_ids: prompts of any length, (batch, length); None: no prompt.
            num_chunks, num_generate_chunks: chunks to generate without a prompt (default 256), after one (default 64).
            num_steps: steps of the flow per block; each calls the denoiser once, at most (twice with "heun" or guidance).
            batch_size: sequences to generate without a prompt; default 1.
            sampler: "euler", "heun", "multistep" or "multirate" (second order), or "renoise" (stochastic).
            temperature: factor of all noise that the flow draws: 1 (default) as in training, 0 for one text without noise.
            do_sample: False means temperature 0, True a temperature above 0; a contradicting `temperature` is refused.
            generator: CPU generator of the noise; makes the output reproducible on any device.
            attention_mask: (batch, length), 1 = token, 0 = padding on either side.
            block_size: chunks that are denoised together: 1 writes from left to right, 0 all at once.
            guidance_scale: x1 = without context + scale · (with context − without) (arXiv 2207.12598); 1 (default) = off.
            best_of: draws of each block (default 1); the draw is kept whose text encodes nearest to its own latents.
            max_new_tokens, max_length: new tokens; new tokens with prompt and padding. Give one of the four lengths.
            num_return_sequences: continuations of each prompt (or of each of `batch_size`), side by side; default 1.
            eos_token_id, pad_token_id: id or ids that end a sequence; id behind the end, by default the (first) end id.
            streamer: a streamer of transformers; gets the prompt, then the tokens of each finished block one by one.
            return_dict_in_generate: return a `TokComGenerateOutput`, which holds the latents, too.
            generation_config: any of these but tensors, generator and streamer; None takes the model's, saved with it.

        Returns:
            ids (batch · num_return_sequences, length + generated): the prompt as given, the new tokens, and `pad_token_id`
            after the first end token among them.

        Raises:
            TypeError: an unknown keyword, ids that are no integers, or a count that is no whole number.
            ValueError: arguments contradict each other, would not act or are out of range, as ids may be; an empty prompt.
        """
        prompt = Prompt.of(self, input_ids, attention_mask)
        settings = GenerationSettings.of(
            self, input_ids, generation_config,
            {
                "num_chunks": num_chunks, "num_generate_chunks": num_generate_chunks, "max_new_tokens": max_new_tokens,
                "max_length": max_length, "num_steps": num_steps, "batch_size": batch_size, "do_sample": do_sample,
                "temperature": temperature, "sampler": sampler, "block_size": block_size, "best_of": best_of,
                "guidance_scale": guidance_scale, "num_return_sequences": num_return_sequences, "pad_token_id": pad_token_id,
                "return_dict_in_generate": return_dict_in_generate, "eos_token_id": eos_token_id,
            },
        )  # fmt: skip
        return generate_blocks(self, prompt, settings, generator, streamer)

    def adjust_generation_fn(self, *args, **kwargs):
        """As in transformers, but keeps settings of this model where the folder has no generation_config.json."""
        super().adjust_generation_fn(*args, **kwargs)
        stored = {k: v for k, v in self.generation_config.to_diff_dict().items() if k != "_from_model_config"}
        self.generation_config = GenerationConfig(**stored)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.vae.get_output_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the embeddings of VAE and context; `new_num_tokens` counts the omni token, too: `len(tokenizer) + 1`.

        Raises:
            ValueError: as `TokComVAE.resize_token_embeddings`, or the EOS token would be dropped.
        """
        eos = self.config.eos_token_id
        if eos is not None and new_num_tokens is not None and eos >= new_num_tokens - 1:
            raise ValueError(f"{new_num_tokens} rows, one the omni token's, leave none for eos_token_id={eos}.")
        if self.context is not None and self.context.model.embed_tokens.weight.is_meta:
            raise ValueError("The embedding of a context with offloaded weights cannot be resized.")
        embedding = self.vae.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.context is not None:
            self.context.resize(embedding.num_embeddings, self.config.vae.omni_token_id, mean_resizing)
        return embedding
