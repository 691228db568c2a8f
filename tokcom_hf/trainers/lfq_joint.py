"""Joint training of a quantizer, LFQ token rows and, where asked for, the language model.

Three passes over a batch: a frozen teacher answers questions from continuous image features; the student answers them from
quantized features, and once more from continuous ones. Both stay close to the teacher (KL, weight 25), while the student
learns to draw the image, as LFQ ids, after its caption (cross-entropy, weight 1).

One AdamW with one group per part: AdamW acts on every number by itself, so these are separate optimizers in one file.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..evaluation.lfq_bases import frozen_copy, last_hidden_states
from ..evaluation.lfq_joint import evaluate_joint
from ..metrics.codebook import utilization_ceiling
from ..metrics.lfq import code_indices
from ..models.lfq_rows import text_host
from .answer_rows import answer_rows
from .base import CompressionTrainer, CompressionTrainingArguments
from .lfq_joint_model import JointLFQModel
from .lfq_quantizer_start import fit_quantizer


@dataclass
class JointLFQTrainingArguments(CompressionTrainingArguments):
    """Arguments of `JointLFQTrainer`; the documented numbers are the defaults."""

    builds_own_optimizer = True

    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of every part that names none of its own."})
    adam_beta1: float = field(default=0.9, metadata={"help": "First beta of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices; vectors have none."})
    quantizer_learning_rate: float | None = field(default=None, metadata={"help": "Rate of the quantizer."})
    new_rows_learning_rate: float | None = field(default=None, metadata={"help": "Rate of the LFQ token rows."})
    llm_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the language model's layers and old rows."}
    )
    tune_llm: bool = field(default=True, metadata={"help": "Train the language model's layers too."})
    generation_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy of image tokens."})
    understanding_weight: float = field(default=25.0, metadata={"help": "Weight of the two KLs to the teacher."})
    reconstruction_weight: float = field(default=1.0, metadata={"help": "Weight of the features' reconstruction."})
    entropy_weight: float = field(default=1.0, metadata={"help": "Weight of the entropy loss at the start."})
    entropy_weight_end: float = field(default=0.1, metadata={"help": "Its weight once annealed."})
    entropy_anneal: float = field(default=0.5, metadata={"help": "Share of training over which it falls, linearly."})
    quantizer_start_steps: int = field(
        default=400, metadata={"help": "Steps in which the quantizer learns to reconstruct features before all else."}
    )
    quantizer_start_images: int = field(
        default=1024,
        metadata={"help": "Training images whose features it sees then; 0 leaves its weights as they were drawn."},
    )
    quantizer_start_learning_rate: float = field(default=1e-3, metadata={"help": "Its learning rate then."})
    caption_drop: float = field(
        default=0.1, metadata={"help": "Share of captions left out, so that generation can be guided."}
    )
    eval_max_new_tokens: int = field(default=4, metadata={"help": "Answer length in evaluations."})

    def __post_init__(self):
        super().__post_init__()
        if self.fp16:
            raise ValueError("Joint LFQ training runs in bf16 or fp32; fp16 overflows in the KL. Set bf16 instead.")
        for name in ("caption_drop", "entropy_anneal"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        weights = ["generation_weight", "understanding_weight", "reconstruction_weight", "entropy_weight"]
        for name in [*weights, "entropy_weight_end", "quantizer_start_steps", "quantizer_start_images"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


class JointLFQTrainer(CompressionTrainer):
    """Trainer of `JointLFQModel`.

    Args:
        model: a `JointLFQModel`.
        teacher: the frozen vision-language model; a copy of the model's base as it is now by default. Not needed, and
            not copied, where nothing of the base trains (`tune_llm` off, old rows frozen): it then stays what it was.
        generation_collator: a `VQACollator` with `answers=False`, for answers in evaluations.
        other arguments: as for `Trainer`; rows come from `data.captions`, `data_collator` is a `JointLFQCollator`.
    """

    args: JointLFQTrainingArguments
    arguments_class = JointLFQTrainingArguments
    stage = "joint_lfq"
    data_columns = None

    def __init__(
        self,
        model: JointLFQModel,
        args: JointLFQTrainingArguments | None = None,
        *,
        teacher=None,
        generation_collator=None,
        **kwargs,
    ):
        args = self.checked_arguments(args)
        if args.generation_weight and not model.draws:
            raise ValueError(
                f"This model has no LFQ ids, so that there is no cross-entropy of image tokens for generation_weight "
                f"{args.generation_weight} to weigh; set it to 0, or expand the vocabulary."
            )
        model.set_trainable(args.tune_llm)
        super().__init__(model, args, **kwargs)
        self.generation_collator = generation_collator
        self.teacher: Any = None
        if args.tune_llm or model.old_rows_train:
            teacher = frozen_copy(model.base) if teacher is None else teacher.requires_grad_(False).eval()
            self.teacher = teacher.to(self.args.device)
        self._draws = (-1, 0)

    def start_quantizer(self) -> float:
        """Fits a fresh quantizer to the features of the first training images (`lfq_quantizer_start.fit_quantizer`).

        Returns:
            its error, as a share of the features' variance; NaN where it saw none.

        Raises:
            ValueError: the quantizer does not read the features that it is to reconstruct.
        """
        if self.args.quantizer_start_images == 0:
            return math.nan
        if self.unwrapped_model.quantizer_input != "projected":
            raise ValueError(
                "A quantizer of vision features cannot first learn to reconstruct its input; set quantizer_start_images to "
                "0."
            )
        rows, model, features = self.train_dataset, self.unwrapped_model, []
        count, size = min(self.args.quantizer_start_images, len(rows)), self.args.eval_batch_size
        for start in range(0, count, size):
            batch = self.data_collator([rows[index] for index in range(start, min(start + size, count))])
            pixels = self._prepare_inputs({"pixel_values": batch["pixel_values"]})["pixel_values"]
            features.append(model.image_features(pixels))
        return fit_quantizer(
            model.quantizer,
            torch.cat(features),
            self.args.quantizer_start_steps,
            learning_rate=self.args.quantizer_start_learning_rate,
            seed=self.args.seed,
        )

    # ------------------------------------------------------------------ optimizer
    def create_optimizer(self, *args, **kwargs):
        """One AdamW; quantizer, new rows and language model each have their rate, vectors no decay."""
        if self.optimizer is None:
            model, rate = self.unwrapped_model, self.args.learning_rate
            parts = {
                "quantizer": (list(model.quantizer.parameters()), self.args.quantizer_learning_rate),
                "new_rows": (model.new_rows(), self.args.new_rows_learning_rate),
                "llm": (model.llm_parameters() if self.args.tune_llm else [], self.args.llm_learning_rate),
                "old_rows": (model.tables() if model.old_rows_train else [], self.args.llm_learning_rate),
            }
            groups = []
            for name, (parameters, own) in parts.items():
                for decay, kind in ((self.args.weight_decay, "matrices"), (0.0, "vectors")):
                    chosen = [p for p in parameters if (p.ndim > 1) == (kind == "matrices")]
                    if chosen:
                        lr = rate if own is None else own
                        groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "name": f"{name}_{kind}"})
            self.optimizer = torch.optim.AdamW(
                groups, lr=rate, betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon,
                fused=True,
            )  # fmt: skip
        return self.optimizer

    # ------------------------------------------------------------------ one step
    @property
    def entropy_scale(self) -> float:
        """Weight of the entropy loss now: falls linearly over the first `entropy_anneal` of training."""
        args = self.args
        done = self.state.global_step / max(self.state.max_steps, 1)
        share = 1.0 if args.entropy_anneal == 0 else min(1.0, done / args.entropy_anneal)
        return args.entropy_weight + (args.entropy_weight_end - args.entropy_weight) * share

    @torch.no_grad()
    def teacher_logits(self, features, inputs) -> torch.Tensor:
        """The teacher's logits where an answer token is predicted, `(answer tokens, old vocabulary)`."""
        model = self.unwrapped_model
        text = {
            name: inputs[name] for name in ("input_ids", "attention_mask", "labels", "position_ids") if name in inputs
        }
        if self.teacher is None:
            return model.answer_logits(features, **text)
        embeddings, labels = model.embed(text.pop("input_ids"), features), text.pop("labels")
        hidden = last_hidden_states(self.teacher, embeddings, **text)
        return text_host(self.teacher).get_output_embeddings()(hidden[:, :-1][labels[:, 1:] != -100])

    def drop_captions(self, mask: torch.Tensor) -> torch.Tensor:
        """Hides whole captions, but not the start-of-image token that ends them, with probability `caption_drop`.

        Drawn from the step number for the global batch, so that ranks draw what one process would and a resumed run
        what an undisturbed one would.
        """
        step, micro = self._draws
        self._draws = (step, micro + 1) if step == self.state.global_step else (self.state.global_step, 1)
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1009 + self._draws[1]
        rows, rank = len(mask), self.args.process_index
        draw = torch.rand(rows * self.args.world_size, generator=torch.Generator().manual_seed(seed))
        dropped = (draw[rank * rows : (rank + 1) * rows] < self.args.caption_drop).to(mask.device)
        mask = mask.clone()
        mask[:, :-1] *= (~dropped)[:, None].to(mask.dtype)
        return mask

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, inputs = self.args, dict(inputs)
        features, read = self.unwrapped_model.see(inputs.pop("pixel_values"))
        if model.training:
            inputs["caption_mask"] = self.drop_captions(inputs["caption_mask"])
        teacher = self.teacher_logits(features, inputs)
        output = model(image_features=features, teacher_logits=teacher, quantizer_features=read, **inputs)
        quantizer, entropy_scale = output.quantizer, self.entropy_scale
        understanding = output.quantized_kl + output.continuous_kl
        loss = sum(
            [
                *([] if output.generation_loss is None else [args.generation_weight * output.generation_loss]),
                args.understanding_weight * understanding,
                args.reconstruction_weight * quantizer.reconstruction_loss,
                entropy_scale * quantizer.entropy_loss,
            ]
        )
        if model.training:
            self._log_losses(output, understanding, entropy_scale)
        return (loss, output) if return_outputs else loss

    def _log_losses(self, output, understanding: torch.Tensor, entropy_scale: float) -> None:
        joint = {"understanding_loss": understanding, "entropy_weight": entropy_scale}
        # A model without LFQ ids has no generation loss.
        joint |= {
            name: output[name] for name in ("generation_loss", "quantized_kl", "continuous_kl") if name in output
        }
        if len(output.lfq_mass) and output.generation_loss is not None:
            joint["lfq_mass"] = output.lfq_mass.mean()
        self.log_scalars("joint", joint)
        quantizer = output.quantizer
        mean = quantizer.codes.float().mean((0, 1))
        size = 1 << quantizer.codes.shape[-1]
        ids = code_indices(quantizer.codes)
        names = ("reconstruction_loss", "entropy_loss", "sample_entropy", "batch_entropy")
        values: dict[str, Any] = {name: quantizer[name] for name in names}
        values |= {"bit_mean_min": mean.min(), "bit_mean_max": mean.max()}
        values["batch_utilization"] = len(ids.unique()) / size
        values["batch_utilization_ceiling"] = utilization_ceiling(ids.numel(), size)
        self.log_scalars("lfq", values)

    # ------------------------------------------------------------------ checkpoints
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # What trains, and nothing of the frozen rest: the base is where it came from.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().contiguous() for n, p in self.unwrapped_model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(self.args, folder / "training_args.bin")

    def _issue_warnings_after_load(self, load_result):
        trained = {name for name, p in self.unwrapped_model.named_parameters() if p.requires_grad}
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key in trained]
        super()._issue_warnings_after_load(load_result)

    # ------------------------------------------------------------------ evaluation
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and for `compute_metrics` the logits of answers from quantized features, as `answer_rows` has them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), *answer_rows(output.quantized_logits.float(), inputs["labels"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Held-out losses, agreement of generated answers with the teacher's, and the state of the bits.

        Returns:
            the scalars of `evaluate_joint`, with the prefix.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            parts = (self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items())
            return {name: value for part in parts for name, value in part.items()}
        with self.averaged_weights():
            report = evaluate_joint(self, rows)
            metrics = self.loss_and_predictions(rows, ignore_keys, metric_key_prefix)
        metrics |= {f"{metric_key_prefix}_{k}": v for k, v in report.items() if isinstance(v, (int, float))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
