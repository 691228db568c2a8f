"""Trainer of `VQGAN`: autoencoder and discriminator, codebook updates, live usage."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset

from tokcom_hf.metrics.codebook import CodebookMonitor, usage_of_counts, utilization_ceiling
from tokcom_hf.metrics.image import ms_ssim, psnr, ssim
from tokcom_hf.models.modeling_vqgan import VQGAN
from tokcom_hf.models.modeling_vqgan_discriminator import VQGANDiscriminator
from tokcom_hf.models.vqgan_code_search import NonFiniteFeaturesError
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer, build_quantizer

from .base import CompressionTrainer, CompressionTrainingArguments
from .vqgan_adversary import Adversary, adaptive_weight
from .vqgan_perceptual import build_perceptual_loss
from .vqgan_pictures import PictureCallback

# What a batch of held-out images tells about its codes.
BATCH_USAGE = ("active", "utilization", "entropy", "normalized_entropy")


@dataclass
class VQGANTrainingArguments(CompressionTrainingArguments):
    """Training settings of the VQGAN; codebook settings live in `VQGANConfig`.

    Shares ("of training") are fractions of all optimizer steps, so that they keep their meaning in short runs.
    """

    perceptual: str = field(
        default="pyramid",
        metadata={"help": "none, pyramid (MS-SSIM and gradients), random, lpips, or backbone:<name or folder>."},
    )
    perceptual_weight: float = field(default=0.005, metadata={"help": "Weight of the perceptual loss."})
    adversarial_weight: float = field(default=0.4, metadata={"help": "Weight of the adversarial loss; 0 is none."})
    adversarial_start: float = field(default=0.3, metadata={"help": "Share of training before the discriminator."})
    adversarial_warmup: float = field(
        default=0.1, metadata={"help": "Share of training over which the adversarial weight grows after its start."}
    )
    adaptive_weight: bool = field(
        default=True, metadata={"help": "Scale the adversarial loss by the gradient ratio at the last decoder layer."}
    )
    adaptive_weight_limit: float = field(default=1.0, metadata={"help": "Largest adaptive weight."})
    gan_loss: str = field(default="hinge", metadata={"help": "hinge or non_saturating."})
    gan_regularizer: str = field(default="lecam", metadata={"help": "none, lecam or r1."})
    gan_regularizer_weight: float = field(default=0.001, metadata={"help": "Weight of the regularizer (R1: about 1)."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the discriminator; learning_rate where not given."}
    )
    commitment_warmup_epochs: float = field(
        default=5.0, metadata={"help": "Epochs over which the commitment weight grows from 0."}
    )
    autoencoder_steps: int | float = field(
        default=0,
        metadata={
            "help": "First steps without quantization (below 1: as a share of training); then the codebook is placed on the "
            "features."
        },
    )
    temperature_schedule: str = field(
        default="linear",
        metadata={"help": "linear: the sampling temperature falls to 0 (temperature_anneal); constant: it stays."},
    )
    temperature_anneal: float = field(
        default=0.5, metadata={"help": "Share of training over which a linear temperature falls to 0."}
    )
    reset_epochs: float = field(
        default=1.0, metadata={"help": "Epochs between resets of dead codes, where reset_interval is 0."}
    )
    reset_stop: float = field(default=0.85, metadata={"help": "Share of training after which no code is reset."})
    codebook_expansion: bool = field(
        default=False,
        metadata={"help": "Double the codebook of an `ema` quantizer during training whenever most codes are in use."},
    )
    codebook_expansion_epochs: float = field(default=1.0, metadata={"help": "Epochs between two looks at the use."})
    codebook_expansion_utilization: float = field(
        default=0.9, metadata={"help": "Share of codes that the last steps must have used (monitor_window)."}
    )
    codebook_expansion_limit: int = field(default=512, metadata={"help": "Size beyond which no codebook expands."})
    init_images: int = field(
        default=1024, metadata={"help": "Training images that data and k-means init may look at."}
    )
    monitor_window: int = field(default=100, metadata={"help": "Optimizer steps in windowed codebook usage."})
    num_pictures: int = field(default=16, metadata={"help": "Held-out images in the saved reconstruction grids."})
    sample_dir: str | None = field(
        default=None, metadata={"help": "Folder that also receives a reconstruction grid after every epoch."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError("fp16 cannot serve two optimizers with one gradient scaler; use bf16 or fp32.")
        if self.gan_loss not in ("hinge", "non_saturating"):
            raise ValueError(f"gan_loss must be hinge or non_saturating, got {self.gan_loss!r}.")
        if self.gan_regularizer not in ("none", "lecam", "r1"):
            raise ValueError(f"gan_regularizer must be none, lecam or r1, got {self.gan_regularizer!r}.")
        if self.temperature_schedule not in ("linear", "constant"):
            raise ValueError(f"temperature_schedule must be linear or constant, got {self.temperature_schedule!r}.")
        for name in ("adversarial_start", "adversarial_warmup", "temperature_anneal", "reset_stop"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share of training and must be in [0, 1], got {getattr(self, name)}.")
        for name in ("perceptual_weight", "adversarial_weight", "commitment_warmup_epochs", "autoencoder_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("reset_epochs", "codebook_expansion_epochs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")

    def autoencoder_stage(self, max_steps: int) -> int:
        """Number of first steps without quantization in a run of `max_steps`."""
        steps = self.autoencoder_steps
        return math.ceil(steps * max_steps) if 0 < steps < 1 else int(steps)


class VQGANTrainer(CompressionTrainer):
    """Trains a `VQGAN`, and a `VQGANDiscriminator` where one is given.

    Per optimizer step the codebook is updated once, from statistics summed over micro-batches and ranks. `eval_psnr`,
    `eval_utilization` and `eval_normalized_entropy` come from the whole held-out set, `eval_batch_*` are means over its
    batches, and `eval_cumulative_*` come from the moving average of the codes that training chose.
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
        args = self.checked_arguments(args)
        # Buffers are equal on all ranks by construction; broadcasting would only hide a fault.
        args.ddp_broadcast_buffers = False
        # Known before anything is trained or replaced, unless the run is counted in epochs.
        self._check_autoencoder_steps(args, args.max_steps)
        super().__init__(model=model, args=args, **kw)
        self.model_accepts_loss_kwargs = False
        self.discriminator = discriminator
        self.adversary: Adversary | None = None
        if args.codebook_expansion and not isinstance(model.quantizer, EMAQuantizer):
            raise ValueError(f"codebook_expansion needs quantizer 'ema', got {model.config.quantizer!r}.")
        name = args.perceptual if args.perceptual_weight else "none"
        self.perceptual = build_perceptual_loss(name, model.config.out_channels)
        if self.perceptual is not None:
            self.perceptual.to(args.device)
        self.monitor = CodebookMonitor(model.config.codebook_size, args.monitor_window)
        self._fake: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self.add_callback(PictureCallback(self))

    # ---------------------------------------------------------------- schedules
    @property
    def progress(self) -> float:
        """Share of training that is over, in [0, 1]."""
        return self.state.global_step / max(1, self.state.max_steps)

    def adversarial_scale(self) -> float:
        """Present weight of the adversarial loss, 0 before its start."""
        args = self.args
        if self.discriminator is None or not args.adversarial_weight or self.progress < args.adversarial_start:
            return 0.0
        grown = (self.progress - args.adversarial_start) / max(args.adversarial_warmup, 1e-9)
        first = 1.0 / max(1.0, args.adversarial_warmup * self.state.max_steps)
        return args.adversarial_weight * min(1.0, grown + first)

    def temperature_scale(self) -> float:
        """Present share of the sampling temperature, in [0, 1]."""
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
            self.best_model.record = None  # of evaluations without quantization
        epochs = self.state.epoch or 0.0
        warm = args.commitment_warmup_epochs
        model.commitment_scale = min(1.0, epochs / warm) if warm else 1.0
        if isinstance(quantizer, EMAQuantizer):
            quantizer.temperature = model.config.temperature * self.temperature_scale()
            if quantizer.enabled and not quantizer.initialized:
                self.initialize_codebook(model)

    @torch.no_grad()
    def initialize_codebook(self, model: VQGAN) -> None:
        """Places the codes on features of a fixed choice of training images, the same for any batch size or rank."""
        number = min(self.args.init_images, len(self.train_dataset))
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(self.train_dataset), generator=generator)[:number].tolist()
        quantizer, parts = model.quantizer, []
        training = model.training
        model.eval()
        for start in range(0, number, 32):
            rows = [self.train_dataset[index] for index in chosen[start : start + 32]]
            pixels = self.data_collator(rows)["pixel_values"].to(self.args.device)
            features = model.features(pixels).float()
            parts.append(quantizer.prepare(quantizer.project_in(features).reshape(-1, quantizer.width)))
        model.train(training)
        quantizer.initialize(torch.cat(parts))

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
        """Shows the quantizer every micro-batch, so that the entropy term is that of the whole batch.

        It costs one more pass of the encoder.
        """
        model = self.unwrapped_model
        self._set_schedules(model)
        quantizer = model.quantizer
        if not quantizer.enabled:
            return
        vectors = []
        with self.compute_loss_context_manager():
            for batch in batches:
                features = model.features(self._prepare_inputs(batch)["pixel_values"]).float()
                with torch.autocast(features.device.type, enabled=False):
                    vectors.append(quantizer.prepare(quantizer.project_in(features).reshape(-1, quantizer.width)))
        quantizer.look_ahead(vectors)

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
            # The loss of the step before was finite, what it did to the weights was too much.
            raise self.not_finite(f"The encoder's features became NaN or infinite ({error})") from error

    def _both_players_step(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adversary is not None and self._fake is not None:
            real = self._prepare_inputs(inputs)
            real = real.get("labels", real["pixel_values"])
            self.log_scalars("train", self.adversary.step(real, self._fake, self._rate_scale()))
            self._fake = None
        if self.accelerator.sync_gradients:
            self._update_codebook()
        return loss

    def _rate_scale(self) -> float:
        """The generator schedule's present factor, for the discriminator's learning rate."""
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else self.args.learning_rate
        return rate / self.args.learning_rate if self.args.learning_rate else 1.0

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
        """Doubles the codebook where its codes are in use; every rank decides from the same counts."""
        used = self.monitor.report().get("window_utilization", 0.0)
        size = min(2 * model.config.codebook_size, self.args.codebook_expansion_limit)
        if used >= self.args.codebook_expansion_utilization and size > model.config.codebook_size:
            self._resize_codebook(model, size)

    def _resize_codebook(self, model: VQGAN, size: int) -> None:
        """Gives the model, its average and the monitor `size` codes; fewer than now only to load them from a folder."""
        for network in (model, None if self.average is None else self.average.module):
            if network is None or network.config.codebook_size == size == network.quantizer.codebook_size:
                continue
            if size > network.quantizer.codebook_size:
                network.quantizer.expand(size)
                network.config.codebook_size = size
            else:
                network.config.codebook_size = size
                network.quantizer = build_quantizer(network.config, network.config.latent_channels).to(network.device)
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
        # The run may have expanded the codebook before it was interrupted.
        self._fit_codebook(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._fit_codebook(str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _fit_codebook(self, folder: str) -> None:
        """Gives the model as many codes as the one saved in `folder`, where codebooks expand."""
        if self.args.codebook_expansion:
            size = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["codebook_size"]
            self._resize_codebook(self.unwrapped_model, size)

    def _determine_best_metric(self, metrics, trial):
        # Before quantization begins a reconstruction is better than any that codes can give.
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
        counts = torch.bincount(outputs.codes.flatten(), minlength=self.unwrapped_model.config.codebook_size)
        values = {"psnr": psnr(image, target), "ssim": ssim(image, target), "ms_ssim": ms_ssim(image, target)}
        sums = {name: value.double().sum() for name, value in values.items()}
        sums |= {"mse": (image - target).double().square().flatten(1).mean(1).sum(), "counts": counts}
        sums["images"] = torch.tensor(len(image), device=image.device)
        batch = usage_of_counts(counts)
        sums |= {f"batch_{name}": torch.tensor(batch[name], device=image.device).double() for name in BATCH_USAGE}
        sums["batches"] = torch.ones((), device=image.device)
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return (loss.detach(), None, None) if prediction_loss_only else (loss.detach(), image, target.float())

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._sums = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in self._sums.items()}
        if sums:
            usage = usage_of_counts(sums["counts"])
            number = float(sums["images"])
            values = {name: float(sums[name]) / number for name in ("psnr", "ssim", "ms_ssim", "mse")} | usage
            values["utilization_ceiling"] = utilization_ceiling(int(sums["counts"].sum()), sums["counts"].numel())
            values |= {f"batch_{name}": float(sums[f"batch_{name}"] / sums["batches"]) for name in BATCH_USAGE}
            if self.state.global_step:
                values |= self.monitor.cumulative()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    def held_out_pictures(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The first held-out images and their reconstructions with the averaged weights, both on the CPU."""
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
