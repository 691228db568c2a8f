"""Trainer of `VQGAN`: autoencoder, codebook and discriminator."""

import json
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import Dataset

from tokcom_hf.metrics.codebook import CodebookMonitor
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.modeling_vqgan_discriminator import VQGANDiscriminator
from tokcom_hf.models.vqgan_code_search import NonFiniteFeaturesError
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer

from .base import CompressionTrainer
from .vqgan_adversary import Adversary, adaptive_weight
from .vqgan_arguments import VQGANTrainingArguments
from .vqgan_codebook import place_codes, quantizer_inputs, resize_codebooks
from .vqgan_evaluation import HeldOutSums
from .vqgan_perceptual import build_perceptual_loss
from .vqgan_pictures import PictureCallback

__all__ = ["VQGANTrainer", "VQGANTrainingArguments"]


class VQGANTrainer(CompressionTrainer):
    """Trains a `VQGAN`, and a `VQGANDiscriminator` where one is given.

    The codebook is updated once per optimizer step, from statistics summed over micro-batches and ranks. `eval_psnr`,
    `eval_utilization` and `eval_normalized_entropy` describe the whole held-out set, `eval_batch_*` are means over its
    batches, and `eval_cumulative_*` describe the moving average of code usage in training.
    """

    args: VQGANTrainingArguments
    arguments_class = VQGANTrainingArguments
    stage = "vqgan"
    data_columns = None

    def __init__(
        self,
        model: VQGAN,
        args: VQGANTrainingArguments | None = None,
        discriminator: VQGANDiscriminator | None = None,
        **kw,
    ):
        checked = cast(VQGANTrainingArguments, self.checked_arguments(args))
        # Buffers are equal on all ranks by construction; broadcasting them would only hide an error.
        checked.ddp_broadcast_buffers = False
        # Checked here for runs with max_steps; a run whose length is given in epochs is checked when training begins.
        self._check_autoencoder_steps(checked, checked.max_steps)
        super().__init__(model=model, args=checked, **kw)
        self.model_accepts_loss_kwargs = False
        self.discriminator = discriminator
        self.adversary: Adversary | None = None
        if checked.codebook_expansion and not isinstance(model.quantizer, EMAQuantizer):
            raise ValueError(f"codebook_expansion needs quantizer 'ema', got {model.config.quantizer!r}.")
        name = checked.perceptual if checked.perceptual_weight else "none"
        self.perceptual = build_perceptual_loss(name, model.config.out_channels)
        if self.perceptual is not None:
            self.perceptual.to(checked.device)
        self.monitor = CodebookMonitor(model.config.codebook_size, checked.monitor_window)
        self._fake: torch.Tensor | None = None
        self.held_out = HeldOutSums()
        self.add_callback(PictureCallback(self))

    # ---------------------------------------------------------------- schedules
    @property
    def progress(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return self.state.global_step / max(1, self.state.max_steps)

    def adversarial_scale(self) -> float:
        """Weight of the adversarial loss at this step; 0 before `adversarial_start`."""
        args = self.args
        if self.discriminator is None or not args.adversarial_weight or self.progress < args.adversarial_start:
            return 0.0
        grown = (self.progress - args.adversarial_start) / max(args.adversarial_warmup, 1e-9)
        first = 1.0 / max(1.0, args.adversarial_warmup * self.state.max_steps)
        return args.adversarial_weight * min(1.0, grown + first)

    def temperature_scale(self) -> float:
        """Factor of the sampling temperature at this step, in [0, 1]."""
        if self.args.temperature_schedule == "constant":
            return 1.0
        return max(0.0, 1.0 - self.progress / self.args.temperature_anneal) if self.args.temperature_anneal else 0.0

    def _quantizes(self) -> bool:
        return self.state.global_step >= self.args.autoencoder_stage(self.state.max_steps)

    def _set_schedules(self, model: VQGAN) -> None:
        args, quantizer = self.args, model.quantizer
        quantizer.update_in_forward = False
        began, quantizer.enabled = not quantizer.enabled, self._quantizes()
        if began and quantizer.enabled:
            self.best_model.record = None  # The evaluations so far were without quantization.
        epochs = self.state.epoch or 0.0
        warm = args.commitment_warmup_epochs
        model.commitment_scale = min(1.0, epochs / warm) if warm else 1.0
        if isinstance(quantizer, EMAQuantizer):
            quantizer.temperature = model.config.temperature * self.temperature_scale()
            if quantizer.enabled and not quantizer.initialized:
                place_codes(model, self.train_dataset, self.data_collator, args.init_images, args.seed)

    # ---------------------------------------------------------------- one step
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) > 1 and getattr(self.unwrapped_model.quantizer, "measures_entropy", False):
            try:
                self._look_ahead(batches)
            except NonFiniteFeaturesError as error:
                raise self.not_finite(f"The encoder's features became NaN or infinite ({error})") from error
        return batches, number

    @torch.no_grad()
    def _look_ahead(self, batches: list) -> None:
        """Lets the quantizer scan all micro-batches first, so that the entropy of mean code use is that of the whole batch.

        This costs one more pass of the encoder.
        """
        model = self.unwrapped_model
        self._set_schedules(model)
        if model.quantizer.enabled:
            with self.compute_loss_context_manager():
                vectors = [quantizer_inputs(model, self._prepare_inputs(batch)["pixel_values"]) for batch in batches]
            model.quantizer.look_ahead(vectors)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        target = inputs.get("labels", pixels)
        network = self.unwrapped_model
        if model.training:
            self._set_schedules(network)
        outputs = model(**inputs)
        fake = outputs.reconstruction
        losses = ("reconstruction_loss", "commitment_loss", "entropy_loss", "diversity_loss")
        logs = {name: outputs[name] for name in losses if outputs.get(name) is not None}
        loss, image_loss = outputs.loss, outputs.reconstruction_loss
        if self.perceptual is not None:
            logs["perceptual_loss"] = self.perceptual(fake.float(), target.float()).mean()
            image_loss = image_loss + self.args.perceptual_weight * logs["perceptual_loss"]
            loss = loss + self.args.perceptual_weight * logs["perceptual_loss"]
        scale = self.adversarial_scale() if model.training else 0.0
        self._fake = None
        if scale and self.adversary is not None:
            adversarial = self.adversary.generator_loss(fake)
            weight = torch.ones((), device=fake.device)
            if self.args.adaptive_weight:
                last = network.decoder.conv_out.weight
                weight = adaptive_weight(image_loss, adversarial, last, self.args.adaptive_weight_limit)
            loss = loss + scale * weight * adversarial
            logs |= {"adversarial_loss": adversarial, "adversarial_weight": scale * weight}
            self._fake = fake.detach()
        if model.training:
            self.log_scalars("train", logs)
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            return self._both_players_step(model, inputs, num_items_in_batch)
        except NonFiniteFeaturesError as error:
            # The loss of the previous step was finite, but its update made the weights overflow.
            raise self.not_finite(f"The encoder's features became NaN or infinite ({error})") from error

    def _both_players_step(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adversary is not None and self._fake is not None:
            batch = self._prepare_inputs(inputs)
            real = batch.get("labels", batch["pixel_values"])
            self.log_scalars("train", self.adversary.step(real, self._fake, self._rate_scale()))
            self._fake = None
        if self.accelerator.sync_gradients:
            self._update_codebook()
        return loss

    def _rate_scale(self) -> float:
        """Factor of the generator's learning-rate schedule at this step; the discriminator's rate follows it."""
        if self.lr_scheduler is None or not self.args.learning_rate:
            return 1.0
        return float(self.lr_scheduler.get_last_lr()[0]) / self.args.learning_rate

    def _update_codebook(self) -> None:
        model, step = self.unwrapped_model, self.state.global_step + 1
        interval = model.config.reset_interval or self._steps_of(self.args.reset_epochs)
        due = step % interval == 0 and step <= self.args.reset_stop * self.state.max_steps
        model.quantizer.update(allow_reset=due)
        if model.quantizer.last_count is not None:
            self.monitor.update(model.quantizer.last_count)
        if self.args.codebook_expansion and step % self._steps_of(self.args.codebook_expansion_epochs) == 0:
            self._expand_codebook(model)

    def _steps_of(self, epochs: float) -> int:
        return max(1, round(epochs * self.state.max_steps / max(1e-9, self.state.num_train_epochs)))

    def _expand_codebook(self, model: VQGAN) -> None:
        """Doubles the codebook if enough codes are in use; all ranks decide alike, because counts are summed over ranks."""
        used = self.monitor.report().get("window_utilization", 0.0)
        size = min(2 * model.config.codebook_size, self.args.codebook_expansion_limit)
        if used >= self.args.codebook_expansion_utilization and size > model.config.codebook_size:
            self._resize_codebook(model, size)

    def _resize_codebook(self, model: VQGAN, size: int) -> None:
        """Gives the model, its average and the usage monitor `size` codes."""
        resize_codebooks((model, None if self.average is None else self.average.module), size)
        self.monitor.resize(size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {f"codebook/{name}": value for name, value in self.monitor.report().items()}
        super().log(logs, start_time)

    # ---------------------------------------------------------------- second player and checkpoints
    @staticmethod
    def _check_autoencoder_steps(args: VQGANTrainingArguments, max_steps: int) -> None:
        if 0 < max_steps <= args.autoencoder_stage(max_steps):
            raise ValueError(
                f"autoencoder_steps ({args.autoencoder_steps}) must be below the {max_steps} steps of this run, or the "
                "codebook would never be used."
            )

    def _start_auxiliary(self) -> None:
        self._check_autoencoder_steps(self.args, self.state.max_steps)
        if self.discriminator is not None and self.args.adversarial_weight:
            self.adversary = Adversary(self.discriminator, self.args, self.accelerator)
        super()._start_auxiliary()

    def auxiliary_state(self) -> dict:
        state: dict = {"monitor": self.monitor}
        if self.adversary is not None:
            adversary = self.adversary
            state |= {
                "discriminator": adversary.network,
                "discriminator_optimizer": adversary.optimizer,
                "lecam": adversary.lecam,
            }
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # The interrupted run may have expanded its codebook.
        self._fit_codebook(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._fit_codebook(str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _fit_codebook(self, folder: str) -> None:
        """With codebook expansion, gives the model as many codes as the model in `folder` has."""
        if self.args.codebook_expansion:
            size = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["codebook_size"]
            self._resize_codebook(self.unwrapped_model, size)

    def _determine_best_metric(self, metrics, trial):
        # Without quantization, reconstructions are better than any from codes, so such a step is never the best.
        if not self.unwrapped_model.quantizer.enabled:
            return False
        return super()._determine_best_metric(metrics, trial)

    # ---------------------------------------------------------------- evaluation
    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        target = inputs.get("labels", inputs["pixel_values"])
        image = outputs.reconstruction.float().clamp(-1, 1)
        size = self.unwrapped_model.config.codebook_size
        self.held_out.add(self.accelerator, image, target, outputs.codes, size)
        return (loss.detach(), None, None) if prediction_loss_only else (loss.detach(), image, target.float())

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        self.held_out = HeldOutSums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        values = self.held_out.metrics()
        if values and self.state.global_step:
            values |= self.monitor.cumulative()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def held_out_pictures(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The first held-out images and their reconstructions by the averaged weights, on the CPU; None without any."""
        dataset = self.eval_dataset
        if not isinstance(dataset, Dataset) or not min(len(dataset), self.args.num_pictures):
            return None
        rows = [dataset[index] for index in range(min(self.args.num_pictures, len(dataset)))]
        inputs = self._prepare_inputs(self.data_collator(rows))
        model = self.unwrapped_model
        training = model.training
        model.eval()
        with torch.no_grad(), self.averaged_weights():
            images = model(**inputs).reconstruction
        model.train(training)
        return inputs.get("labels", inputs["pixel_values"]).cpu(), images.float().cpu()
