"""A codebook that is learned by moving averages and whose dead codes are reset onto data.

Sources: VQ-VAE 1711.00937 (moving averages); CVQ-VAE 2307.15139 (dead codes move onto data); DeSieno, "Adding a conscience
to competitive learning", ICNN 1988 (a penalty on the distance to codes that are used too often).
"""

import math

import torch
import torch.nn.functional as F

from .vqgan_code_search import (
    all_reduce,
    check_finite,
    cluster_sums,
    code_scores,
    gather_rows,
    kmeans,
    nearest_codes,
    sample_rows,
    world_size,
)
from .vqgan_distance_scale import distance_scale, step_scale
from .vqgan_quantizer_base import Quantizer

KMEANS_ITERATIONS = 10
# Vectors kept per step and rank for dead codes to move onto.
RESET_POOL = 16384


class EMAQuantizer(Quantizer):
    """A learned codebook: code k is code_sum_k / code_share_k, moving averages of (Σ x over its vectors) / n and of n_k / n.

    n counts the vectors of an optimizer step and n_k those that chose code k. Division by n makes codes independent of batch
    size, gradient accumulation and number of ranks.
    """

    codebook: torch.Tensor
    code_sum: torch.Tensor
    code_share: torch.Tensor
    ema_weight: torch.Tensor
    num_updates: torch.Tensor
    initialized: torch.Tensor
    penalty: torch.Tensor | None

    def __init__(self, config, input_size: int):
        super().__init__(config, input_size, config.codebook_dim)
        self.config = config
        self.cosine = config.codebook_similarity == "cosine"
        self.temperature = float(config.temperature)
        self.register_buffer("codebook", torch.zeros(config.codebook_size, self.width))
        self.register_buffer("code_sum", torch.zeros(config.codebook_size, self.width))
        self.register_buffer("code_share", torch.zeros(config.codebook_size))
        self.register_buffer("ema_weight", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        # Added to the squared distance to each code. Registered only if balance_rate > 0: other checkpoints lack this key.
        self.register_buffer("penalty", torch.zeros(config.codebook_size) if config.balance_rate else None)
        self._error: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._pool: list[torch.Tensor] = []
        # Means over the whole optimizer step, known after `look_ahead` at its micro-batches.
        self._mean_assignment: torch.Tensor | None = None
        self._step_scale: torch.Tensor | None = None
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Draws codes uniformly in ±1/K; the inits `data` and `kmeans` replace them at the first vectors."""
        super().reset_buffers()
        size = self.codebook_size
        self.codebook.uniform_(-1 / size, 1 / size)
        if self.cosine:
            self.codebook.copy_(F.normalize(self.codebook, dim=1))
        # The arbitrary start has no weight in the averages.
        self._restart_average(torch.full_like(self.code_share, 1 / size), weight=0.0)
        self.num_updates.zero_()
        self.initialized.fill_(self.config.codebook_init == "uniform")
        if self.penalty is not None:
            self.penalty.zero_()

    def _restart_average(self, share: torch.Tensor, weight: float) -> None:
        self.ema_weight.fill_(weight)
        self.code_share.copy_(share * self.ema_weight)
        self.code_sum.copy_(self.codebook * self.code_share[:, None])

    # ---------------------------------------------------------------- choosing codes
    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=1) if self.cosine else vectors

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook.float()[codes]

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        return nearest_codes(vectors, self.codebook.float(), self.penalty)

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and self.enabled and not self.initialized:
            self.initialize(gather_rows(vectors.detach()))
        if self.training and self.enabled and self.temperature > 0:
            codes = self.sample_codes(vectors.detach())
        else:
            codes = self.nearest(vectors.detach())
        return codes, self.codebook.float()[codes]

    def distance_scale(self, vectors: torch.Tensor) -> torch.Tensor:
        """Divisor of squared distances as `temperature_scale` says; after `look_ahead` that of the whole optimizer step."""
        if self.training and self._step_scale is not None:
            return self._step_scale
        return distance_scale(self.config.temperature_scale, vectors, self.codebook.float())

    def assignment_logits(self, vectors: torch.Tensor, temperature: float, scale: torch.Tensor) -> torch.Tensor:
        """−(‖x − e‖² + penalty) / (temperature · scale) up to a constant per row, `(n, k)`."""
        # A copy, because the update changes the codebook in place before the backward pass needs it.
        return 2 * code_scores(vectors, self.codebook.float().clone(), self.penalty) / (temperature * scale)

    @torch.no_grad()
    def sample_codes(self, vectors: torch.Tensor) -> torch.Tensor:
        """Draws codes from softmax(logits) with the Gumbel-max trick, in chunks of rows."""
        rows, scale = max(1, (1 << 22) // self.codebook_size), self.distance_scale(vectors)
        codes = []
        for part in vectors.split(rows):
            logits = self.assignment_logits(part, self.temperature, scale)
            codes.append((logits - torch.empty_like(logits).exponential_().clamp_min_(1e-20).log_()).argmax(1))
        return torch.cat(codes)

    def soft_assignments(self, vectors: torch.Tensor) -> torch.Tensor:
        """Log probabilities `(≤ n, codebook_size)` of the codes at `entropy_temperature`."""
        # Every stride-th vector keeps the table below 2^24 entries; a random choice would change other random draws.
        stride = math.ceil(vectors.shape[0] * self.codebook_size / (1 << 24))
        scale = self.distance_scale(vectors)
        return self.assignment_logits(vectors[::stride], self.config.entropy_temperature, scale).log_softmax(1)

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.entropy_losses(vectors)[0]

    def entropy_losses(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = self.soft_assignments(vectors)
        p = log_p.exp()
        per_sample = -(p * log_p).sum(1).mean() if self.config.entropy_term == "choice" else p.new_zeros(())
        mean_p = p.mean(0)
        global_mean = self._mean_assignment
        # In training only: a rank that evaluates alone would wait for the other ranks forever.
        if self.training and global_mean is None and world_size() > 1:
            global_mean = all_reduce(mean_p.detach().clone()) / world_size()
        if self.training and global_mean is not None:
            # Value of the global batch, gradient of this part alone; the trainer averages gradients over the parts.
            mean_p = mean_p + (global_mean - mean_p).detach()
        batch, largest = -(mean_p * mean_p.clamp_min(1e-12).log()).sum(), math.log(self.codebook_size)
        return (per_sample - batch) / largest, 1 - batch / largest

    @torch.no_grad()
    def look_ahead(self, micro_batches: list[torch.Tensor]) -> None:
        self._step_scale = step_scale(self.config.temperature_scale, micro_batches, self.codebook.float())
        means = torch.stack([self.soft_assignments(vectors).exp().mean(0) for vectors in micro_batches])
        self._mean_assignment = all_reduce(means.mean(0)) / world_size()

    # ---------------------------------------------------------------- moving codes
    @torch.no_grad()
    def initialize(self, vectors: torch.Tensor) -> None:
        """Places the codes on prepared vectors `(n, width)`, which must be the same on every rank.

        Raises:
            ValueError: vectors are NaN or infinite; the codebook stays as it was.
        """
        size = self.codebook_size
        iterations = KMEANS_ITERATIONS if self.config.codebook_init == "kmeans" else 0
        centres, count = kmeans(vectors.float(), size, iterations, spherical=self.cosine)
        self.codebook.copy_(centres)
        # Each share is half cluster size and half even, so that a code without vectors in this sample is not dead yet.
        self._restart_average((count / count.sum() + 1 / size) / 2, weight=1.0)
        if self.penalty is not None:
            self.penalty.zero_()
        self.initialized.fill_(True)

    @torch.no_grad()
    def record(self, codes: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        count, total = cluster_sums(vectors, codes, self.codebook_size)
        self._pending = count if self._pending is None else self._pending.add_(count)
        self._sum = total if self._sum is None else self._sum.add_(total)
        if self.penalty is not None:
            error = vectors.new_zeros(self.codebook_size).index_add_(0, codes, (vectors - chosen).square().sum(1))
            self._error = error if self._error is None else self._error.add_(error)
        if self.config.reset_fraction > 0:
            room = RESET_POOL - sum(len(part) for part in self._pool)
            if room > 0:
                self._pool.append(vectors[:room])

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Moves the codes by what was recorded since the last call, then resets dead codes; once per optimizer step."""
        self._mean_assignment, self._step_scale = None, None
        if self._pending is None:
            return
        super().update()
        if self._sum is None:
            return
        assert self.last_count is not None
        number = self.last_count.sum().clamp_min(1)
        blend = 1 - self.config.ema_decay
        self.code_sum.lerp_(all_reduce(self._sum).div_(number), blend)
        self.code_share.lerp_(self.last_count / number, blend)
        self.ema_weight.lerp_(torch.ones_like(self.ema_weight), blend)
        self._sum = None
        self._place(self.code_share > 1e-9)
        if self.penalty is not None and self._error is not None:
            self._balance(all_reduce(self._error), self.last_count)
            self._error = None
        self.num_updates += 1
        pool, self._pool = self._pool, []
        interval = self.config.reset_interval
        due = allow_reset and (interval == 0 or int(self.num_updates) % interval == 0)
        if pool and due:
            self.reset_dead_codes(gather_rows(torch.cat(pool)), int(number))

    def _place(self, which: torch.Tensor) -> None:
        moved = self.code_sum / self.code_share.clamp_min(1e-12)[:, None]
        if self.cosine:
            moved = F.normalize(moved, dim=1)
        self.codebook.copy_(torch.where(which[:, None], moved, self.codebook))

    def _balance(self, error: torch.Tensor, count: torch.Tensor) -> None:
        """Raises the penalty of codes that were chosen too often, and lowers that of the others.

        penalty_k += balance_rate · min(d_k, d) · min(n_k · K / n − 1, 1), with the mean squared distance d_k of the code's
        vectors and d of all: in dense regions, where d_k is small, steps of size d would throw vectors from code to code.

        Args:
            error: sum of the squared distances of each code's vectors, `(k,)`.
            count: number of each code's vectors, `(k,)`.
        """
        mean = error.sum() / count.sum().clamp_min(1)
        local = torch.where(count > 0, error / count.clamp_min(1), mean).clamp_max(mean)
        excess = (count / count.sum().clamp_min(1) * self.codebook_size - 1).clamp_max(1)
        self.penalty.add_(self.config.balance_rate * local * excess)

    def dead_codes(self, vectors_per_step: int) -> torch.Tensor:
        """Mask `(codebook_size,)` of codes whose average use is below the threshold."""
        share = self.code_share / self.ema_weight.clamp_min(1e-12)
        unit = self.codebook_size if self.config.dead_code_unit == "mean" else vectors_per_step
        return share * unit < self.config.dead_code_threshold

    @torch.no_grad()
    def reset_dead_codes(self, pool: torch.Tensor, vectors_per_step: int) -> int:
        """Moves dead codes, the least used first, onto vectors of the pool; live codes stay.

        Vectors are drawn uniformly without replacement, so that codes land where vectors are dense; drawn by their error,
        codes would land on outliers.

        Args:
            pool: vectors `(n, width)`, the same on every rank.
            vectors_per_step: vectors of one optimizer step over all ranks.

        Returns:
            Number of codes moved, at most `reset_fraction` of the codebook.

        Raises:
            ValueError: vectors of the pool are NaN or infinite; no code is moved.
        """
        check_finite(pool, "The reset of dead codes")
        dead = self.dead_codes(vectors_per_step).nonzero().flatten()
        limit = int(self.config.reset_fraction * self.codebook_size)
        if len(dead) == 0 or limit == 0:
            return 0
        dead = dead[self.code_share[dead].argsort(stable=True)][:limit]
        chosen = sample_rows(pool.new_ones(len(pool)), len(dead), 1_000_003 * int(self.num_updates))
        dead = dead[: len(chosen)]
        vectors = pool[chosen]
        if self.penalty is not None:
            # A moved code gets the penalty of the code that its vector chose; without, it would attract all vectors around.
            self.penalty[dead] = self.penalty[nearest_codes(vectors, self.codebook.float(), self.penalty)]
        self.codebook[dead] = vectors
        self.code_share[dead] = self.ema_weight / self.codebook_size
        self.code_sum[dead] = vectors * self.code_share[dead][:, None]
        self.usage[dead] = self.usage_weight / self.codebook_size
        return len(dead)

    @torch.no_grad()
    def expand(self, codebook_size: int) -> None:
        """Grows the codebook: old codes keep their ids and vectors, new ones start beside the most used."""
        old = self.codebook_size
        extra = codebook_size - old
        generator = torch.Generator().manual_seed(old)
        order = self.code_share.argsort(descending=True, stable=True)
        parents = order[torch.arange(extra, device=order.device) % old]
        spread = self.codebook.std(0, keepdim=True) if old > 1 else self.codebook.abs()
        noise = torch.randn(extra, self.width, generator=generator).to(self.codebook)
        children = self.codebook[parents] + 0.1 * spread * noise
        if self.cosine:
            children = F.normalize(children, dim=1)
        share = self.ema_weight / codebook_size
        self.codebook = torch.cat([self.codebook, children])
        self.code_share = torch.cat([self.code_share, share.expand(extra)])
        self.code_sum = torch.cat([self.code_sum, children * share])
        self.usage = torch.cat([self.usage, self.usage.new_zeros(extra)])
        if self.penalty is not None:
            self.penalty = torch.cat([self.penalty, self.penalty[parents]])
        self.codebook_size = codebook_size
        self._pending, self._sum, self._error, self._pool = None, None, None, []
