"""TokComVAE: chunks of text tokens to latent vectors and back.

encoder: ids (batch, chunk) → bidirectional transformer → last position → z (batch, latent)
decoder: [z, omni × (chunk − 1)] → bidirectional transformer → tied head → logits (batch, chunk, vocab)

The chunks of a sequence are rows of the batch, so attention is chunk × chunk. The loss never holds all logits at once.
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
from .shared_tensor_checks import check_floats, check_ids
from .tokcom_hint import HINT_WEIGHT, Hint

# Free bits: the KL of a latent dimension costs nothing below this number of nats.
FREE_NATS = 0.5


@dataclass
class TokComVAEOutput(ModelOutput):
    """Output of `TokComVAE`.

    loss: with `labels`, reconstruction loss + kl_weight · KL, in training + 0.3 · loss of hinted latents (scalar).
    logits: (batch, chunk, vocab), where `return_logits` asks for them.
    latents: (batch, latent).
    reconstruction_loss, kl_loss: nats per token and nats per chunk.
    hidden_states: with `output_hidden_states`, (batch, chunk, hidden) before the encoder's first layer and after each layer,
        the last one normalised, then those of the decoder.
    attentions: with `output_attentions`, (batch, heads, chunk, chunk) of the encoder's layers, then of the decoder's.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ChunkTransformer(nn.Module):
    """Transformer over the positions of one chunk, with a final norm."""

    def __init__(self, config: TokComVAEConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Block(config) for _ in range(num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for block in self.layers:
            # A mark for `_init_weights`, which transformers calls for each module that holds weights.
            block.self_attn.o_proj.zero_init = block.mlp.down_proj.zero_init = config.zero_init_residual

    def forward(self, hidden_states: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """(batch, chunk, hidden) → the same after all layers and the norm; `record` keeps what each layer sees."""
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
    """Autoencoder of token chunks, variational with `variational=True`."""

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
        all_positions = config.chunk_projection == "all"
        width = config.hidden_size * (config.chunk_size if all_positions else 1)
        projected = all_positions or config.latent_size != config.hidden_size or config.variational
        self.latent_proj = nn.Linear(width, config.latent_size) if projected else nn.Identity()
        self.log_variance_proj = nn.Linear(width, config.latent_size) if config.variational else None
        self.decoder_proj = nn.Linear(config.latent_size, width) if projected else nn.Identity()
        self.hint = Hint(config) if config.hint_tokens else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "zero_init", False):
            init.zeros_(module.weight)
        std = self.config.embedding_initializer_range
        if std is not None and (isinstance(module, nn.Embedding) or module is self.lm_head):
            init.normal_(module.weight, std=std)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # only an embedding will do
        self.embed_tokens = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; `new_num_tokens` counts the omni token's row, too: `len(tokenizer) + 1`.

        An omni token in the last row moves to the new last row, so that the rows before it are the tokenizer's; the token
        that gets its former row starts as a copy of it. The tied head and the config follow.

        Raises:
            ValueError: fewer than two rows, a row of the omni token that would be dropped, or offloaded weights; nothing
                is changed.
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
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokComVAEOutput | tuple:
        """Reconstructs chunks.

        Args:
            input_ids: (batch, length), a multiple of the chunk size; each chunk becomes a row of the output.
            labels: ids to predict, same shape; -100 does not count.
            return_logits: whether to compute logits; None computes them where there are no labels.
            output_hidden_states, output_attentions: return hidden states, or attention weights, of all layers; None takes
                the config's value.
            return_dict: False returns a tuple; None takes the config's value.

        Raises:
            ValueError: the length is no multiple of the chunk size, or attention weights are wanted that the attention
                implementation does not compute.
        """
        record = LayerRecord.asked(self.config, output_hidden_states, output_attentions)
        chunks = self.fold(input_ids)
        seen = chunks
        if self.training and self.config.token_dropout > 0:
            dropped = torch.rand(chunks.shape, device=chunks.device) < self.config.token_dropout
            seen = chunks.masked_fill(dropped, self.config.omni_token_id)
        mean, log_variance = self.posterior(seen, record)
        latents, kl_loss = mean, None
        if log_variance is not None:
            kl = 0.5 * (mean.float() ** 2 + log_variance.exp() - 1.0 - log_variance)
            kl_loss = kl.mean(dim=0).clamp(min=FREE_NATS).sum()
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
                shifted = self.hint.noisy_latents(input_ids, latents, self.embed_tokens)
                hinted = self.cross_entropy(self.decode_hidden(shifted), labels[:, self.config.hint_tokens :])
                loss = loss + HINT_WEIGHT * hinted
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

    def fold(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, length) → chunks (batch · length / chunk, chunk)."""
        chunk = self.config.chunk_size
        check_ids(input_ids, self.config.vocab_size)
        if input_ids.shape[-1] % chunk:
            raise ValueError(
                f"The number of tokens must be a multiple of chunk_size={chunk}, got {input_ids.shape[-1]}."
            )
        return input_ids.reshape(-1, chunk)

    def posterior(
        self, chunks: torch.Tensor, record: LayerRecord | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids (batch, chunk) → mean (batch, latent) and, if `variational`, the float32 log-variance (batch, latent)."""
        hidden_states = self.encoder(self.embed_tokens(chunks), record)
        encoded = hidden_states.flatten(1) if self.config.chunk_projection == "all" else hidden_states[:, -1]
        mean = self.latent_proj(encoded)
        if self.config.fixed_norm:
            mean = nn.functional.rms_norm(mean.float(), mean.shape[-1:], eps=self.config.rms_norm_eps).to(
                encoded.dtype
            )
        if self.log_variance_proj is None:
            return mean, None
        return mean, self.log_variance_proj(encoded).float().clamp(-10.0, 4.0)

    def _perturb(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, latent), in training with the noise of `latent_noise`."""
        if not self.training or self.config.latent_noise == 0:
            return latents
        scale = latents.detach().float().std(dim=0, unbiased=False) if len(latents) > 1 else latents.new_ones(())
        level = torch.rand(len(latents), 1, device=latents.device) * self.config.latent_noise
        return latents + (torch.randn_like(latents, dtype=torch.float32) * level * scale).to(latents.dtype)

    def decode_hidden(self, latents: torch.Tensor, record: LayerRecord | None = None) -> torch.Tensor:
        """latents (batch, latent) → hidden states before the head (batch, chunk, hidden)."""
        if self.config.chunk_projection == "all":
            shape = (len(latents), self.config.chunk_size, self.config.hidden_size)
            return self.decoder(self.decoder_proj(latents).view(shape), record)
        # The embedding is called as a module, because an offloaded weight is on its device only during the forward.
        omni = self.embed_tokens(torch.tensor([self.config.omni_token_id], device=latents.device))
        query = omni.expand(len(latents), self.config.chunk_size - 1, -1)
        return self.decoder(torch.cat([self.decoder_proj(latents).unsqueeze(1), query], dim=1), record)

    def cross_entropy(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per token: hidden states (…, hidden), labels (…) of which -100 does not count."""
        hidden_states, labels = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
        if type(self.lm_head) is not nn.Linear or hasattr(self.lm_head, "_hf_hook"):
            # The head is called as a module: only in its forward is an offloaded weight on its device, and an adapter added.
            counted = labels != -100
            logits = self.lm_head(hidden_states[counted]).float()
            return nn.functional.cross_entropy(logits, labels[counted], reduction="sum") / counted.sum().clamp(min=1)
        return chunked_cross_entropy(hidden_states, self.lm_head.weight, labels)

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ids (batch, length) → latents (batch, length / chunk, latent), the posterior means."""
        mean, _ = self.posterior(self.fold(input_ids))
        return mean.view(len(input_ids), -1, mean.shape[-1])

    def decode_logits(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (batch, chunks, latent) → logits (batch, chunks · chunk_size, vocab), the omni token's lowest."""
        hidden_states = self.decode_hidden(latents.flatten(0, 1).to(self.lm_head.weight.dtype))
        logits = self.lm_head(hidden_states.reshape(len(latents), -1, hidden_states.shape[-1]))
        omni = torch.tensor([self.config.omni_token_id], device=logits.device)
        return logits.index_fill(-1, omni, torch.finfo(logits.dtype).min)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (batch, chunks, latent) → the likeliest ids (batch, chunks · chunk_size), never the omni token."""
        check_floats(latents, "latents", "(batch, chunks, latent)", (None, None, self.config.latent_size))
        # Logits of 1024 tokens at a time take 200 MB at a vocabulary of 50,000.
        at_once = max(1, 1024 // (self.config.chunk_size * max(1, len(latents))))
        return torch.cat([self.decode_logits(part).argmax(dim=-1) for part in latents.split(at_once, dim=1)], dim=1)
