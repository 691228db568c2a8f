"""Distils a TokCom flow into few steps: the student predicts in one step where the teacher's flow ends."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..evaluation.tokcom_denoising import denoising_metrics
from ..models.tokcom_context_encoder import TextBefore, read_before
from ..models.tokcom_denoise import Denoised, PathPoint, Predictions, denoise, with_parts
from ..models.tokcom_flow_matching import denoising_steps, sample, small_times, step_times
from ..models.tokcom_objective import block_shape, block_starts
from ..models.tokcom_token_order import without_order
from .tokcom import FlowTrainer, draw_blocks, evaluation_blocks
from .tokcom_arguments import DenoiserTrainingArguments
from .tokcom_samples import Tables, flow_samples


@dataclass
class DistillationTrainingArguments(DenoiserTrainingArguments):
    """Arguments of the distillation stage."""

    student_steps: int = field(default=2, metadata={"help": "Steps per block that the distilled model takes."})
    teacher_steps: int = field(default=8, metadata={"help": "Steps of the teacher from noise to clean latents."})
    token_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy, in nats per token, to the teacher's tokens."}
    )
    student_power: float | None = field(
        default=None,
        metadata={"help": "The student's times are u^student_power for equal steps of u; none: those of the teacher."},
    )
    sample_steps: int | None = field(  # type: ignore[assignment] # The denoiser's default is a number.
        default=None,
        metadata={"help": "Flow steps of the samples shown during training; by default student_steps."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.student_steps < self.teacher_steps:
            raise ValueError(
                f"student_steps must be at least 1 and fewer than teacher_steps, got {self.student_steps} and "
                f"{self.teacher_steps}."
            )
        if self.student_power is not None and not self.student_power > 0:
            raise ValueError(f"student_power must be above 0, got {self.student_power}.")
        if self.student_power is not None and self.student_steps == 1:
            raise ValueError(
                "student_power moves times between steps; with student_steps=1 there are none, leave it out."
            )


class FewStepStudent(nn.Module):
    """What learns to do with few steps: copies of a teacher's denoiser and recent tokens.

    `forward` is the denoiser's.
    """

    def __init__(self, teacher: Any):
        super().__init__()
        self.denoiser = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        self.recent = None if teacher.recent is None else copy.deepcopy(teacher.recent).requires_grad_(True)

    def forward(self, *args, **kwargs):
        return self.denoiser(*args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """What `Trainer` calls for `gradient_checkpointing`; recent tokens have no layers to compute again."""
        self.denoiser.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """The same under the name that later versions of transformers call."""
        self.denoiser.activation_checkpointing_enable(**kwargs)


class DistillationTrainer(FlowTrainer):
    """Trains a student to do in `student_steps` steps what the teacher's flow does in `teacher_steps`.

    Each batch draws one of the student's times t, and the student itself samples x_t, as in generation. With "multirate" t
    is any small time between two calls, because the call before it serves that small step, too. With x1 the end of the
    teacher's flow from the same x_t:

        loss = |student(x_t, t) − x1|² + token_weight · cross-entropy of decoder(student(x_t, t)) to the tokens decoder(x1)

    With a `TokenPosterior`, the cross-entropy is that of the student's posterior to these tokens.

    Args:
        model: the `FewStepStudent`; None copies the teacher's parts.
        teacher: the `TokComModel` to follow; its weights are frozen.

    Raises:
        ValueError: there is no teacher.
    """

    args: DistillationTrainingArguments
    arguments_class = DistillationTrainingArguments
    stage = "distillation"

    def __init__(self, model=None, args=None, *positional, teacher: Any = None, **kwargs):
        if teacher is None:
            raise ValueError("DistillationTrainer needs the trained TokComModel to follow: pass teacher=...")
        # The heads alone take the first step, but recent tokens correct what they say in its small steps.
        corrected = teacher.recent is not None and teacher.config.sampler == "multirate"
        self.first_place = int(teacher.config.heads_first and not corrected)
        if self.first_place and args is not None and args.student_steps == 1:
            raise ValueError(
                "Nothing learns in a step of the heads that no recent tokens correct (recent_size, sampler='multirate'): "
                "with heads_first the heads take the first step; student_steps must be at least 2, got 1."
            )
        super().__init__(FewStepStudent(teacher) if model is None else model, args, *positional, **kwargs)
        # The student's gradients pass through parts of the teacher, whose own nobody uses.
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.student_config = copy.deepcopy(teacher.config)
        self.student_config.num_steps = self.args.student_steps
        if self.args.student_power is not None:
            self.student_config.step_power, self.student_config.step_quantiles = self.args.student_power, False
        self.times = step_times(self.student_config, self.args.student_steps)

    def distilled(self) -> Any:
        """A copy of the teacher with the student's parts; `generate` takes `student_steps` steps by default."""
        model = copy.deepcopy(with_parts(self.teacher, **self.unwrapped_model._modules)).requires_grad_(True)
        model.config = copy.deepcopy(self.student_config)
        # A number in generation_config would take precedence over config.num_steps.
        model.generation_config.num_steps = None
        return model.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, ids, args = self.teacher, inputs["input_ids"], self.args
        config, rows = teacher.config, len(ids)
        generator = self.noise_generator(model.training)
        blocks = evaluation_blocks(config, ids.shape[1])
        if model.training:
            blocks = draw_blocks(config, ids.shape[1], generator)
        shape = block_shape(config, ids.shape[1], **blocks)
        noise, *fresh = (
            self.local_rows(rows, lambda n: torch.randn((n, *shape), generator=generator)).flatten(0, 1)
            * config.noise_std
            for _ in range(args.student_steps)
        )
        place = int(torch.randint(self.first_place, args.student_steps, (), generator=generator))
        now = self.times[place]
        where = {name: blocks[name] for name in ("offset", "draw_shift", "block_stride") if name in blocks}
        starts = block_starts(config, shape, **where).to(ids.device)
        real = self._real_chunks(inputs["attention_mask"], starts, shape)
        with torch.no_grad():
            _, before = read_before(teacher, ids, starts)
            # The denoiser by way of its wrapper, which gathers the gradients of all processes.
            learning = with_parts(teacher, denoiser=model, recent=self.unwrapped_model.recent)
            student = self._predictions(learning, before, real)
            x = self._arrive(student, noise, fresh, place)
            at, earlier = now, student.earlier
            if config.sampler == "multirate":
                # The call at `now` serves the small steps up to the next call, so it learns from any of them.
                times = small_times(now, self.times[place + 1])[:-1]
                if config.heads_first and now == 0:
                    times = times[1:]
                at = times[int(torch.randint(len(times), (), generator=generator))]
            if at > now:
                earlier = PathPoint(x, torch.full((len(x),), now, device=x.device))
                x = sample(student, x, [now, at], config.sampler)
            remaining = step_times(config, denoising_steps(args.teacher_steps, at), at)
            # One end for each x: the stochastic sampler has none.
            sampler = "euler" if config.sampler == "renoise" else config.sampler
            target = sample(self._predictions(teacher, before, real), x, remaining, sampler)
            tokens = teacher.decode(teacher.unstandardize(target)).unflatten(1, (shape[1], -1))
            tokens = tokens.masked_fill(~real.unsqueeze(-1), -100)
        found = student.predict(x, at, earlier, tokens)
        predicted, entropy = found.clean_latents, found.cross_entropy
        error = without_order(teacher, predicted.float() - target.float()).square().mean(dim=-1)
        error = (error * real).sum() / real.sum().clamp(min=1)
        if entropy is None:
            latents = teacher.unstandardize(predicted).flatten(0, 1).to(teacher.vae.lm_head.weight.dtype)
            entropy = teacher.vae.cross_entropy(teacher.vae.decode_hidden(latents), tokens)
        loss = error + args.token_weight * entropy
        if model.training:
            self.log_scalars("distillation", {"batch_mse_loss": error.detach(), "batch_ce_loss": entropy.detach()})
        return (loss, {"clean_latents": predicted}) if return_outputs else loss

    def _real_chunks(self, attention_mask: torch.Tensor, starts: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """True for chunks that hold a token and not padding alone, `(rows · blocks, chunks)`."""
        span = shape[1] * self.teacher.config.vae.chunk_size
        tokens = (starts[..., None] + torch.arange(span, device=starts.device)).flatten()
        return attention_mask[:, tokens].view(-1, shape[1], self.teacher.config.vae.chunk_size).bool().any(dim=-1)

    def _predictions(self, model: Any, before: TextBefore | None, real: torch.Tensor) -> Predictions:
        """Those of a `TokComModel` along one flow; `predict` also takes the tokens whose cross-entropy is asked for."""
        # Chunks do not attend to padding. A block of padding alone attends to itself, because softmax needs a key.
        mask = None if real.shape[1] == 1 else (real | ~real.any(dim=-1, keepdim=True)).long()

        def predict(
            x: torch.Tensor, t: float, earlier: Denoised | None, labels: torch.Tensor | None = None
        ) -> Denoised:
            time = torch.full((1,), t, device=x.device)
            return denoise(model, x, time, before, earlier, mask, labels)

        return Predictions(model, predict)

    def _arrive(
        self, student: Predictions, noise: torch.Tensor, fresh: list[torch.Tensor], place: int
    ) -> torch.Tensor:
        """The student's latents at its time number `place`, reached by the sampler that `generate` uses."""
        if self.teacher.config.sampler != "renoise":
            return sample(student, noise, self.times[: place + 1], self.teacher.config.sampler)
        x = noise
        for index in range(place):
            clean, t = student(x, self.times[index]), self.times[index + 1]
            x = (1 - t) * fresh[index] + t * clean
        return x

    def token_logits(self, outputs, rows: int) -> torch.Tensor | None:
        if self.compute_metrics is not None:
            raise ValueError("The distillation stage compares latents with the teacher's; leave compute_metrics out.")
        return None

    def accuracies(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        return denoising_metrics(self.distilled(), ids, mask, tuple(self.args.eval_times))

    @torch.no_grad()
    def sample_tables(self, decode_text: Callable[[torch.Tensor], list[str]]) -> Tables:
        """Generations, and denoised held-out text beside the original."""
        return flow_samples(self, self.distilled(), decode_text, self.args.sample_steps or self.args.student_steps)
