"""TokComVAE: chunks of text tokens to latent vectors and back.

encoder:  ids (batch, chunk) → bidirectional transformer → last position, final norm → z (batch, latent)
decoder:  [z, omni × (chunk − 1)] → bidirectional transformer → tied head → logits (batch, chunk, vocab)

A sequence of many chunks is folded into the batch dimension: attention stays dense chunk × chunk, and the loss is the
chunked cross-entropy, which never holds all logits at once.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_tokcom_vae import TokComVAEConfig
from .shared_cross_entropy import chunked_cross_entropy
from .shared_layer_outputs import LayerRecord, as_asked
from .shared_layers import Block, rotary_embeddings
from .shared_strict_loading import StrictLoading

# Times of the hinted loss are σ(N(−0.7, 1)): most are where a hint decides.
HINT_TIME_MEAN = -0.7


@dataclass
class TokComVAEOutput(ModelOutput):
    """Output of `TokComVAE`.

    loss: scalar, with `labels`: reconstruction plus weighted KL.
    logits: (batch, chunk, vocab); None where a loss was computed and `return_logits` is False.
    latents: (batch, latent).
    reconstruction_loss, kl_loss: the parts of `loss`, nats per token and nats per chunk.
    hidden_states: with `output_hidden_states`, (batch, chunk, hidden) before the encoder's first layer and behind each, the
        last one normalised, then the same of the decoder.
    attentions: with `output_attentions`, (batch, heads, chunk, chunk) of the encoder's layers, then of the decoder's.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class ChunkTransformer(nn.Module):
    """Blocks and final norm over the positions of one chunk."""

    def __init__(self, config: TokComVAEConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Block(config) for _ in range(num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for block in self.layers:
            # Read by `_init_weights`, which transformers calls for modules that have weights of their own.
            block.self_attn.o_proj.zero_init = block.mlp.down_proj.zero_init = config.zero_init_residual

    def forward(self, hidden_states: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """(batch, chunk, hidden) → the same behind all layers; `record` is filled with what the layers saw."""
        rotary = rotary_embeddings(hidden_states.shape[1], self.config, hidden_states)
        for layer in self.layers:
            before = hidden_states
            hidden_states, weights = layer(hidden_states, rotary)
            if record is not None:
                record.add(before, weights)
        hidden_states = self.norm(hidden_states)
        if record is not None:
            record.end(hidden_states)
        return hidden_states


class TokComVAE(StrictLoading):
    """Variational (or plain) autoencoder of token chunks."""

    config_class = TokComVAEConfig
    base_model_prefix = "vae"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: TokComVAEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = ChunkTransformer(config, config.num_hidden_layers)
        self.decoder = ChunkTransformer(config, config.num_decoder_layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        every = config.chunk_projection == "all"
        width = config.hidden_size * config.chunk_size if every else config.hidden_size
        projected = every or config.latent_size != config.hidden_size or config.variational
        self.latent_proj = nn.Linear(width, config.latent_size) if projected else nn.Identity()
        self.log_variance_proj = nn.Linear(width, config.latent_size) if config.variational else None
        self.decoder_proj = nn.Linear(config.latent_size, width) if projected else nn.Identity()
        self.hint = None
        if config.hint_tokens:
            size = config.hidden_size
            self.hint = nn.Sequential(
                nn.RMSNorm(config.hint_tokens * size, eps=config.rms_norm_eps),
                nn.Linear(config.hint_tokens * size, 2 * size), nn.SiLU(), nn.Linear(2 * size, config.latent_size),
            )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        if getattr(module, "zero_init", False):
            init.zeros_(module.weight)
        std = self.config.embedding_initializer_range
        if std is not None and (isinstance(module, nn.Embedding) or module is self.lm_head):
            init.normal_(module.weight, std=std)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; `new_num_tokens` counts all rows, the omni token's included: `len(tokenizer) + 1`.

        An omni token in the last row moves to the new last row, so that the rows before it are the tokenizer's; the token
        that gets its old row starts as a copy of it. The tied head is resized with the embedding, and the config follows.

        Raises:
            ValueError: fewer than two rows, an omni token elsewhere whose row would be dropped, or offloaded weights.
                Nothing is changed then.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        config, old = self.config, self.config.vocab_size
        rows = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        moves = config.omni_token_id == old - 1
        if rows < 2 or not (moves or config.omni_token_id < rows):
            raise ValueError(
                f"{rows} rows are too few: there must be one for a token and one for the omni token "
                f"(omni_token_id={config.omni_token_id} of {old})."
            )
        if self.embed_tokens.weight.is_meta:
            raise ValueError("The embedding of a TokComVAE with offloaded weights cannot be resized.")
        omni = self.embed_tokens.weight[config.omni_token_id].detach().clone()
        embedding = super().resize_token_embeddings(rows, None, mean_resizing)
        if moves and rows != old:
            with torch.no_grad():
                embedding.weight[-1] = omni
            config.omni_token_id = rows - 1
        return embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokComVAEOutput | tuple:
        """Reconstructs chunks.

        Args:
            input_ids: (batch, chunk) or (batch, length) with `length` a multiple of the chunk size, folded to chunks.
            labels: same shape; -100 positions do not count.
            return_logits: default True without labels, False with labels outside training logs (memory).
            output_hidden_states, output_attentions: also return those of all layers; None takes the config's.
            return_dict: False returns a tuple; None takes the config's.

        Raises:
            ValueError: the length is no multiple of the chunk size, or attention weights that are not computed.
        """
        record = LayerRecord.asked(self.config, output_hidden_states, output_attentions)
        chunks = self.fold(input_ids)
        noisy_ids = chunks
        if self.training and self.config.token_dropout > 0:
            dropped = torch.rand(chunks.shape, device=chunks.device) < self.config.token_dropout
            noisy_ids = chunks.masked_fill(dropped, self.config.omni_token_id)
        mean, log_variance = self.posterior(noisy_ids, record)
        latents, kl_loss = mean, None
        if log_variance is not None:
            kl = 0.5 * (mean.float() ** 2 + log_variance.exp() - 1.0 - log_variance)
            kl_loss = kl.mean(dim=0).clamp(min=self.config.kl_free_nats).sum()
            if self.training:
                latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp().to(mean.dtype)
        hidden_states = self.decode_hidden(self._perturb(latents), record)
        loss = reconstruction = logits = None
        if labels is not None:
            reconstruction = self.cross_entropy(hidden_states, labels)
            loss = reconstruction
            if kl_loss is not None:
                loss = loss + self.config.kl_weight * kl_loss
            if self.training and self.hint is not None:
                loss = loss + self.config.hint_weight * self._hinted_cross_entropy(input_ids, latents, labels)
        if return_logits or (return_logits is None and labels is None):
            logits = self.lm_head(hidden_states)
        output = TokComVAEOutput(
            loss=loss,
            logits=logits,
            latents=mean,
            reconstruction_loss=None if reconstruction is None else reconstruction.detach(),
            kl_loss=None if kl_loss is None else kl_loss.detach(),
            **record.fields(),
        )
        return as_asked(output, self.config, return_dict)

    def fold(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """ids (batch, length) → chunks (batch · length / chunk, chunk)."""
        chunk = self.config.chunk_size
        if input_ids.shape[-1] % chunk:
            raise ValueError(
                f"The number of tokens must be a multiple of chunk_size={chunk}, got {input_ids.shape[-1]}."
            )
        return input_ids.reshape(-1, chunk)

    def posterior(
        self, chunks: torch.LongTensor, record: LayerRecord | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids (batch, chunk) → mean (batch, latent) and, if variational, log-variance (batch, latent) in float32."""
        hidden_states = self.encoder(self.embed_tokens(chunks), record)
        last = hidden_states.flatten(1) if self.config.chunk_projection == "all" else hidden_states[:, -1]
        mean = self.latent_proj(last)
        if self.config.fixed_norm:
            mean = nn.functional.rms_norm(mean.float(), mean.shape[-1:], eps=self.config.rms_norm_eps).to(last.dtype)
        if self.log_variance_proj is None:
            return mean, None
        return mean, self.log_variance_proj(last).float().clamp(-10.0, 4.0)

    def _perturb(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return latents
        if self.config.latent_noise > 0:
            scale = latents.detach().float().std(dim=0, unbiased=False) if len(latents) > 1 else latents.new_ones(())
            level = torch.rand(len(latents), 1, device=latents.device) * self.config.latent_noise
            latents = latents + (torch.randn_like(latents, dtype=torch.float32) * level * scale).to(latents.dtype)
        return latents

    def _hinted_cross_entropy(
        self, input_ids: torch.LongTensor, latents: torch.Tensor, labels: torch.LongTensor
    ) -> torch.Tensor:
        """Nats per token of chunks read from x_t = t · z + (1 − t) · noise, each with a hint of the tokens before it.

        For latents of unit scale the best linear estimate of z is t · x_t / (t² + (1 − t)²). What a Gaussian prior knows of
        z adds a term that does not depend on x_t: the hint.
        """
        chunk, tokens = self.config.chunk_size, self.config.hint_tokens
        if input_ids.shape[1] <= tokens:
            raise ValueError(
                f"hint_tokens={tokens} needs longer rows of text to train on, got {input_ids.shape[1]} tokens."
            )
        before = input_ids.unfold(1, tokens, chunk)[:, :-1].reshape(-1, tokens)
        z = latents.view(len(input_ids), -1, latents.shape[-1])[:, tokens // chunk :].flatten(0, 1)
        t = torch.sigmoid(HINT_TIME_MEAN + torch.randn(len(z), 1, device=z.device)).to(z.dtype)
        x_t = t * z + (1 - t) * torch.randn_like(z)
        shifted = t * x_t / (t**2 + (1 - t) ** 2) + self.hint(self.embed_tokens(before).flatten(1))
        return self.cross_entropy(self.decode_hidden(shifted), labels[:, tokens:])

    def decode_hidden(self, latents: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """latents (batch, latent) → hidden states before the head (batch, chunk, hidden)."""
        if self.config.chunk_projection == "all":
            shape = (len(latents), self.config.chunk_size, self.config.hidden_size)
            return self.decoder(self.decoder_proj(latents).view(shape), record)
        # Looked up through the module: under offloading its weight is elsewhere outside of its own forward.
        omni = self.embed_tokens(torch.tensor([self.config.omni_token_id], device=latents.device))
        query = omni.expand(len(latents), self.config.chunk_size - 1, -1)
        return self.decoder(torch.cat([self.decoder_proj(latents).unsqueeze(1), query], dim=1), record)

    def cross_entropy(self, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Mean cross-entropy in nats per token of hidden states (..., hidden) with as many labels; -100 does not count."""
        hidden_states, labels = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
        if type(self.lm_head) is not nn.Linear or hasattr(self.lm_head, "_hf_hook"):
            # An offloaded head has no weight outside of its forward, and that of an adapter is not all of it.
            counted = labels != -100
            logits = self.lm_head(hidden_states[counted]).float()
            return nn.functional.cross_entropy(logits, labels[counted], reduction="sum") / counted.sum().clamp(min=1)
        return chunked_cross_entropy(hidden_states, self.lm_head.weight, labels)

    def encode(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """ids (batch, length) → latents (batch, length / chunk, latent): the posterior mean, nothing random."""
        mean, _ = self.posterior(self.fold(input_ids))
        return mean.view(len(input_ids), -1, mean.shape[-1])

    def decode_logits(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (batch, chunks, latent) → logits (batch, chunks · chunk_size, vocab), the omni token excluded."""
        hidden_states = self.decode_hidden(latents.flatten(0, 1).to(self.lm_head.weight.dtype))
        logits = self.lm_head(hidden_states.reshape(len(latents), -1, hidden_states.shape[-1]))
        omni = torch.tensor([self.config.omni_token_id], device=logits.device)
        return logits.index_fill(-1, omni, torch.finfo(logits.dtype).min)

    def decode(self, latents: torch.Tensor) -> torch.LongTensor:
        """latents (batch, chunks, latent) → the likeliest ids (batch, chunks · chunk_size), never the omni token."""
        # 1024 tokens at a time bound the logits to a few hundred megabytes at a 50k vocabulary.
        at_once = max(1, 1024 // (self.config.chunk_size * max(1, len(latents))))
        return torch.cat([self.decode_logits(part).argmax(dim=-1) for part in latents.split(at_once, dim=1)], dim=1)
