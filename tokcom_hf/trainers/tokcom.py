"""Trainers of the two TokCom stages: the VAE, then the denoiser on its latents."""

from collections.abc import Callable
from typing import Any

import torch

from ..evaluation.tokcom_denoising import denoising_metrics
from ..evaluation.tokcom_reconstruction import reconstruction_metrics
from ..models.tokcom_flow_matching import call_times, training_times
from ..models.tokcom_objective import block_shape, copies_of_blocks, stride_of_blocks
from .base import CompressionTrainer
from .epoch_losses import EpochLossCallback
from .tokcom_arguments import DenoiserTrainingArguments, TokComTrainingArguments, TokComVAETrainingArguments
from .tokcom_samples import SampleTableCallback, Tables, flow_samples, reconstruction_samples

__all__ = [
    "DenoiserTrainer",
    "DenoiserTrainingArguments",
    "FlowTrainer",
    "TokComTrainer",
    "TokComTrainingArguments",
    "TokComVAETrainer",
    "TokComVAETrainingArguments",
]
# Share of the batches without a clean prefix, with clean_prefix; and share of the batches in which the denoiser sees its own
# first prediction, with self_conditioning.
PREFIX_DROPOUT, SELF_CONDITIONING_RATE = 0.1, 0.5

# Name in the trackers -> field of `TokComOutput`. The documents name the first two.
LOSS_PARTS = {
    "batch_ce_loss": "cross_entropy_loss", "batch_mse_loss": "mse_loss", "batch_flow_loss": "flow_loss",
    "batch_next_token_loss": "next_token_loss", "batch_later_token_loss": "later_token_loss",
    "batch_told_loss": "told_loss",
}  # fmt: skip


