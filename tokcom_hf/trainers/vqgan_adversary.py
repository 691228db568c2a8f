"""The discriminator in VQGAN training: its losses, regularisers, optimizer and step."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from tokcom_hf.models.vqgan_code_search import all_reduce, world_size

from .sharding import no_sync, replicate


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str) -> torch.Tensor:
    """`hinge`: ½[E max(0, 1 − D(x)) + E max(0, 1 + D(x̂))]; `non_saturating`: ½[E softplus(−D(x)) + E softplus(D(x̂))]."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: torch.Tensor, kind: str) -> torch.Tensor:
    """`hinge`: −E D(x̂); `non_saturating`: E softplus(−D(x̂))."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor, limit: float
) -> torch.Tensor:
    """‖∇ reconstruction‖ / ‖∇ adversarial‖ at the last decoder layer, at most `limit` (2012.09841, eq. 7).

    The gradients are averaged over ranks, so that every rank gets the same weight as one process with the whole batch.
    """
    losses = (reconstruction, adversarial)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    first, second = all_reduce(torch.stack(gradients)) / world_size()
    return (first.norm() / (second.norm() + 1e-6)).clamp(0.0, limit).detach()


class LeCAM:
    """LeCAM regulariser (2104.03310): pulls D(x) and D(x̂) towards each other's moving averages."""

    def __init__(self, decay: float = 0.99):
        self.decay = decay
        self.real = self.fake = 0.0
        self.started = False

    def update(self, real: float, fake: float) -> None:
        """Takes the mean D(x) and D(x̂) of one optimizer step."""
        keep = self.decay if self.started else 0.0
        self.real = keep * self.real + (1 - keep) * real
        self.fake = keep * self.fake + (1 - keep) * fake
        self.started = True

    def penalty(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """E max(0, D(x) − ema_fake)² + E max(0, ema_real − D(x̂))²."""
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    def state_dict(self) -> dict:
        return {"real": self.real, "fake": self.fake, "started": self.started}

    def load_state_dict(self, state: dict) -> None:
        self.real, self.fake, self.started = state["real"], state["fake"], state["started"]


class Adversary:
    """A discriminator with its optimizer and regulariser; `step` runs once per micro-batch of the generator.

    Args:
        discriminator: `VQGANDiscriminator`.
        args: `VQGANTrainingArguments`.
        accelerator: accelerator of the trainer; it wraps the discriminator for distributed training.
    """

    def __init__(self, discriminator: nn.Module, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.network = discriminator.to(accelerator.device)
        self.wrapped = replicate(accelerator, self.network)
        rate = args.discriminator_learning_rate or args.learning_rate
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate, betas=(0.5, 0.9), weight_decay=0.0)
        self.lecam = LeCAM()
        self._means: list[torch.Tensor] = []

    def generator_loss(self, fake: torch.Tensor) -> torch.Tensor:
        """Adversarial loss of reconstructions `(batch, channels, height, width)`, by the frozen, unwrapped discriminator."""
        self.network.requires_grad_(False)
        loss = generator_loss(self.network(fake).logits.float(), self.args.gan_loss)
        self.network.requires_grad_(True)
        return loss

    def step(self, real: torch.Tensor, fake: torch.Tensor, rate_scale: float) -> dict[str, torch.Tensor]:
        """One micro-batch: always a backward pass, an optimizer step at the last micro-batch.

        Args:
            real, fake: targets and reconstructions, `(batch, channels, height, width)`.
            rate_scale: factor of the learning rate at this step.

        Returns:
            Losses and mean logits, for the log.
        """
        args, synchronise = self.args, self.accelerator.sync_gradients
        context = contextlib.nullcontext() if synchronise else no_sync(self.accelerator, self.wrapped)
        real = real.detach().requires_grad_(args.gan_regularizer == "r1")
        with context:
            with self.accelerator.autocast():
                # One forward pass for both, because DDP allows only one before a backward pass.
                logits = self.wrapped(torch.cat([real, fake.detach()])).logits.float()
            real_logits, fake_logits = logits.split([len(real), len(fake)])
            loss = discriminator_loss(real_logits, fake_logits, args.gan_loss)
            regularizer = loss.new_zeros(())
            if args.gan_regularizer == "lecam" and self.lecam.started:
                regularizer = self.lecam.penalty(real_logits, fake_logits)
            elif args.gan_regularizer == "r1":
                slope = torch.autograd.grad(real_logits.sum(), real, create_graph=True)[0]
                regularizer = slope.square().flatten(1).sum(1).mean()
            total = (loss + args.gan_regularizer_weight * regularizer) / args.gradient_accumulation_steps
            total.backward()
        self._means.append(torch.stack([real_logits.mean(), fake_logits.mean()]).detach())
        if synchronise:
            self._apply(rate_scale)
        return {
            "discriminator_loss": loss.detach(),
            "discriminator_regularizer": regularizer.detach(),
            "logits_real": real_logits.mean().detach(),
            "logits_fake": fake_logits.mean().detach(),
        }

    def _apply(self, rate_scale: float) -> None:
        means = self.accelerator.reduce(torch.stack(self._means).mean(0), "mean")
        self._means = []
        self.lecam.update(*means.tolist())
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm)
        base = self.args.discriminator_learning_rate or self.args.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = base * rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
