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

from .chunked_cross_entropy import chunked_cross_entropy
from .configuration_tokcom_vae import TokComVAEConfig
from .layer_outputs import LayerRecord, as_asked
from .layers import Block, rotary_embeddings
from .strict_loading import StrictLoading
from .token_sampling import sample_tokens


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

    def forward(self, hidden_states: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """(batch, chunk, hidden) → the same behind all layers; `record` is filled with what the layers saw."""
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_embeddings(positions, head_dim, self.config.rope_theta, hidden_states.dtype)
        for layer in self.layers:
            before = hidden_states
            hidden_states, _, weights = layer(hidden_states, rotary)
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
        linear = config.encoder == "embedding"
        # With `encoder="embedding"` the table is all there is of an encoder.
        self.encoder = None if linear else ChunkTransformer(config, config.num_hidden_layers)
        self.token_latents = (
            nn.Embedding(config.vocab_size, config.latent_size // config.chunk_size) if linear else None
        )
        nearest = config.nearest_decoder
        self.decoder = None if nearest else ChunkTransformer(config, config.num_decoder_layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The denoiser's own head then, behind another linear map: two small ones would hardly learn at first.
        self.lm_head.fan_in_init = self.embed_tokens.fan_in_init = nearest
        every = config.chunk_projection == "all"
        width = config.hidden_size * config.chunk_size if every else config.hidden_size
        projected = every or config.latent_size != config.hidden_size or config.variational
        self.latent_proj = nn.Linear(width, config.latent_size) if projected and not linear else nn.Identity()
        self.log_variance_proj = nn.Linear(width, config.latent_size) if config.variational else None
        self.decoder_proj = nn.Linear(config.latent_size, width) if projected and not nearest else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "fan_in_init", False):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            return
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

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
            ValueError: fewer than two rows, an omni token elsewhere whose row would be dropped, offloaded weights, or
                `encoder="embedding"`. Nothing is changed then.
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
        if self.encoder is None or self.embed_tokens.weight.is_meta:
            kind = "encoder='embedding'" if self.encoder is None else "offloaded weights"
            raise ValueError(f"The embedding of a TokComVAE with {kind} cannot be resized.")
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
            reconstruction = self._cross_entropy(
                hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
            )
            loss = reconstruction
            if kl_loss is not None:
                loss = loss + self.config.kl_weight * kl_loss
        if return_logits or (return_logits is None and labels is None):
            logits = _apply_head(self._head(), hidden_states)
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
        if self.encoder is None:
            return self._of_unit_scale(self.token_latents(chunks)).flatten(1), None
        hidden_states = self.encoder(self.embed_tokens(chunks), record)
        last = hidden_states.flatten(1) if self.config.chunk_projection == "all" else hidden_states[:, -1]
        mean = self.latent_proj(last)
        if self.config.fixed_norm:
            mean = nn.functional.rms_norm(mean.float(), mean.shape[-1:], eps=self.config.rms_norm_eps).to(last.dtype)
        if self.log_variance_proj is None:
            return mean, None
        return mean, self.log_variance_proj(last).float().clamp(-10.0, 4.0)

    def token_table(self) -> torch.Tensor:
        """Latents of single tokens (vocab, latent / chunk), root-mean-square 1; only with `encoder="embedding"`."""
        return self._of_unit_scale(self.token_latents.weight)

    def _of_unit_scale(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(rows.float(), rows.shape[-1:], eps=self.config.rms_norm_eps).to(rows.dtype)

    def expected_latents(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Token probabilities (..., chunk, vocab) → mean latents (..., latent): exact, as the encoder is linear."""
        return (probabilities @ self.token_table()).flatten(-2)

    def _perturb(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return latents
        if self.config.latent_noise > 0:
            scale = latents.detach().float().std(dim=0, unbiased=False) if len(latents) > 1 else latents.new_ones(())
            level = torch.rand(len(latents), 1, device=latents.device) * self.config.latent_noise
            latents = latents + (torch.randn_like(latents, dtype=torch.float32) * level * scale).to(latents.dtype)
        return nn.functional.dropout(latents, self.config.latent_dropout)

    def decode_hidden(self, latents: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """latents (batch, latent) → hidden states before `decoder_head` (batch, chunk, its width)."""
        if self.decoder is None:
            return latents.unflatten(-1, (self.config.chunk_size, -1))
        if self.config.chunk_projection == "all":
            shape = (len(latents), self.config.chunk_size, self.config.hidden_size)
            return self.decoder(self.decoder_proj(latents).view(shape), record)
        # Looked up through the module: under offloading its weight is elsewhere outside of its own forward.
        omni = self.embed_tokens(torch.tensor([self.config.omni_token_id], device=latents.device))
        query = omni.expand(len(latents), self.config.chunk_size - 1, -1)
        return self.decoder(torch.cat([self.decoder_proj(latents).unsqueeze(1), query], dim=1), record)

    def decoder_head(self) -> torch.Tensor:
        """Rows that hidden states of the decoder are compared with, (vocab, width): the tied head, or the token table."""
        return self.lm_head.weight if self.decoder is not None else self.token_table()

    def _head(self) -> torch.Tensor | nn.Module:
        """The tied head as a module, which offloading and adapters need, or the token table."""
        return self.lm_head if self.decoder is not None else self.token_table()

    def _cross_entropy(self, hidden_states: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Mean cross-entropy in nats of hidden states (rows, width) with labels (rows,), a scalar float32."""
        head = self._head()
        if isinstance(head, nn.Module) and (type(head) is not nn.Linear or hasattr(head, "_hf_hook")):
            # An offloaded head has no weight outside of its forward, and that of an adapter is not all of it.
            counted = labels != -100
            logits = head(hidden_states[counted]).float()
            return nn.functional.cross_entropy(logits, labels[counted], reduction="sum") / counted.sum().clamp(min=1)
        return chunked_cross_entropy(hidden_states, self.decoder_head(), labels)

    def encode(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """ids (batch, length) → latents (batch, length / chunk, latent): the posterior mean, nothing random."""
        mean, _ = self.posterior(self.fold(input_ids))
        return mean.view(len(input_ids), -1, mean.shape[-1])

    def decode_logits(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (batch, chunks, latent) → logits (batch, chunks · chunk_size, vocab), the omni token excluded."""
        hidden_states = self.decode_hidden(latents.flatten(0, 1).to(self.lm_head.weight.dtype))
        return self._token_logits(hidden_states.reshape(len(latents), -1, hidden_states.shape[-1]), self._head())

    def _token_logits(self, hidden_states: torch.Tensor, head: torch.Tensor | nn.Module) -> torch.Tensor:
        logits = _apply_head(head, hidden_states)
        omni = torch.tensor([self.config.omni_token_id], device=logits.device)
        return logits.index_fill(-1, omni, torch.finfo(logits.dtype).min)

    def decode(
        self, latents: torch.Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.LongTensor:
        """latents (batch, chunks, latent) → ids (batch, chunks · chunk_size); greedy at temperature 0."""
        hidden_states = self.decode_hidden(latents.flatten(0, 1).to(self.lm_head.weight.dtype))
        hidden_states = hidden_states.reshape(len(latents), -1, hidden_states.shape[-1])
        return self.read_tokens(hidden_states, self._head(), temperature, generator)

    def read_tokens(
        self,
        hidden_states: torch.Tensor,
        head: torch.Tensor | nn.Module,
        temperature: float,
        generator: torch.Generator | None,
    ) -> torch.LongTensor:
        """Hidden states (batch, tokens, width) and a head (vocab, width) → ids (batch, tokens), never the omni token."""
        pieces = []
        # 1024 tokens at a time bound the logits to a few hundred megabytes at a 50k vocabulary.
        for part in hidden_states.split(max(1, 1024 // max(1, len(hidden_states))), dim=1):
            pieces.append(sample_tokens(self._token_logits(part, head), temperature, generator))
        return torch.cat(pieces, dim=1)


def _apply_head(head: torch.Tensor | nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Hidden states (..., width) → logits (..., vocab), of a head given as a module or as its rows."""
    return head(hidden_states) if isinstance(head, nn.Module) else nn.functional.linear(hidden_states, head)
