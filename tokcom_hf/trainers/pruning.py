"""Trains the heads of a `PrunedVLM`: token merger, layer pruners and LoRA adapters, with or without a discriminator.

The base model is frozen. In one step the unpruned model gives target distributions, the softly pruned model learns to
match them within the token budget, and the discriminator learns to tell the hidden states of the two apart.
Merger, pruners and adapters are groups of one AdamW with their own learning rates; the discriminator has its own AdamW.
"""

from typing import Any, cast

import torch

from ..evaluation.pruning_answers import evaluate_mode, named_metrics
from ..models.modeling_pruned_vlm import PrunedVLM
from ..models.modeling_pruning_discriminator import PruningDiscriminator
from .answer_rows import answer_rows
from .base import CompressionTrainer
from .held_out_loss import loss_and_predictions
from .pruning_adversary import PruningAdversary
from .pruning_arguments import TokenPruningTrainingArguments
from .pruning_attention_guidance import attention_reader, guidance_loss, reading_scores
from .pruning_lora import adapters_disabled, add_lora, merge_lora
from .pruning_losses import annealed_temperature, answer_kl, binarization_loss, keep_rate_loss
from .pruning_parts import SaveParts
from .pruning_statistics import PruningStatistics, step_scalars
from .trackers import TrackerName


