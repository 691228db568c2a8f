"""Joint training of a quantizer, LFQ token rows and, with `tune_llm`, the language model.

    loss = generation_weight · cross-entropy of the image's LFQ ids after its caption
           + understanding_weight · [KL(teacher ‖ student on quantized features) + KL(teacher ‖ student on continuous ones)]
           + reconstruction_weight · reconstruction of the features + entropy weight · entropy loss of the quantizer

The teacher is frozen and answers the questions of the batch from continuous image features.
Each part is a group of one AdamW. AdamW treats every number separately, so this equals one optimizer per part.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ..evaluation.lfq_bases import frozen_copy, last_hidden_states
from ..evaluation.lfq_joint import evaluate_joint
from ..metrics.codebook import utilization_ceiling
from ..metrics.lfq import code_indices
from ..models.lfq_rows import text_host
from .answer_rows import answer_rows
from .base import CompressionTrainer
from .held_out_loss import loss_and_predictions
from .lfq_joint_arguments import JointLFQTrainingArguments
from .lfq_joint_model import JointLFQModel
from .lfq_quantizer_start import fit_quantizer

__all__ = ["JointLFQTrainer", "JointLFQTrainingArguments"]


class JointLFQTrainer(CompressionTrainer):
    """Trainer of `JointLFQModel`.

    Args:
        model: a `JointLFQModel`.
        teacher: the frozen vision-language model; by default a copy of the model's base as it is now. If nothing of the
            base trains (`tune_llm` off, old rows frozen), the base itself is the teacher and nothing is copied.
        generation_collator: a `VQACollator` with `answers=False`, from whose batches evaluations generate answers.
        other arguments: as for `Trainer`; rows come from `data.captions`, `data_collator` is a `JointLFQCollator`.
    """

    args: JointLFQTrainingArguments
    arguments_class = JointLFQTrainingArguments
    stage = "joint_lfq"
    data_columns = None
    shards = True
    step_methods = ("see",)

    def __init__(
        self,
        model: JointLFQModel,
        args: JointLFQTrainingArguments | None = None,
        *,
        teacher=None,
        generation_collator=None,
        **kwargs,
    ):
        checked = cast(JointLFQTrainingArguments, self.checked_arguments(args))
        if checked.generation_weight and not model.draws:
            raise ValueError(
                "This model has no LFQ ids, so it has no cross-entropy of image tokens for generation_weight "
                f"{checked.generation_weight}; set it to 0, or expand the vocabulary."
            )
        model.set_trainable(checked.tune_llm)
        super().__init__(model, checked, **kwargs)
        self.generation_collator = generation_collator
        self.teacher: Any = None
        if checked.tune_llm or model.old_rows_train:
            teacher = frozen_copy(model.base) if teacher is None else teacher.requires_grad_(False).eval()
            self.teacher = teacher.to(self.args.device)
        self._draws = (-1, 0)

    def start_quantizer(self) -> float:
        """Fits a fresh quantizer to the features of the first training images (`lfq_quantizer_start.fit_quantizer`).

        Returns:
            The quantizer's error as a share of the features' variance; NaN if `quantizer_start_images` is 0.

        Raises:
            ValueError: the quantizer reads other features than those that it is to reconstruct.
        """
        if self.args.quantizer_start_images == 0:
            return math.nan
        if self.unwrapped_model.quantizer_input != "projected":
            raise ValueError(
                "A quantizer that reads vision features cannot first learn to reconstruct its input; set "
                "quantizer_start_images to 0."
            )
        rows: Any = self.train_dataset
        model, features = self.unwrapped_model, []
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
        """One AdamW in which each part has its own learning rate and vectors have no weight decay."""
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
        """Weight of the entropy loss at this step; it falls linearly over the first share `entropy_anneal` of training."""
        args = self.args
        done = self.state.global_step / max(self.state.max_steps, 1)
        share = 1.0 if args.entropy_anneal == 0 else min(1.0, done / args.entropy_anneal)
        return args.entropy_weight + (args.entropy_weight_end - args.entropy_weight) * share

    @torch.no_grad()
    def teacher_logits(self, features, inputs) -> torch.Tensor:
        """The teacher's logits at the positions that predict an answer token, `(answer tokens, old vocabulary)`."""
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
        """Masks whole captions, except the start-of-image token that ends each, with probability `caption_drop`.

        The draws depend on seed, step and row of the global batch, so that any number of ranks and a resumed run draw alike.
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
        # Without LFQ ids there is no generation loss.
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
        # Only what trains is saved: the frozen base is loaded from its own name or folder.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.unwrapped_model
        # For a sharded model, `state_dict` holds the gathered parameters.
        weights = model.state_dict() if state_dict is None else state_dict
        trained = {n: weights[n].detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(self.args, folder / "training_args.bin")

    def _issue_warnings_after_load(self, load_result):
        trained = {name for name, p in self.unwrapped_model.named_parameters() if p.requires_grad}
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key in trained]
        super()._issue_warnings_after_load(load_result)

    # ------------------------------------------------------------------ evaluation
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; for `compute_metrics` also logits of the answers from quantized features, and labels (`answer_rows`)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), *answer_rows(output.quantized_logits.float(), inputs["labels"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Held-out losses, agreement of generated answers with the teacher's, and statistics of the bits.

        Returns:
            The scalars of `evaluate_joint`, with the prefix.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            parts = (self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items())
            return {name: value for part in parts for name, value in part.items()}
        with self.averaged_weights():
            report = evaluate_joint(self, rows)
            metrics = loss_and_predictions(self, rows, ignore_keys, metric_key_prefix)
        metrics |= {f"{metric_key_prefix}_{k}": v for k, v in report.items() if isinstance(v, (int, float))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
