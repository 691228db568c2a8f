"""Trainers of the two TokCom stages: the VAE, then the denoiser on its latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evaluation.tokcom_denoising import denoising_metrics
from ..evaluation.tokcom_reconstruction import reconstruction_metrics
from ..models.tokcom_flow_matching import training_times
from ..models.tokcom_objective import block_shape
from .base import CompressionTrainer, CompressionTrainingArguments
from .epoch_losses import EpochLossCallback
from .tokcom_samples import SampleTableCallback

# Name in the trackers -> column -> texts.
Tables = dict[str, dict[str, list[str]]]


@dataclass
class TokComTrainingArguments(CompressionTrainingArguments):
    """Arguments of every TokCom stage."""

    sample_every: float = field(
        default=1.0,
        metadata={"help": "Print and log a table of samples every so many epochs; 0 never."},
    )
    num_samples: int = field(default=2, metadata={"help": "Rows of the sample tables."})
    metric_rows: int = field(
        default=64, metadata={"help": "Held-out rows on which accuracies are measured at every evaluation."}
    )


@dataclass
class TokComVAETrainingArguments(TokComTrainingArguments):
    """Arguments of the VAE stage. Documented: 5 epochs, learning rate 1e-4."""

    eval_noise_levels: list[float] = field(
        default_factory=lambda: [0.0, 0.5],
        metadata={"help": "Latent noise (in standard deviations) at which held-out accuracy is measured."},
    )
    random_chunks: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training chunks that are replaced by uniformly random tokens, drawn anew in each step: "
            "so tokens that the text hardly holds are learned too."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.random_chunks <= 1.0:
            raise ValueError(f"random_chunks is a share in [0, 1], got {self.random_chunks}.")


@dataclass
class DenoiserTrainingArguments(TokComTrainingArguments):
    """Arguments of the denoiser stage. Documented: 10 epochs, learning rate 3e-5, batch 8."""

    eval_times: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        metadata={"help": "Times t (0 noise, 1 clean) at which held-out denoising accuracy is measured."},
    )
    sample_steps: int = field(default=8, metadata={"help": "Flow steps of the samples shown during training."})


class TokComTrainer(CompressionTrainer):
    """Evaluation adds accuracies on a fixed part of the held-out rows, and sample tables.

    The trackers get, under the name of the stage: `train_loss` and `learning_rate` after each epoch, `val_loss` and
    `best_val_loss` after each evaluation, and the batch losses.
    """

    data_columns = ("input_ids", "attention_mask", "latents")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch_losses = EpochLossCallback(self)
        self.add_callback(self.epoch_losses)
        if self.args.sample_every > 0:
            self.add_callback(SampleTableCallback(self))

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # Trainer divides a micro-batch's loss by their number.
        self.epoch_losses.add(loss * self.current_gradient_accumulation_steps)
        return loss

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


class TokComVAETrainer(TokComTrainer):
    """Trains a `TokComVAE` on rows of `input_ids` and `attention_mask`; padding is not part of the loss."""

    arguments_class = TokComVAETrainingArguments
    stage = "vae"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        if model.training and self.args.random_chunks > 0:
            ids = self.with_random_chunks(ids)
        outputs = model(input_ids=ids, labels=ids.masked_fill(inputs["attention_mask"] == 0, -100))
        if model.training:
            values = {"batch_loss": outputs.loss, "reconstruction_loss": outputs.reconstruction_loss}
            if outputs.kl_loss is not None:
                values["kl_loss"] = outputs.kl_loss
            self.log_scalars("vae", values)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def with_random_chunks(self, ids: torch.LongTensor) -> torch.LongTensor:
        """Ids (rows, length) with `random_chunks` of their chunks replaced by random tokens, never the omni token."""
        config = self.unwrapped_model.config
        drawn = torch.randint(config.vocab_size - 1, ids.shape, device=ids.device)
        drawn += drawn >= config.omni_token_id
        chosen = torch.rand(len(ids), ids.shape[1] // config.chunk_size, device=ids.device) < self.args.random_chunks
        return torch.where(chosen.repeat_interleave(config.chunk_size, 1), drawn, ids)

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        return self.unwrapped_model.decode_logits(outputs.latents.view(rows, -1, outputs.latents.shape[-1]))

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return reconstruction_metrics(self.unwrapped_model, ids, mask, tuple(self.args.eval_noise_levels))

    @torch.no_grad()
    def sample_tables(self, decode_text: Callable[[torch.Tensor], list[str]]) -> Tables:
        """Held-out text beside its reconstruction."""
        rows = [self.eval_dataset[i] for i in range(min(self.args.num_samples, len(self.eval_dataset)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).to(self.args.device)
        back = self.unwrapped_model.decode(self.unwrapped_model.encode(ids))
        columns = {"text": decode_text(ids), "reconstruction": decode_text(back)}
        return {"vae/reconstructions": columns | {"token accuracy": accuracy_column(back, ids)}}


class FlowTrainer(TokComTrainer):
    """Draws the noise of a stage that trains a flow.

    Noise and times of a batch depend only on seed, step and position in the global batch: a resumed run and a run on more
    processes see the same ones.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._draw = (-1, 0)

    def noise_generator(self, training: bool) -> torch.Generator:
        """Seeded by (seed, optimizer step, micro-batch); evaluation repeats the same draws every time."""
        step = self.state.global_step if training else -2
        self._draw = (step, self._draw[1] + 1 if self._draw[0] == step else 0)
        seed = (self.args.seed * 1_000_003 + (step + 2)) * 1_009 + self._draw[1]
        return torch.Generator().manual_seed(seed % 2**63)

    def local_rows(self, rows: int, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Draws for the rows of the global batch and returns this process's, (rows, ...)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return draw(rows * world)[rank * rows : (rank + 1) * rows].to(self.args.device)

    def evaluation_loop(self, *args, **kwargs):
        self._draw = (-1, 0)
        return super().evaluation_loop(*args, **kwargs)


def draw_blocks(config: Any, length: int, generator: torch.Generator) -> dict[str, int]:
    """Where the blocks of a batch start and how long they are: `offset` and `block_size` of `TokComModel.forward`."""
    if config.context is None:
        return {"offset": 0, "block_size": 0}
    chunk, chunks = config.vae.chunk_size, length // config.vae.chunk_size
    size = config.block_sizes[int(torch.randint(len(config.block_sizes), (), generator=generator))]
    # Blocks start at any token, so that a prompt of any length is one seen in training. The block of all that is left also
    # follows prompts of any length up to half of the row.
    room = length // 2 if size == 0 else min(size, chunks) * chunk
    offset = int(torch.randint(room, (), generator=generator))
    if size and length - offset < size * chunk:
        offset, size = 0, min(size, chunks)
    return {"offset": offset, "block_size": size}


def evaluation_blocks(config: Any, length: int) -> dict[str, int]:
    """Blocks of the size that is generated, which cover a whole row: of one chunk where they would leave some out."""
    chunks = length // config.vae.chunk_size
    size = min(config.block_size, chunks)
    return {"offset": 0, "block_size": 1 if size and chunks % size else size}


class DenoiserTrainer(FlowTrainer):
    """Trains denoiser and context of a `TokComModel`, whose VAE stays frozen.

    Rows hold `input_ids` and `attention_mask`; `latents` (`LatentRows`) save encoding them at every step, which only a model
    without a context can use: the blocks of the other start anywhere.
    """

    arguments_class = DenoiserTrainingArguments
    stage = "diffusion"

    def __init__(self, model=None, *args, **kwargs):
        if model is not None:
            model.vae.requires_grad_(False)
        super().__init__(model, *args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        config, ids = self.unwrapped_model.config, inputs["input_ids"]
        generator, rows = self.noise_generator(model.training), len(ids)
        blocks = evaluation_blocks(config, ids.shape[1])
        if model.training:
            blocks = draw_blocks(config, ids.shape[1], generator)
        shape = block_shape(config, ids.shape[1], **blocks)
        arguments: dict[str, Any] = {
            "noise": self.local_rows(rows, lambda n: torch.randn((n, *shape), generator=generator)) * config.noise_std,
            "timesteps": self.local_rows(rows, lambda n: training_times(
                (n, shape[0]), config.time_distribution, config.time_mean, config.time_std, generator
            )),
        }  # fmt: skip
        if config.context is None:
            arguments["latents"] = inputs.get("latents")
        elif config.context_dropout > 0:
            arguments["context_mask"] = self.local_rows(
                rows, lambda n: torch.rand((n, shape[0]), generator=generator) >= config.context_dropout
            )
        if config.clean_prefix and torch.rand((), generator=generator).item() >= config.prefix_dropout:
            prefix = int(torch.randint(shape[1], (), generator=generator))
            times = arguments["timesteps"].unsqueeze(-1).repeat(1, 1, shape[1])
            arguments["timesteps"] = times.index_fill(-1, torch.arange(prefix, device=times.device), 1.0)
        if config.denoiser.self_conditioning:
            draw = torch.rand((), generator=generator).item()
            arguments["self_conditioned"] = draw < config.self_conditioning_rate
        outputs = model(ids, inputs["attention_mask"], **blocks, **arguments)
        parts = {name: outputs[key].detach() for name, key in LOSS_PARTS.items() if outputs.get(key) is not None}
        if model.training:
            self.log_scalars("diffusion", parts)
        else:
            for name, value in parts.items():
                # As Trainer's own loss: each batch counts by its rows.
                counted = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)]) * rows
                self._parts.setdefault(name, []).append(counted)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._parts = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._parts.items():
            total, rows = self.accelerator.reduce(torch.stack(values).sum(dim=0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_{name.removeprefix('batch_')}"] = total / rows
        return output

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        """The tokens of the clean latents that were predicted from the batch's noisy ones, of the first noise draw."""
        model = self.unwrapped_model
        blocks = outputs.clean_latents.shape[1] // model.config.noise_draws
        return model.vae.decode_logits(model.unstandardize(outputs.clean_latents[:, :blocks].flatten(1, 2)))

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return denoising_metrics(self.unwrapped_model, ids, mask, tuple(self.args.eval_times))

    @torch.no_grad()
    def sample_tables(self, decode_text: Callable[[torch.Tensor], list[str]]) -> Tables:
        """Generations, and denoised held-out text beside the original."""
        return flow_samples(self, self.unwrapped_model, decode_text, self.args.sample_steps)


# Name in the trackers -> field of `TokComOutput`. The documents name the first two.
LOSS_PARTS = {
    "batch_ce_loss": "cross_entropy_loss", "batch_mse_loss": "mse_loss", "batch_flow_loss": "flow_loss",
    "batch_next_token_loss": "next_token_loss", "batch_later_token_loss": "later_token_loss",
}  # fmt: skip


def flow_samples(trainer: Any, model: Any, decode_text: Callable[[torch.Tensor], list[str]], num_steps: int) -> Tables:
    """Sample tables of a `TokComModel`: text from nothing, and held-out text beside the same denoised."""
    args = trainer.args
    rows = [trainer.eval_dataset[i] for i in range(min(args.num_samples, len(trainer.eval_dataset)))]
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    chunks = ids.shape[1] // model.config.vae.chunk_size
    generated = model.generate(num_chunks=chunks, num_steps=num_steps, batch_size=len(rows), generator=generator)
    denoised = model.denoise_reconstruct(ids, 0.5, num_steps, generator=generator)
    compared = {"text": decode_text(ids), "denoised from t=0.5": decode_text(denoised)}
    return {
        f"{trainer.stage}/samples": {"generated": decode_text(generated)},
        f"{trainer.stage}/denoising": compared | {"token accuracy": accuracy_column(denoised, ids)},
    }


def accuracy_column(found: torch.LongTensor, ids: torch.LongTensor) -> list[str]:
    """Share of the tokens of each row that are right."""
    return [f"{value:.4f}" for value in (found == ids).float().mean(dim=1).tolist()]
