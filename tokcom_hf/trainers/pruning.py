"""Trains the heads of a `PrunedVLM`: merger, layer pruners and, where asked for, a discriminator.

The base model is frozen (or carries LoRA adapters). One step: the unpruned model gives the target distribution, the
softly pruned one learns to match it under the token budget; then the discriminator learns to tell their hidden states
apart. Evaluation removes tokens for real.

Optimizers: merger and pruners are two groups of one AdamW, each with its own rate and schedule - AdamW acts on every
number by itself, so this is two optimizers with one file to save. The discriminator has its own AdamW and schedule.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from ..evaluation.pruning_answers import evaluate_mode, named_metrics
from ..models.modeling_pruned_vlm import PrunedVLM
from ..models.modeling_pruning_discriminator import PruningDiscriminator
from .answer_rows import answer_rows
from .base import CompressionTrainer
from .pruning_arguments import TokenPruningTrainingArguments
from .pruning_attention_guidance import attention_reader, guidance_loss, reading_scores
from .pruning_lora import adapters_disabled, add_lora, merge_lora
from .pruning_losses import annealed_temperature, answer_kl, binarization_loss, keep_rate_loss, mask_statistics
from .pruning_parts import SaveParts
from .pruning_statistics import PruningStatistics, discriminator_losses, vision_masks
from .trackers import TrackerName


class TokenPruningTrainer(CompressionTrainer):
    """Trainer of `PrunedVLM`.

    Args:
        model: a `PrunedVLM`.
        discriminator: needed where `adversarial_weight` is above 0.
        generation_collator: a `VQACollator` with `answers=False`, for evaluation by generated answers.
        other arguments: as for `Trainer`; `eval_dataset` holds VQA rows.
    """

    args: TokenPruningTrainingArguments
    arguments_class = TokenPruningTrainingArguments
    stage = "token_pruning"
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
        args = self.checked_arguments(args)
        # One process drives one device: torch's DataParallel would copy the discriminator's side of a step wrongly.
        args._n_gpu = min(args.n_gpu, 1)
        self._lora_r = args.lora_r
        self._statistics: PruningStatistics | None = None
        self._baseline: tuple[Any, dict] | None = None
        if model is not None:
            self._make_trainable(model)
        super().__init__(model, args, **kwargs)
        merger = self.unwrapped_model.token_merger
        if merger is not None and merger.config.max_ratio is not None and self.args.merge_sparsity_weight == 0:
            raise ValueError(
                f"max_ratio={merger.config.max_ratio}: the sparsity loss holds the mean number of merged tokens, so that "
                "merge_sparsity_weight 0 would leave it untrained; set --merge_sparsity_weight 0.01, for example."
            )
        self.generation_collator = generation_collator
        if self.args.save_parts:
            self.add_callback(SaveParts(self))
        self.discriminator: Any = None
        if self.args.adversarial_weight > 0:
            if discriminator is None:
                raise ValueError("adversarial_weight > 0 needs a discriminator; give one or set the weight to 0.")
            self.discriminator = self.accelerator.prepare_model(discriminator.train())
            self.discriminator_optimizer = torch.optim.AdamW(
                discriminator.parameters(), lr=self.args.discriminator_learning_rate
            )
            self.discriminator_scheduler: LambdaLR | None = None

    def _make_trainable(self, model: PrunedVLM) -> PrunedVLM:
        """Freezes the base, frees the heads and adds LoRA adapters where asked for."""
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
        if getattr(self, "discriminator", None) is not None:
            # A trial of a search begins with a discriminator of its own.
            self.discriminator_scheduler = None
            self._reinitialize_discriminator()
        return self._make_trainable(super().call_model_init(trial))

    # ------------------------------------------------------------------ optimizers
    def create_optimizer(self, *args, **kwargs):
        """One AdamW, one group per part."""
        if self.optimizer is None:
            model = self.unwrapped_model
            heads = {
                "merger": (model.token_merger, self.args.merger_learning_rate),
                "pruners": (model.layer_pruner, self.args.pruner_learning_rate),
                "lora": (model.base, self.args.lora_learning_rate),
            }
            groups = []
            for name, (part, rate) in heads.items():
                parameters = [] if part is None else [p for p in part.parameters() if p.requires_grad]
                if parameters:
                    groups.append({"params": parameters, "lr": rate, "name": name})
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.discriminator is not None and self.discriminator_scheduler is None:
            cosine = "cosine" in str(self.args.lr_scheduler_type)
            make = get_cosine_schedule_with_warmup if cosine else get_linear_schedule_with_warmup
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.discriminator_scheduler = make(self.discriminator_optimizer, warmup, num_training_steps)
        return scheduler

    def auxiliary_state(self):
        if self.discriminator is None:
            return {}
        state = {
            "discriminator": self.accelerator.unwrap_model(self.discriminator),
            "discriminator_optimizer": self.discriminator_optimizer,
        }
        if self.discriminator_scheduler is not None:
            state["discriminator_scheduler"] = self.discriminator_scheduler
        return state

    # ------------------------------------------------------------------ one step
    @property
    def progress(self) -> float:
        """Share of training done, in [0, 1]."""
        return min(1.0, self.state.global_step / max(self.state.max_steps, 1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, pruned = self.args, self.unwrapped_model
        temperature = self._anneal()
        adversarial = self.discriminator is not None and (model.training or self._statistics is not None)
        teacher = None
        guided = args.guidance_weight > 0 and (pruned.token_merger or pruned.layer_pruner) is not None
        attention: list[torch.Tensor] = []
        if args.kl_weight > 0 or adversarial or guided:
            with torch.no_grad(), adapters_disabled(pruned):
                unpruned, attention = attention_reader(pruned) if guided else (pruned, attention)
                teacher = unpruned(**inputs, pruning_mode="origin", output_hidden_states=adversarial)
        with reading_scores(pruned) as said:
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
                pruned, attention, said, output.kept_index, inputs["input_ids"], inputs["attention_mask"]
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
        if adversarial and model.training:
            losses["adv_loss"] = self._adversarial(teacher, output, labels)
            weights["adv_loss"] = ramp * args.adversarial_weight
        loss = sum(weights[name] * value for name, value in losses.items())
        if model.training:
            self._log_losses(losses, output, temperature, inputs["input_ids"])
        elif self._statistics is not None:
            verdicts = self._verdicts(teacher, output, labels) if adversarial else None
            self._statistics.add(pruned, output, inputs, losses | {"loss": loss}, verdicts)
        return (loss, output) if return_outputs else loss

    def _anneal(self) -> float:
        """Sets the temperature that belongs to this step, and returns it."""
        args, pruned = self.args, self.unwrapped_model
        temperature = annealed_temperature(
            self.progress, args.temperature_start, args.temperature_end, args.temperature_anneal_rate
        )
        for module in (pruned, pruned.token_merger, pruned.layer_pruner):
            if module is not None:
                module.temperature = temperature
        return temperature

    def _log_losses(self, losses, output, temperature: float, input_ids: torch.Tensor) -> None:
        merger = {k: v for k, v in losses.items() if k.startswith("merge_")}
        if output.merge_kept_tokens is not None:
            merger["kept_tokens"] = output.merge_kept_tokens
        self.log_scalars("token_merger", merger)
        self.log_scalars("layer_pruners", {k: v for k, v in losses.items() if k not in merger})
        self.log_scalars("pruning", {"temperature": temperature})
        self._log_documented({"temperature": temperature})
        tokens = {
            f"tokens_layer_{n}": (index >= 0).sum(-1).float().mean() for n, index in enumerate(output.kept_index)
        }
        self.log_scalars("pruning", tokens)
        for layer, mask, kept in vision_masks(self.unwrapped_model, output, input_ids):
            self.log_scalars("pruning", {f"kept_from_layer_{layer}": kept.mean()})
            if len(mask):
                self.log_scalars(f"mask_layer_{layer}", mask_statistics(mask))

    def _log_documented(self, values: dict[str, Any]) -> None:
        """Logs under names without a prefix, which the trackers get as they are."""
        for name, value in values.items():
            self._scalars[TrackerName(name)].append(torch.as_tensor(value).detach().float())

    def _states(self, output) -> list[torch.Tensor]:
        layers = self.accelerator.unwrap_model(self.discriminator).config.layers
        depth = len(output.hidden_states)
        if any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"The discriminator reads states {layers}, but the model has {depth}; set its layers.")
        return [output.hidden_states[layer] for layer in layers]

    def _adversarial(self, teacher, output, labels) -> torch.Tensor:
        """Generator loss; remembers both sides for the discriminator's own step."""
        critic = self.accelerator.unwrap_model(self.discriminator)
        answers = labels != -100
        fake = self._states(output)
        critic.requires_grad_(False)
        loss = F.softplus(-critic(fake, answers)).mean()
        critic.requires_grad_(True)
        self._pair = (
            [torch.cat([real.detach(), f.detach()]) for real, f in zip(self._states(teacher), fake)],
            torch.cat([answers, answers]),
        )
        return loss

    def _verdicts(self, teacher, output, labels) -> tuple[torch.Tensor, torch.Tensor]:
        """The discriminator's logits of the unpruned and of the pruned states, both `(batch,)`."""
        critic = self.accelerator.unwrap_model(self.discriminator)
        was_training, answers = critic.training, labels != -100
        critic.eval()
        verdicts = critic(self._states(teacher), answers), critic(self._states(output), answers)
        critic.train(was_training)
        return verdicts

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.discriminator is not None:
            self._discriminator_step()
        return loss

    def _discriminator_step(self) -> None:
        states, answers = self._pair
        half = len(answers) // 2
        sync = self.accelerator.sync_gradients
        with contextlib.nullcontext() if sync else self.accelerator.no_sync(self.discriminator):
            logits = self.discriminator(states, answers)
            values = discriminator_losses(logits[:half], logits[half:])
            ((values["real_loss"] + values["fake_loss"]) / self.args.gradient_accumulation_steps).backward()
        if sync:
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.args.max_grad_norm or float("inf"))
            self.discriminator_optimizer.step()
            self.discriminator_scheduler.step()  # type: ignore[union-attr]
            self.discriminator_optimizer.zero_grad()
            # Drawn from the step number, so that all ranks and a resumed run agree.
            draw = torch.rand((), generator=torch.Generator().manual_seed(self.args.seed + self.state.global_step))
            if draw < self.args.discriminator_reinit_probability:
                self._reinitialize_discriminator()
        self.log_scalars("discriminator", values)
        self._log_documented({f"disc_{name}": values[name] for name in ("prob_real", "prob_fake")})

    def _reinitialize_discriminator(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + self.state.global_step)
            self.accelerator.unwrap_model(self.discriminator).reinitialize()
        self.discriminator_optimizer.state.clear()

    # ------------------------------------------------------------------ evaluation and the end
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and for `compute_metrics` the answers' logits with tokens really removed, as `answer_rows` has them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            logits = self.unwrapped_model(**inputs, pruning_mode="hard").logits
        predicts = inputs["labels"][:, 1:] != -100
        return loss, *answer_rows(logits[:, :-1][predicts].float(), inputs["labels"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Generated answers of the unpruned and of the softly and really pruned model, and one soft pass with the answers.

        Returns:
            `accuracy_baseline` (the base as it was before training), `accuracy_soft`, `accuracy_hard`; of hard mode one
            accuracy per question type, `flops_ratio`, `sequence_kept`, and `accuracy_under_budget`: the accuracy where
            `flops_ratio <= flops_budget`, else minus the excess; `bleu_...` (see `named_metrics`); `avg_original_tokens`,
            `avg_merged_tokens` (vision tokens that enter the language model) and their ratio `keep_ratio_merge`;
            `temperature`; of the soft pass the losses,
            `mask_{mean,std,min,max}` over the vision tokens, the same per layer, and, with a discriminator,
            `real_loss`, `fake_loss`, `disc_prob_real`, `disc_prob_fake`.
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
            # Hard mode last: `token_report()` then tells of it.
            soft, result = self._evaluate_mode(rows, "soft"), self._evaluate_mode(rows, "hard")
            others = {}
            if self.compute_metrics is not None:
                others = self.loss_and_predictions(rows, ignore_keys, metric_key_prefix)
        accuracy, ratio = result["accuracy"]["all"], result["flops_ratio"]
        over = ratio - self.args.flops_budget
        # Soft mode removes nothing after the merger: its first layer sees the merged tokens.
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
        """The base without its adapters, which training does not change: measured once."""
        if self._baseline is None or self._baseline[0] is not rows:
            with adapters_disabled(self.unwrapped_model):
                self._baseline = rows, self._evaluate_mode(rows, "origin")
        return self._baseline[1]

    def _soft_statistics(self, rows) -> dict[str, float]:
        """One soft pass over the rows with their answers, without noise, on every rank."""
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
        """Adds the adapters into the base weights for good; `save_pretrained` stores the base from then on."""
        merge_lora(self.unwrapped_model)