class TokenPruningTrainer(CompressionTrainer):
    """Trainer of `PrunedVLM`.

    Args:
        model: a `PrunedVLM`.
        discriminator: a `PruningDiscriminator`, needed if `adversarial_weight` is above 0.
        generation_collator: a `VQACollator` with `answers=False`, from whose batches evaluations generate answers.
        other arguments: as for `Trainer`; `eval_dataset` holds VQA rows.
    """

    args: TokenPruningTrainingArguments
    arguments_class = TokenPruningTrainingArguments
    stage = "token_pruning"
    shards = True
    data_columns = None

    def __init__(
        self,
        model: PrunedVLM | None = None,
        args: TokenPruningTrainingArguments | None = None,
        *,
        discriminator: PruningDiscriminator | None = None,
        generation_collator=None,
        **kwargs,
    ):
        checked = cast(TokenPruningTrainingArguments, self.checked_arguments(args))
        # One process uses one device: DataParallel would wrongly split the discriminator's step over replicas.
        checked._n_gpu = min(checked.n_gpu, 1)
        self._lora_r = checked.lora_r
        self._statistics: PruningStatistics | None = None
        self._baseline: tuple[Any, dict] | None = None
        if model is not None:
            self._make_trainable(model)
        super().__init__(model, checked, **kwargs)
        merger = self.unwrapped_model.token_merger
        if merger is not None and merger.config.max_ratio is not None and self.args.merge_sparsity_weight == 0:
            raise ValueError(
                f"With max_ratio={merger.config.max_ratio} the sparsity loss trains the mean number of merged tokens, and "
                "merge_sparsity_weight 0 would leave it untrained; set --merge_sparsity_weight 0.01, for example."
            )
        self.generation_collator = generation_collator
        self.adversary: PruningAdversary | None = None
        if self.args.adversarial_weight > 0:
            if discriminator is None:
                raise ValueError("adversarial_weight > 0 needs a discriminator; give one or set the weight to 0.")
            self.adversary = PruningAdversary(discriminator, self.args, self.accelerator)
        if self.args.save_parts:
            self.add_callback(SaveParts(self))

    @property
    def discriminator(self) -> Any:
        """The discriminator, wrapped for distributed training; None without an adversarial loss."""
        return None if self.adversary is None else self.adversary.network

    def _make_trainable(self, model: PrunedVLM) -> PrunedVLM:
        """Freezes the base, lets the heads train, and adds LoRA adapters if `lora_r` is above 0."""
        model.requires_grad_(False)
        for head in (model.token_merger, model.layer_pruner):
            if head is not None:
                head.requires_grad_(True)
        if self._lora_r:
            add_lora(model, self._lora_r)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("Nothing to train: give the model a token_merger or layer_pruner, or set lora_r.")
        return model

    def call_model_init(self, trial=None):
        self._baseline = None
        if getattr(self, "adversary", None) is not None:
            # Each trial of a hyperparameter search begins with a new discriminator.
            self.adversary.scheduler = None
            self.adversary.reinitialize(self._step_seed())
        return self._make_trainable(super().call_model_init(trial))

    # ------------------------------------------------------------------ optimizers
    def create_optimizer(self, *args, **kwargs):
        """One AdamW with one group per part."""
        if self.optimizer is None:
            model, args = self.unwrapped_model, self.args
            heads = {
                "merger": (model.token_merger, args.merger_learning_rate),
                "pruners": (model.layer_pruner, args.pruner_learning_rate),
                "lora": (model.base, args.lora_learning_rate),
            }
            groups = []
            for name, (part, rate) in heads.items():
                parameters = [] if part is None else [p for p in part.parameters() if p.requires_grad]
                if parameters:
                    groups.append({"params": parameters, "lr": rate, "name": name})
            self.optimizer = torch.optim.AdamW(
                groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )  # fmt: skip
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.adversary is not None:
            self.adversary.create_scheduler(num_training_steps)
        return scheduler

    def auxiliary_state(self):
        return {} if self.adversary is None else self.adversary.auxiliary_state()

    # ------------------------------------------------------------------ one step
    @property
    def progress(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return min(1.0, self.state.global_step / max(self.state.max_steps, 1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, pruned = self.args, self.unwrapped_model
        temperature = self._anneal()
        adversary = self.adversary if model.training or self._statistics is not None else None
        adversarial = adversary is not None
        teacher = None
        guided = args.guidance_weight > 0 and (pruned.token_merger or pruned.layer_pruner) is not None
        attention: list[torch.Tensor] = []
        if args.kl_weight > 0 or adversarial or guided:
            with torch.no_grad(), adapters_disabled(pruned):
                unpruned, attention = attention_reader(pruned) if guided else (pruned, attention)
                teacher = unpruned(**inputs, pruning_mode="origin", output_hidden_states=adversarial)
        with reading_scores(pruned) as scores:
            output = model(**inputs, pruning_mode="soft", output_hidden_states=adversarial)
        labels = inputs["labels"]
        ramp = 1.0 if args.loss_warmup == 0 else min(1.0, self.progress / args.loss_warmup)
        losses = {"task_loss": output.loss}
        weights = {"task_loss": args.task_weight}
        if teacher is not None and args.kl_weight > 0:
            losses["kl_loss"] = answer_kl(teacher.logits, output.logits, labels)
            weights["kl_loss"] = ramp * args.kl_weight
        if guided:
            losses["guidance_loss"] = guidance_loss(
                pruned, attention, scores, output.kept_index, inputs["input_ids"], inputs["attention_mask"]
            )
            weights["guidance_loss"] = ramp * args.guidance_weight
        for name in ("merge_entropy_loss", "merge_sparsity_loss"):
            value = getattr(output, name)
            if value is not None:
                losses[name] = value
                weights[name] = ramp * getattr(args, name.replace("loss", "weight"))
        if output.soft_masks is not None:
            losses["keep_rate_loss"] = keep_rate_loss(output.keep_rates)
            losses["binarization_loss"] = binarization_loss(output.soft_masks)
            weights["keep_rate_loss"] = ramp * args.keep_rate_weight
            weights["binarization_loss"] = ramp * args.binarization_weight
        if adversary is not None and model.training:
            losses["adv_loss"] = adversary.generator_loss(teacher, output, labels)
            weights["adv_loss"] = ramp * args.adversarial_weight
        loss = sum(weights[name] * value for name, value in losses.items())
        if model.training:
            self._log_documented({"temperature": temperature})
            self.log_scalars("pruning", {"temperature": temperature})
            for prefix, values in step_scalars(pruned, output, losses, inputs["input_ids"]):
                self.log_scalars(prefix, values)
        elif self._statistics is not None:
            verdicts = None if adversary is None else adversary.verdicts(teacher, output, labels)
            self._statistics.add(pruned, output, inputs, losses | {"loss": loss}, verdicts)
        return (loss, output) if return_outputs else loss

    def _anneal(self) -> float:
        """Sets the temperature of this step in the model and its heads, and returns it."""
        args, pruned = self.args, self.unwrapped_model
        temperature = annealed_temperature(
            self.progress, args.temperature_start, args.temperature_end, args.temperature_anneal_rate
        )
        for module in (pruned, pruned.token_merger, pruned.layer_pruner):
            if module is not None:
                module.temperature = temperature
        return temperature

    def _log_documented(self, values: dict[str, Any]) -> None:
        """Logs under the documents' names, which have no prefix and go to the trackers unchanged."""
        for name, value in values.items():
            self._scalars.add(TrackerName(name), value)

    def _step_seed(self) -> int:
        # The seed depends on the step alone, so that all ranks and a resumed run agree.
        return self.args.seed + self.state.global_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adversary is not None:
            values = self.adversary.step(self._step_seed())
            self.log_scalars("discriminator", values)
            self._log_documented({f"disc_{name}": values[name] for name in ("prob_real", "prob_fake")})
        return loss

    # ------------------------------------------------------------------ evaluation
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The soft loss; for `compute_metrics` also logits in hard mode, and labels, as `answer_rows` returns them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            logits = self.unwrapped_model(**inputs, pruning_mode="hard").logits
        predicts = inputs["labels"][:, 1:] != -100
        return loss, *answer_rows(logits[:, :-1][predicts].float(), inputs["labels"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Generates answers with the unpruned, the softly and the hard-pruned model, and runs one soft pass.

        Returns:
            `accuracy_baseline` (of the base before training), `accuracy_soft`, `accuracy_hard`; in hard mode also one
            accuracy per question type, `flops_ratio` and `sequence_kept`; `accuracy_under_budget`, the hard accuracy if
            `flops_ratio <= flops_budget`, else minus the excess; `bleu_...` (see `named_metrics`);
            `avg_original_tokens`, `avg_merged_tokens` (vision tokens that enter the language model) and their ratio
            `keep_ratio_merge`; `temperature`; from the soft pass the losses and `mask_{mean,std,min,max}` over the vision
            tokens of all layers and of each layer; with a discriminator `real_loss`, `fake_loss`, `disc_prob_real` and
            `disc_prob_fake`.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.generation_collator is None:
            raise ValueError("Evaluation needs generation_collator, a VQACollator with answers=False.")
        if isinstance(rows, dict):
            parts = (self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items())
            return {name: value for part in parts for name, value in part.items()}
        with self.averaged_weights():
            temperature = self._anneal()
            statistics, baseline = self._soft_statistics(rows), self._evaluate_baseline(rows)
            # Hard mode comes last: `token_report()` reports the last generation.
            soft, result = self._evaluate_mode(rows, "soft"), self._evaluate_mode(rows, "hard")
            others = {}
            if self.compute_metrics is not None:
                others = loss_and_predictions(self, rows, ignore_keys, metric_key_prefix)
        accuracy, ratio = result["accuracy"]["all"], result["flops_ratio"]
        over = ratio - self.args.flops_budget
        # In soft mode only the merger removes tokens: the first layer sees the merged ones.
        merged = soft["vision_tokens_per_layer"][0]
        metrics = statistics | named_metrics({"origin": baseline, "soft": soft, "hard": result})
        metrics |= {
            "avg_merged_tokens": merged,
            "keep_ratio_merge": merged / baseline["vision_tokens"],
            "temperature": temperature,
            "accuracy_under_budget": accuracy if over <= 1e-6 else -over,
            "flops_ratio": ratio,
            "sequence_kept": result["sequence_kept"],
        }
        metrics |= {f"accuracy_{kind}": value for kind, value in result["accuracy"].items() if kind != "all"}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()} | others
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_mode(self, rows, mode: str) -> dict[str, Any]:
        length = self.args.eval_max_new_tokens
        return evaluate_mode(self.unwrapped_model, self.generation_collator, rows, mode, length)

    def _evaluate_baseline(self, rows) -> dict[str, Any]:
        """Evaluates the base without adapters. Training does not change it, so this is done once per data set."""
        if self._baseline is None or self._baseline[0] is not rows:
            with adapters_disabled(self.unwrapped_model):
                self._baseline = rows, self._evaluate_mode(rows, "origin")
        return self._baseline[1]

    def _soft_statistics(self, rows) -> dict[str, float]:
        """Statistics of one soft pass over questions and answers, without Gumbel noise; every rank runs all rows."""
        model, size = self.unwrapped_model, self.args.eval_batch_size
        was_training, self._statistics = model.training, PruningStatistics()
        model.eval()
        try:
            for start in range(0, len(rows), size):
                batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
                self.prediction_step(model, batch, prediction_loss_only=True)
            return self._statistics.metrics()
        finally:
            model.train(was_training)
            self._statistics = None

    def merge_lora(self) -> None:
        """Merges the adapters into the base weights for good; `save_pretrained` then stores the base, too."""
        merge_lora(self.unwrapped_model)
