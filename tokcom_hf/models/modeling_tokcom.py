"""TokComModel: text → latents (VAE), noise → latents (denoiser), latents → text (VAE).

All public methods speak token ids; those that generate are in tokcom_generation.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init

from .chunked_cross_entropy import LOGITS_AT_ONCE, split_cross_entropy
from .configuration_tokcom import TokComConfig
from .context_encoder import FinishedChunks, joined
from .layer_outputs import as_asked
from .layers import SwiGLU
from .modeling_tokcom_denoiser import DenoisedModel, DenoisedModelOutput, Modulations
from .modeling_tokcom_vae import TokComVAE
from .strict_loading import StrictLoading
from .tokcom_generation import TokComGeneration
from .token_attention import TokenAttention
from .token_window import TokenWindow

if TYPE_CHECKING:
    # Never run: the code of the pipeline travels with the model because its file is named here.
    from .pipeline_tokcom import TokComGenerationPipeline  # noqa: F401

# 1 − t is kept at least this large in the evidence of x_t: every token is certain by then, and larger logits would only
# lose their last digits in bfloat16.
EVIDENCE_REMAINING = 0.2


class TokComModel(TokComGeneration, StrictLoading, GenerationMixin):
    """VAE, denoiser and latent statistics in one folder."""

    config_class = TokComConfig
    base_model_prefix = "tokcom"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block", "DenoiserBlock"]
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
        self.token_window = None
        if config.token_window_size:
            vae = config.vae
            self.token_window = TokenWindow(
                vae.chunk_size, vae.latent_size // vae.chunk_size, config.denoiser.self_conditioning,
                config.token_window_size, vae.hidden_size,
            )  # fmt: skip
        self.token_attention = None
        if config.token_attention_heads:
            self.token_attention = TokenAttention(
                config.denoiser, config.vae.chunk_size, config.vae.hidden_size, config.token_attention_heads
            )
        self.token_mlp = None
        if config.token_mlp_size:
            self.token_mlp = nn.Sequential(
                nn.RMSNorm(config.vae.hidden_size, eps=config.vae.rms_norm_eps),
                SwiGLU(config.vae.hidden_size, config.token_mlp_size),
            )
        self.token_norm = None
        if self.token_window is not None or self.token_attention is not None:
            self.token_norm = nn.RMSNorm(config.vae.hidden_size, eps=config.vae.rms_norm_eps)
        self.register_buffer("latent_mean", torch.zeros(config.vae.latent_size))
        self.register_buffer("latent_std", torch.ones(config.vae.latent_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "fan_in_init", False):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, TokComModel):
            init.zeros_(module.latent_mean)
            init.ones_(module.latent_std)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """That of the VAE: `new_num_tokens` counts the omni token's row too, `len(tokenizer) + 1`.

        Raises:
            ValueError: as `TokComVAE.resize_token_embeddings`, or where the EOS token would be dropped.
        """
        eos = self.config.eos_token_id
        if eos is not None and new_num_tokens is not None and eos >= new_num_tokens - 1:
            raise ValueError(
                f"{new_num_tokens} rows, one of them the omni token's, leave none for eos_token_id={eos}."
            )
        return self.vae.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def adjust_generation_fn(self, *args, **kwargs):
        """As in transformers, where a folder without generation_config.json gives one that loses our own settings."""
        super().adjust_generation_fn(*args, **kwargs)
        stored = self.generation_config.to_diff_dict()
        stored.pop("_from_model_config", None)
        self.generation_config = GenerationConfig(**stored)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vae.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.vae.get_output_embeddings()

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        self_condition: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        block_index: torch.LongTensor | None = None,
        past_key_values: FinishedChunks | None = None,
        position_offset: int = 0,
        return_key_values: bool = False,
        modulations: Modulations | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        posterior_temperature: float = 1.0,
        only_tokens: bool = False,
        token_times: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
        token_head: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DenoisedModelOutput | tuple:
        """One forward of the denoiser in the flow's (standardised) space; arguments as `DenoisedModel`.

        With `clean_latents="posterior_mean"` the output's `token_hidden` (batch, chunks, chunk_size, width) times the rows
        of `token_head` gives logits of each token; `clean_latents` is the mean latent of their softmax at
        `posterior_temperature`, None with `only_tokens=True`, which saves those logits. `token_times` (batch, chunks,
        chunk_size) are the tokens' times where they differ from their chunk's; `previous` (batch, 1, latent) is the clean
        latent left of the first, for a `token_window`; `token_head` saves computing it again. With `token_mask` (batch,
        chunks, chunk_size) and `only_tokens`, `token_hidden` is that of the tokens in it alone, (tokens, width).
        """
        if token_mask is not None and not only_tokens:
            raise ValueError(
                "token_mask leaves tokens out, and the mean latent needs all: pass only_tokens=True with it."
            )
        config, times = self.config, token_times
        if times is None and (config.scale_input or config.noise_likelihood or config.token_window_size):
            times = timesteps.view(len(timesteps), -1)
            if times.shape[1] not in (1, latents.shape[1]):
                if block_index is None:
                    raise ValueError(
                        f"timesteps must be (batch,), (batch, chunks) or, with block_index, (batch, blocks); got "
                        f"{times.shape[1]} timesteps for {latents.shape[1]} chunks."
                    )
                times = times[:, block_index]
            times = times.unsqueeze(-1)
        inputs = latents
        if config.scale_input:
            t = times.float()
            inputs = (latents * self.per_entry(t / (t**2 + ((1 - t) * config.noise_std) ** 2))).to(latents.dtype)
        shared = {
            "self_condition": self_condition, "attention_mask": attention_mask, "context": context,
            "block_index": block_index, "past_key_values": past_key_values, "position_offset": position_offset,
        }  # fmt: skip
        output = self.denoiser(
            inputs,
            timesteps,
            return_key_values=return_key_values,
            modulations=modulations,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **shared,
        )
        if config.clean_latents == "posterior_mean":
            hidden = output.clean_latents.unflatten(-1, (config.vae.chunk_size, -1))
            hidden = hidden if token_mask is None else hidden[token_mask]
            if self.token_norm is not None:
                hidden = self._beside(hidden, inputs, times, previous, token_mask, **shared)
                hidden = hidden if self.token_mlp is None else hidden + self.token_mlp(hidden)
                hidden = self.token_norm(hidden)
            if config.noise_likelihood:
                evidence = self._evidence(latents, times).to(hidden.dtype)
                hidden = torch.cat([hidden, evidence if token_mask is None else evidence[token_mask]], dim=-1)
            output.token_hidden, output.clean_latents = hidden, None
            if not only_tokens:
                head = self.token_head() if token_head is None else token_head
                output.clean_latents = self.standardize(
                    self._mean_latents(output.token_hidden, posterior_temperature, head)
                )
        return as_asked(output, self.config, return_dict)

    def _beside(self, hidden, inputs, times, previous, token_mask, context=None, **kwargs) -> torch.Tensor:
        """`hidden`, what the tokens beside add to it, and what it then reads from those of the finished chunks."""
        if self.token_window is not None:
            repeated = None if context is None else context.repeat_interleave(len(inputs) // len(context), 0)
            hidden = hidden + self.token_window(
                inputs, times, previous, token_mask=token_mask, context=repeated, **kwargs
            )
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if self.token_attention is None or (past is None and context is None):
            return hidden
        if context is None:
            keys, index = past.tokens, None
            if keys is None:
                raise ValueError("past_key_values hold no tokens to look at: make them with TokComModel.finish.")
        else:
            index = kwargs.get("block_index")
            if index is None:
                index = torch.zeros(context.shape[1], dtype=torch.long, device=context.device)
            keys = self.token_attention.key_value(
                context, attention_mask=None if mask is None else mask[:: len(inputs) // len(context)]
            )
        if token_mask is None:
            token_mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        offset = kwargs.get("position_offset", 0)
        read = self.token_attention(hidden.flatten(0, -2), keys, token_mask, offset, index, mask)
        return hidden + read.view_as(hidden)

    def finish(
        self,
        latents: torch.Tensor,
        past: FinishedChunks | None = None,
        position_offset: int = 0,
        attention_mask: torch.Tensor | None = None,
    ) -> FinishedChunks:
        """What later chunks need of clean ones in the flow's space; arguments as `DenoisedModel.finish`."""
        finished = self.denoiser.finish(latents, past, position_offset, attention_mask)
        if self.token_attention is not None:
            last = None if past is None else past.latent
            tokens = self.token_attention.key_value(latents, position_offset, last, attention_mask)
            if past is not None and past.tokens is not None:
                tokens = joined([past.tokens], [tokens])[0]
            finished.tokens, finished.latent = tokens, latents[:, -1:]
        return finished

    def per_entry(self, per_token: torch.Tensor) -> torch.Tensor:
        """(..., 1 or chunk_size) → (..., 1 or latent): one value for all entries of a token."""
        places = per_token.shape[-1]
        return per_token if places == 1 else per_token.repeat_interleave(self.config.vae.latent_size // places, dim=-1)

    def _evidence(self, x_t: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What x_t (batch, chunks, latent) at `times` (batch, 1 or chunks, 1 or chunk_size) tells of its tokens.

        For a token v with standardised latent e_v, x_t ~ N(t · e_v, (1 − t)² σ²), so that up to a constant
        log p(x_t | v) = (t · x_t · e_v − t² |e_v|² / 2) / ((1 − t)² σ²).

        Returns:
            (batch, chunks, chunk_size, latent / chunk_size + 1): the factors of e_v and of |e_v|² in `token_head`.
        """
        t = times.float().unsqueeze(-1)
        precision = ((1 - t).clamp(min=EVIDENCE_REMAINING) * self.config.noise_std) ** -2
        tokens = x_t.float().unflatten(-1, (self.config.vae.chunk_size, -1)) * t * precision
        square = (-0.5 * t**2 * precision).expand(*tokens.shape[:-1], 1)
        return torch.cat([tokens, square], dim=-1)

    def token_head(self) -> torch.Tensor:
        """Rows whose products with `token_hidden` are the logits of "posterior_mean", (vocab, width).

        The affine map of the latents is that of the first place: `fit_latents` makes it one for all places.
        """
        weight = self.vae.lm_head.weight
        if not self.config.noise_likelihood:
            return weight
        table = self.vae.token_table()
        if self.config.standardize_latents:
            width = table.shape[1]
            table = (table - self.latent_mean[:width]) / self.latent_std[:width]
        return torch.cat([weight, table, table.square().sum(-1, keepdim=True)], dim=-1)

    def token_cross_entropy(
        self, token_hidden: torch.Tensor, labels: torch.LongTensor, unseen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy in nats of `token_hidden` (tokens, width) with `labels` (tokens,), a scalar float32.

        unseen: (tokens,) bool, those whose latents are all noise, which tells nothing of them. The factors of the evidence
        are zero there, so that `lm_head` alone decides and a third of the head's columns is spared.
        """
        number, entropy = max(1, len(labels)), 0.0
        if unseen is not None and self.config.noise_likelihood:
            table = self.vae.lm_head.weight
            entropy = split_cross_entropy(
                token_hidden[unseen, : table.shape[1]], [(table, None)], labels[unseen], num_items=number
            )
            token_hidden, labels = token_hidden[~unseen], labels[~unseen]
        return entropy + split_cross_entropy(token_hidden, [(self.token_head(), None)], labels, num_items=number)

    def _mean_latents(self, token_hidden: torch.Tensor, temperature: float, head: torch.Tensor) -> torch.Tensor:
        """(batch, chunks, chunk_size, width) → (batch, chunks, latent), a bounded number of logits at a time."""
        flat = token_hidden.flatten(0, 1)
        rows = max(1, LOGITS_AT_ONCE // (self.config.vae.chunk_size * self.config.vae.vocab_size))
        omni = torch.tensor([self.config.vae.omni_token_id], device=flat.device)
        means = []
        for part in flat.split(rows):
            logits = nn.functional.linear(part, head).float() / temperature
            logits = logits.index_fill(-1, omni, torch.finfo(logits.dtype).min)
            means.append(self.vae.expected_latents(logits.softmax(-1).to(part.dtype)))
        return torch.cat(means).view(*token_hidden.shape[:2], -1)

    # ------------------------------------------------------------------ latents
    def fit_latents(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets what `standardize` subtracts and divides by, (latent,) each, in the VAE's units.

        With a VAE of encoder="embedding" both are pooled over the places of a chunk, where tokens have the same embedding.
        """
        if self.config.vae.encoder == "embedding":
            places = self.config.vae.chunk_size
            mean, square = mean.view(places, -1).mean(0), (std**2 + mean**2).view(places, -1).mean(0)
            mean, std = mean.repeat(places), (square - mean**2).clamp(min=1e-12).sqrt().repeat(places)
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

    def decode(
        self, latents: torch.Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.LongTensor:
        """VAE latents (batch, chunks, latent) → ids (batch, chunks · chunk_size)."""
        return self.vae.decode(latents, temperature, generator)

    @torch.no_grad()
    def reconstruct(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """ids → latents → ids, shapes (batch, length)."""
        return self.decode(self.encode(input_ids))
