"""The discriminator of token pruning, which learns to tell hidden states of the unpruned and the pruned model apart."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from ..models.modeling_pruning_discriminator import PruningDiscriminator
from .pruning_arguments import TokenPruningTrainingArguments
from .pruning_statistics import discriminator_losses
from .sharding import no_sync, replicate


class PruningAdversary:
    """A discriminator with its optimizer and schedule; `step` runs once per micro-batch of the pruned model.

    Args:
        discriminator: a `PruningDiscriminator`, which is put into training mode.
        args: arguments of the trainer.
        accelerator: accelerator of the trainer; it wraps the discriminator for distributed training.

    Attributes:
        network: the wrapped discriminator.
        pair: hidden states and answer mask of the last `generator_loss`, unpruned rows first, for `step`.
    """

    def __init__(
        self, discriminator: PruningDiscriminator, args: TokenPruningTrainingArguments, accelerator: Accelerator
    ):
        self.args, self.accelerator = args, accelerator
        self.network: Any = replicate(accelerator, discriminator.train())
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.discriminator_learning_rate)
        self.scheduler: LambdaLR | None = None
        self.pair: tuple[list[torch.Tensor], torch.Tensor] | None = None

    @property
    def unwrapped(self) -> Any:
        """The discriminator without its DDP wrapper."""
        return self.accelerator.unwrap_model(self.network)

    def create_scheduler(self, num_training_steps: int) -> None:
        """Makes the schedule of the discriminator's learning rate: cosine if `lr_scheduler_type` is, else linear."""
        if self.scheduler is None:
            cosine = "cosine" in str(self.args.lr_scheduler_type)
            make = get_cosine_schedule_with_warmup if cosine else get_linear_schedule_with_warmup
            self.scheduler = make(self.optimizer, self.args.get_warmup_steps(num_training_steps), num_training_steps)

    def auxiliary_state(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume the discriminator."""
        state = {"discriminator": self.unwrapped, "discriminator_optimizer": self.optimizer}
        return state if self.scheduler is None else state | {"discriminator_scheduler": self.scheduler}

    def states(self, output) -> list[torch.Tensor]:
        """The hidden states that the discriminator reads, each `(batch, length, hidden)`.

        Raises:
            ValueError: the discriminator's `layers` name hidden states that the model does not have.
        """
        layers = self.unwrapped.config.layers
        depth = len(output.hidden_states)
        if any(not -depth <= layer < depth for layer in layers):
            raise ValueError(
                f"The discriminator reads hidden states {layers}, but the model has {depth}; set discriminator.layers."
            )
        return [output.hidden_states[layer] for layer in layers]

    def generator_loss(self, teacher, output, labels: torch.Tensor) -> torch.Tensor:
        """−log D(fake), where D(fake) is the probability of "unpruned" for pruned states; keeps `pair` for `step`."""
        critic, answers, fake = self.unwrapped, labels != -100, self.states(output)
        critic.requires_grad_(False)
        loss = F.softplus(-critic(fake, answers)).mean()
        critic.requires_grad_(True)
        states = [torch.cat([real.detach(), f.detach()]) for real, f in zip(self.states(teacher), fake)]
        self.pair = states, torch.cat([answers, answers])
        return loss

    def verdicts(self, teacher, output, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The discriminator's logits for the unpruned and for the pruned model's states, both `(batch,)`."""
        critic, answers = self.unwrapped, labels != -100
        was_training = critic.training
        critic.eval()
        verdicts = critic(self.states(teacher), answers), critic(self.states(output), answers)
        critic.train(was_training)
        return verdicts

    def step(self, seed: int) -> dict[str, torch.Tensor]:
        """One micro-batch: always a backward pass, an optimizer step at the last micro-batch.

        Args:
            seed: seed of this optimizer step, the same on all ranks; it decides whether the weights are drawn anew.

        Returns:
            `discriminator_losses` of the batch.
        """
        assert self.pair is not None and self.scheduler is not None
        states, answers = self.pair
        half, last = len(answers) // 2, self.accelerator.sync_gradients
        with contextlib.nullcontext() if last else no_sync(self.accelerator, self.network):
            logits = self.network(states, answers)
            values = discriminator_losses(logits[:half], logits[half:])
            ((values["real_loss"] + values["fake_loss"]) / self.args.gradient_accumulation_steps).backward()
        if last:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm or float("inf"))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
            if draw < self.args.discriminator_reinit_probability:
                self.reinitialize(seed)
        return values

    def reinitialize(self, seed: int) -> None:
        """Draws the discriminator's weights anew and forgets the moments of its optimizer."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.unwrapped.reinitialize()
        self.optimizer.state.clear()