class TokComTrainer(CompressionTrainer):
    """What the trainers of both stages share: accuracies on the first held-out rows, tables of samples, losses per epoch.

    Under the name of the stage the trackers get `train_loss` and `learning_rate` after each epoch, `val_loss` and
    `best_val_loss` after each evaluation, and the batch losses. Subclasses define what they predict (`token_logits`) and
    which accuracies they measure (`accuracies`).
    """

    args: TokComTrainingArguments
    arguments_class: type[TokComTrainingArguments] = TokComTrainingArguments
    data_columns = ("input_ids", "attention_mask", "latents")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch_losses = EpochLossCallback(self)
        self.add_callback(self.epoch_losses)
        if self.args.sample_every > 0:
            self.add_callback(SampleTableCallback(self))

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # Trainer divides the loss of a micro-batch by the number of micro-batches.
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
        """Logits `(rows, length, vocab)` for `compute_metrics`, from the outputs that `compute_loss` returned."""
        raise TypeError(f"{type(self).__name__} must define token_logits.")

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rows = [dataloader.dataset[i] for i in range(min(self.args.metric_rows, len(dataloader.dataset)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        mask = torch.stack([torch.as_tensor(row["attention_mask"]) for row in rows])
        metrics = self.accuracies(ids, mask)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        """Held-out accuracies by name, from ids and attention mask `(rows, length)`."""
        raise TypeError(f"{type(self).__name__} must define accuracies.")


class TokComVAETrainer(TokComTrainer):
    """Trains a `TokComVAE` on rows of `input_ids` and `attention_mask`; padding is not part of the loss."""

    args: TokComVAETrainingArguments
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

    def with_random_chunks(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(rows, length)` in which a share `random_chunks` of the chunks is random tokens, never the omni token."""
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
        return reconstruction_samples(self, self.unwrapped_model, decode_text)


class FlowTrainer(TokComTrainer):
    """What the trainers of a flow share: noise and times that depend on seed, step and row of the global batch alone.

    A resumed run and a run on several processes therefore draw the same noise and times.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._draw = (-1, 0)

    def noise_generator(self, training: bool) -> torch.Generator:
        """A generator seeded by seed, optimizer step and micro-batch; every evaluation repeats the same draws."""
        step = self.state.global_step if training else -2
        self._draw = (step, self._draw[1] + 1 if self._draw[0] == step else 0)
        seed = (self.args.seed * 1_000_003 + (step + 2)) * 1_009 + self._draw[1]
        return torch.Generator().manual_seed(seed % 2**63)

    def local_rows(self, rows: int, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Calls `draw` with the number of rows of the global batch and returns the `(rows, ...)` of this process."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return draw(rows * world)[rank * rows : (rank + 1) * rows].to(self.args.device)

    def evaluation_loop(self, *args, **kwargs):
        self._draw = (-1, 0)
        return super().evaluation_loop(*args, **kwargs)


def draw_blocks(config: Any, length: int, generator: torch.Generator) -> dict[str, int]:
    """Draws where the blocks of a batch start and how long they are: arguments of `TokComModel.forward`."""
    if config.context is None:
        return {"offset": 0, "block_size": 0}
    chunk, chunks = config.vae.chunk_size, length // config.vae.chunk_size
    # Each noise draw starts at another token of a chunk, and so has other chunks to learn from.
    shift = chunk // int(config.noise_draws) if config.noise_draws > 1 else 0
    stride = stride_of_blocks(config)
    size = config.block_sizes[int(torch.randint(len(config.block_sizes), (), generator=generator))]
    # Blocks start at any token, so that training sees prompts of every length. A block of size 0 covers the rest of the row
    # and starts in its first half.
    room = length // 2 if size == 0 else min(size * stride, chunks) * chunk
    offset = int(torch.randint(room, (), generator=generator))
    if size and length - offset - shift * (copies_of_blocks(config) - 1) < size * chunk:
        offset, size, shift = 0, min(size, chunks), 0
    return {"offset": offset, "block_size": size, "draw_shift": shift, "block_stride": stride}


def evaluation_blocks(config: Any, length: int) -> dict[str, int]:
    """Blocks that cover a whole row: of the size that `generate` uses, or of one chunk if that does not divide the row."""
    chunks = length // config.vae.chunk_size
    size = min(config.block_size, chunks)
    return {"offset": 0, "block_size": 1 if size and chunks % size else size}


class DenoiserTrainer(FlowTrainer):
    """Trains denoiser and context encoder of a `TokComModel`; its VAE stays frozen.

    Rows hold `input_ids` and `attention_mask`. For a model without context encoder they may also hold `latents`
    (`LatentRows`), which saves the encoding in every step. With a context encoder blocks start at any token, so that latents
    differ each time.
    """

    args: DenoiserTrainingArguments
    arguments_class = DenoiserTrainingArguments
    stage = "diffusion"
    shards = True

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
        noise = self.local_rows(rows, lambda n: torch.randn((n, *shape), generator=generator)) * config.noise_std
        arguments: dict[str, Any] = {"noise": noise, **self._times(model, (rows, shape[0]), generator)}
        if config.context is None:
            arguments["latents"] = inputs.get("latents")
        elif config.context_dropout > 0:
            arguments["context_mask"] = self.local_rows(
                rows, lambda n: torch.rand((n, shape[0]), generator=generator) >= config.context_dropout
            )
        if config.clean_prefix and torch.rand((), generator=generator).item() >= PREFIX_DROPOUT:
            prefix = int(torch.randint(shape[1], (), generator=generator))
            times = arguments["timesteps"].unsqueeze(-1).repeat(1, 1, shape[1])
            arguments["timesteps"] = times.index_fill(-1, torch.arange(prefix, device=times.device), 1.0)
        if config.denoiser.self_conditioning:
            draw = torch.rand((), generator=generator).item()
            arguments["self_conditioned"] = draw < SELF_CONDITIONING_RATE
        outputs = model(ids, inputs["attention_mask"], **blocks, **arguments)
        parts = {name: outputs[key].detach() for name, key in LOSS_PARTS.items() if outputs.get(key) is not None}
        if model.training:
            self.log_scalars("diffusion", parts)
        else:
            for name, value in parts.items():
                # Trainer's own eval_loss weighs batches by their rows, too.
                counted = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)]) * rows
                self._parts.setdefault(name, []).append(counted)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _times(self, model, shape: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random `timesteps` of blocks, (rows, blocks), and `call_times` where the model learns to do with fewer calls."""
        config = self.unwrapped_model.config
        earlier = model.training and config.recent_size > 0

        def draw(rows: int) -> torch.Tensor:
            t = training_times(
                (rows, shape[1]), config.time_distribution, config.time_mean, config.time_std, generator
            )
            return torch.stack([t, call_times(t, generator)] if earlier else [t], dim=-1)

        names = ("timesteps", "call_times")
        return dict(zip(names, self.local_rows(shape[0], draw).unbind(-1)))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._parts = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._parts.items():
            total, rows = self.accelerator.reduce(torch.stack(values).sum(dim=0), "sum").tolist()
            output.metrics[f"{metric_key_prefix}_{name.removeprefix('batch_')}"] = total / rows
        return output

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        """Logits `(rows, length, vocab)` of the predicted clean latents; of several noise draws, the first counts."""
        model = self.unwrapped_model
        blocks = outputs.clean_latents.shape[1] // copies_of_blocks(model.config)
        return model.vae.decode_logits(model.unstandardize(outputs.clean_latents[:, :blocks].flatten(1, 2)))

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return denoising_metrics(self.unwrapped_model, ids, mask, tuple(self.args.eval_times))

    @torch.no_grad()
    def sample_tables(self, decode_text: Callable[[torch.Tensor], list[str]]) -> Tables:
        """Generations, and denoised held-out text beside the original."""
        return flow_samples(self, self.unwrapped_model, decode_text, self.args.sample_steps)
