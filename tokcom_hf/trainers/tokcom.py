"""Trainers of the two TokCom stages: the VAE, then the denoiser on its latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..metrics.denoising import denoising_metrics
from ..metrics.reconstruction import reconstruction_metrics
from ..models.flow_matching import EARLIEST, interpolate, sample_times
from .base import CompressionTrainer, CompressionTrainingArguments
from .denoiser_loss import NoisedBatch, denoiser_loss
from .noise_plan import draw_token_times, plan_blocks
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
    """Evaluation adds accuracies on a fixed part of the held-out rows, and sample tables."""

    data_columns = ("input_ids", "attention_mask", "latents")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.sample_every > 0:
            self.add_callback(SampleTableCallback(self))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            logits = None if prediction_loss_only else self.token_logits(outputs, len(inputs["input_ids"]))
        if logits is None:
            return loss.detach(), None, None
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return loss.detach(), logits.float(), labels

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        """Predictions for `compute_metrics`, `(rows, length, vocab)`, of what `compute_loss` returned."""
        raise TypeError(f"{type(self).__name__} must say what it predicts.")

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

    arguments_class = TokComVAETrainingArguments

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

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        return self.unwrapped_model.decode_logits(outputs.latents.view(rows, -1, outputs.latents.shape[-1]))

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

    arguments_class = DenoiserTrainingArguments

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
        plan = plan_blocks(clean.shape[1], config, generator)
        t = self._local(len(clean), lambda count: sample_times(
            (count, plan.blocks), config.time_distribution, config.time_mean, config.time_std, generator
        )).to(clean)  # fmt: skip
        noise = self._local(len(clean), lambda count: torch.randn((count, *clean.shape[1:]), generator=generator))
        noise = (noise * config.noise_std).to(clean)
        index = plan.index.to(clean.device)
        if plan.clean_first:
            t[:, 0] = 1.0
        times = t[:, index]
        counted = mask & (times < 1.0)
        arguments: dict[str, Any] = {"attention_mask": mask.long(), "block_index": index}
        entry_times, asked = times, None
        if config.token_time_std > 0:
            arguments["token_times"], asked, t = draw_token_times(times, config, generator, self._local)
            entry_times = tokcom.per_entry(arguments["token_times"])
        x_t = interpolate(noise, clean, entry_times)
        if plan.context:
            arguments["context"] = context
        condition = None
        draws = torch.rand((), generator=generator).item()
        if config.denoiser.self_conditioning and draws < config.self_conditioning_rate:
            with torch.no_grad():
                condition = model(x_t, t, **arguments).clean_latents.detach()
            condition = torch.where((times < 1.0).unsqueeze(-1), condition, clean.detach())
        if config.clean_latents == "posterior_mean" and config.mse_weight == 0:
            arguments["only_tokens"] = True
        batch = NoisedBatch(clean, times, counted, ids)
        if asked is not None:
            arguments["token_mask"] = batch.ask(asked, unseen=arguments["token_times"] <= EARLIEST)
        outputs = model(x_t, t, self_condition=condition, **arguments)
        loss, parts = denoiser_loss(tokcom, outputs, batch)
        if model.training:
            self.log_scalars("diffusion", parts)
        return (loss, outputs) if return_outputs else loss

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

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        """The tokens of the clean latents that were predicted from the batch's noisy ones."""
        if outputs.clean_latents is None:
            if self.compute_metrics is not None:
                raise ValueError(
                    "This model predicts tokens without latents, of which compute_metrics could be given nothing; set "
                    "mse_weight above 0, or leave compute_metrics out."
                )
            return None
        copies = len(outputs.clean_latents) // rows
        model = self.unwrapped_model
        return model.vae.decode_logits(model.unstandardize(outputs.clean_latents[::copies]))

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
