"""Trainers of the two TokCom stages: the VAE, then the denoiser on its latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..metrics.denoising import denoising_metrics
from ..metrics.reconstruction import reconstruction_metrics
from ..models.chunked_cross_entropy import chunked_cross_entropy
from ..models.flow_matching import EARLIEST, interpolate, sample_times, velocity_weight
from .base import CompressionTrainer, CompressionTrainingArguments
from .samples import SampleTableCallback


@dataclass
class _TokComTrainingArguments(CompressionTrainingArguments):
    sample_every: float = field(
        default=1.0,
        metadata={"help": "Print and log a table of samples every so many epochs; 0 never."},
    )
    num_samples: int = field(default=3, metadata={"help": "Rows of the sample tables."})
    metric_rows: int = field(
        default=64, metadata={"help": "Held-out rows on which accuracies are measured at every evaluation."}
    )


@dataclass
class TokComVAETrainingArguments(_TokComTrainingArguments):
    """Arguments of the VAE stage. Documented: 5 epochs, learning rate 1e-4."""

    eval_noise_levels: list[float] = field(
        default_factory=lambda: [0.0, 0.5],
        metadata={"help": "Latent noise (in standard deviations) at which held-out accuracy is measured."},
    )


@dataclass
class DenoiserTrainingArguments(_TokComTrainingArguments):
    """Arguments of the denoiser stage. Documented: 10 epochs, learning rate 3e-5, batch 8."""

    eval_times: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        metadata={"help": "Times t (0 noise, 1 clean) at which held-out denoising accuracy is measured."},
    )
    sample_steps: int = field(default=16, metadata={"help": "Flow steps of the samples shown during training."})


class _TokComTrainer(CompressionTrainer):
    """Loss-only evaluation plus accuracies on a fixed part of the held-out rows, and sample tables."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.sample_every > 0:
            self.add_callback(SampleTableCallback(self))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = [dataloader.dataset[i] for i in range(min(self.args.metric_rows, len(dataloader.dataset)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        mask = torch.stack([torch.as_tensor(row["attention_mask"]) for row in rows])
        metrics = self.accuracies(ids, mask)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        raise TypeError(f"{type(self).__name__} must say which accuracies it measures.")


class TokComVAETrainer(_TokComTrainer):
    """Trains a `TokComVAE` on rows of `input_ids` and `attention_mask`; padding is not part of the loss."""

    def __init__(self, model=None, *args, **kwargs):
        if model is not None and model.config.nearest_decoder:
            # The head belongs to the denoiser's token distributions; nothing here has a gradient for it.
            model.lm_head.requires_grad_(False)
        super().__init__(model, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model(input_ids=inputs["input_ids"], labels=labels)
        if model.training:
            values = {"batch_loss": outputs.loss, "reconstruction_loss": outputs.reconstruction_loss}
            if outputs.kl_loss is not None:
                values["kl_loss"] = outputs.kl_loss
            self.log_scalars("vae", values)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return reconstruction_metrics(self.unwrapped_model, ids, mask, tuple(self.args.eval_noise_levels))

    @torch.no_grad()
    def sample_table(self, decode_text: Callable[[torch.Tensor], list[str]]) -> dict[str, list[str]]:
        """Held-out text beside its reconstruction."""
        rows = [self.eval_dataset[i] for i in range(min(self.args.num_samples, len(self.eval_dataset)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).to(self.args.device)
        back = self.unwrapped_model.decode(self.unwrapped_model.encode(ids))
        accuracy = [f"{value:.4f}" for value in (back == ids).float().mean(dim=1).tolist()]
        return {"text": decode_text(ids), "reconstruction": decode_text(back), "token accuracy": accuracy}


class DenoiserTrainer(_TokComTrainer):
    """Trains the denoiser of a `TokComModel`, whose VAE stays frozen, on `LatentRows`.

    Noise and times of a batch depend only on seed, step and position in the global batch: a resumed run and a run on more
    processes see the same ones.
    """

    def __init__(self, model=None, *args, **kwargs):
        if model is not None:
            model.vae.requires_grad_(False)
            if model.config.train_embeddings:
                model.vae.token_latents.requires_grad_(True)
                model.vae.lm_head.requires_grad_(True)
        super().__init__(model, *args, **kwargs)
        self._draw = (-1, 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokcom = self.unwrapped_model
        config = tokcom.config
        # Stored latents are those of the tables as they were.
        latents = tokcom.encode(inputs["input_ids"]) if config.train_embeddings else inputs["latents"]
        clean = tokcom.standardize(latents)
        chunk = config.vae.chunk_size
        mask = inputs["attention_mask"].view(len(clean), -1, chunk).any(dim=-1)
        context, ids = clean, inputs["input_ids"]
        if config.noise_copies > 1:
            clean, mask, ids = (value.repeat_interleave(config.noise_copies, 0) for value in (clean, mask, ids))
        generator = self._generator(model.training)
        plan = self._plan(clean.shape[1], config, generator)
        t = self._local(len(clean), lambda count: sample_times(
            (count, plan["blocks"]), config.time_distribution, config.time_mean, config.time_std, generator
        )).to(clean)  # fmt: skip
        noise = self._local(len(clean), lambda count: torch.randn((count, *clean.shape[1:]), generator=generator))
        noise = (noise * config.noise_std).to(clean)
        index = plan["index"].to(clean.device)
        if plan["clean_first"]:
            t[:, 0] = 1.0
        times = t[:, index]
        arguments: dict[str, Any] = {"attention_mask": mask.long(), "block_index": index}
        entry_times, asked = times, None
        if config.token_time_std > 0:
            arguments["token_times"], asked, t = self._token_times(times, config, generator)
            entry_times = tokcom.per_entry(arguments["token_times"])
        x_t = interpolate(noise, clean, entry_times)
        counted = mask & (times < 1.0)
        if plan["context"]:
            arguments["context"] = context
        condition = None
        draws = torch.rand((), generator=generator).item()
        if config.denoiser.self_conditioning and draws < config.self_conditioning_rate:
            with torch.no_grad():
                condition = model(x_t, t, **arguments).clean_latents.detach()
            condition = torch.where((times < 1.0).unsqueeze(-1), condition, clean.detach())
        if config.clean_latents == "posterior_mean" and config.mse_weight == 0:
            arguments["only_tokens"] = True
        share, unseen = None, None
        if asked is not None:
            asked = asked & counted.unsqueeze(-1)
            share = asked.sum() / (counted.sum() * chunk).clamp(min=1)
            # With no token to ask for, one of them still puts every parameter into the graph, with no weight.
            asked.view(-1)[0] |= ~asked.any()
            arguments["token_mask"] = asked
            unseen = arguments["token_times"][asked] <= EARLIEST
        outputs = model(x_t, t, self_condition=condition, **arguments)
        loss, parts = self.losses(
            tokcom, outputs.clean_latents, clean, times, counted, ids, outputs.token_hidden, asked, share, unseen
        )
        if model.training:
            self.log_scalars("diffusion", parts)
        return (loss, outputs) if return_outputs else loss

    def _token_times(
        self, times: torch.Tensor, config, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Times of the tokens (batch, chunks, chunk), spread around their chunks' (batch, chunks); clean stays clean.

        Returns:
            the times, which tokens the loss asks for (None for all), and the chunks' times: of a chunk cut in two the share
            of its clean tokens, which is what the sampler "commit" says.
        """
        shape, copies, chunk_times = (times.shape[1], config.vae.chunk_size), config.noise_copies, times
        spread = self._local(len(times), lambda count: torch.randn((count, *shape), generator=generator)).to(times)
        own = torch.sigmoid(torch.logit(times, eps=1e-6).unsqueeze(-1) + config.token_time_std * spread)
        asked = own < config.token_loss_max_time if config.token_loss_max_time < 1 else None
        if config.token_cut_rate > 0:
            rows = len(times) // copies
            draws = self._local(rows, lambda count: torch.rand((count, shape[0], 2), generator=generator)).to(times)
            draws = draws.repeat_interleave(copies, 0)
            copy = torch.arange(copies, device=times.device).repeat(rows)[:, None, None]
            cut = ((draws[..., :1] * shape[1]).long() + copy) % shape[1]
            is_cut = draws[..., 1:] < config.token_cut_rate
            chunk_times = torch.where(
                (is_cut & (times < 1.0).unsqueeze(-1)).squeeze(-1), cut.squeeze(-1) / shape[1], times
            )
            place = torch.arange(shape[1], device=times.device)
            own = torch.where(is_cut, (place < cut).to(own), own)
            if asked is not None or copies > 1:
                asked = torch.ones_like(own, dtype=torch.bool) if asked is None else asked
                # The other copies ask for the other tokens; of chunks without a cut too, or those would count for more.
                one, all_behind = (asked | is_cut) & (place == cut), torch.where(is_cut, place >= cut, asked)
                asked = one if copies > 1 else all_behind
        own = torch.where((times < 1.0).unsqueeze(-1), own.clamp(EARLIEST, 1 - EARLIEST), times.unsqueeze(-1))
        return own, asked, chunk_times

    def losses(
        self,
        tokcom,
        predicted,
        clean,
        times,
        counted,
        input_ids,
        token_hidden=None,
        asked=None,
        share=None,
        unseen=None,
    ) -> tuple[torch.Tensor, dict]:
        """Weighted sum of the velocity-weighted squared error of x1 and of the cross-entropy of its tokens.

        predicted, clean: (batch, chunks, latent), predicted None where only tokens are; times, counted: (batch, chunks);
        input_ids: (batch, length); token_hidden: (batch, chunks, chunk, hidden) where the denoiser predicts tokens itself,
        and not through the decoder; asked: (batch, chunks, chunk) where not all tokens are, then token_hidden is theirs,
        (tokens, hidden), and share what they are of all counted tokens: the loss of the others is zero, while the part
        "batch_ce_loss" is the mean over those asked for; unseen: (tokens,), those of them that are all noise.
        """
        config = tokcom.config
        # A row of padding behind its clean prefix counts nowhere: sums over at least one position, never a mean of none.
        count = counted.sum().clamp(min=1)
        loss = (predicted if token_hidden is None else token_hidden).float().sum() * 0.0
        parts: dict[str, torch.Tensor] = {}
        if predicted is not None:
            error = ((predicted.float() - clean.float()) ** 2).mean(dim=-1) * counted
            parts["batch_mse_loss"] = error.sum() / count
        if config.mse_weight > 0:
            weighted = (velocity_weight(times) * error).sum() / count
            loss = loss + config.mse_weight * weighted
            parts["batch_velocity_loss"] = weighted
        if config.cross_entropy_weight > 0 and bool(counted.any()):
            labels = input_ids.view(*counted.shape, -1)
            if asked is not None:
                entropy = tokcom.token_cross_entropy(token_hidden, labels[asked], unseen)
            elif token_hidden is not None:
                entropy = tokcom.token_cross_entropy(token_hidden[counted].flatten(0, 1), labels[counted].flatten())
            else:
                latents = tokcom.unstandardize(predicted)[counted]
                hidden = tokcom.vae.decode_hidden(latents.to(tokcom.vae.lm_head.weight.dtype)).flatten(0, 1)
                entropy = chunked_cross_entropy(hidden, tokcom.vae.decoder_head(), labels[counted].flatten())
            parts["batch_ce_loss"] = entropy
            loss = loss + config.cross_entropy_weight * (entropy if share is None else entropy * share)
        return loss, parts

    def _plan(self, chunks: int, config, generator: torch.Generator) -> dict[str, Any]:
        """Draws how this batch is cut: which positions share a time, and whether the first of them stay clean."""
        if config.denoiser.attention == "block_causal":
            draw = torch.randint(len(config.block_sizes), (), generator=generator).item()
            size = min(config.block_sizes[int(draw)] or chunks, chunks)
            # Larger blocks begin anywhere, behind a first one of any length, which with single chunks would be lost work.
            first = int(torch.randint(chunks, (), generator=generator).item()) if size > 1 else 0
            position = torch.arange(chunks)
            index = torch.where(position < first, 0, (position - first) // size + int(first > 0))
            return {"index": index, "blocks": int(index[-1]) + 1, "clean_first": False, "context": True}
        prefix = 0
        if config.clean_prefix and torch.rand((), generator=generator).item() >= config.prefix_dropout:
            prefix = int(torch.randint(chunks, (), generator=generator).item())
        if config.independent_times:
            index = (torch.arange(chunks) - prefix + int(prefix > 0)).clamp(min=0)
        else:
            index = (torch.arange(chunks) >= prefix).long() if prefix else torch.zeros(chunks, dtype=torch.long)
        return {"index": index, "blocks": int(index[-1]) + 1, "clean_first": prefix > 0, "context": False}

    def _generator(self, training: bool) -> torch.Generator:
        """Seeded by (seed, optimizer step, micro-batch); evaluation repeats the same draws every time."""
        step = self.state.global_step if training else -2
        self._draw = (step, self._draw[1] + 1 if self._draw[0] == step else 0)
        seed = (self.args.seed * 1_000_003 + (step + 2)) * 1_009 + self._draw[1]
        return torch.Generator().manual_seed(seed % 2**63)

    def _local(self, rows: int, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Draws for the global batch and returns this process's rows of it."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return draw(rows * world)[rank * rows : (rank + 1) * rows]

    def evaluation_loop(self, *args, **kwargs):
        self._draw = (-1, 0)
        return super().evaluation_loop(*args, **kwargs)

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return denoising_metrics(self.unwrapped_model, ids, mask, tuple(self.args.eval_times))

    @torch.no_grad()
    def sample_table(self, decode_text: Callable[[torch.Tensor], list[str]]) -> dict[str, list[str]]:
        """Generations, and denoised held-out text beside the original."""
        model, count = self.unwrapped_model, self.args.num_samples
        rows = [self.eval_dataset[i] for i in range(min(count, len(self.eval_dataset)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).to(self.args.device)
        generator = torch.Generator().manual_seed(self.args.seed)
        steps, chunks = self.args.sample_steps, ids.shape[1] // model.config.vae.chunk_size
        generated = model.generate(None, chunks, num_steps=steps, batch_size=len(rows), generator=generator)
        denoised = model.denoise_reconstruct(ids, 0.5, steps, generator=generator)
        return {
            "text": decode_text(ids),
            "denoised from t=0.5": decode_text(denoised),
            "generated": decode_text(generated),
        }
