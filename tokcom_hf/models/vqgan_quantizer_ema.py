"""Learned codebook that follows moving averages and revives dead codes.

Sources: VQ-VAE 1711.00937 (EMA codebook), CVQ-VAE 2307.15139 (moving dead codes onto data), rotation trick 2410.06424,
equal use by a penalty on each code's distance: DeSieno, "Adding a conscience to competitive learning", ICNN 1988.
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
from .vqgan_quantizer_base import Quantizer


class EMAQuantizer(Quantizer):
    """A learned codebook: each code is the moving average of the vectors that chose it.

    Codes chosen less than the threshold move onto data vectors (`reset_dead_codes`). Shares and sums are per vector,
    not per batch, so that batch size, gradient accumulation and the number of ranks do not change their meaning.
    """

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
        # Added to squared distances to each code. Only where it is learned: other folders have no such tensor.
        self.register_buffer("penalty", torch.zeros(config.codebook_size) if config.balance_rate else None)
        self._error: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._pool: list[torch.Tensor] = []
        # Of the whole optimizer step, where its micro-batches were looked at ahead.
        self._mean_assignment: torch.Tensor | None = None
        self._step_scale: torch.Tensor | None = None
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Uniform codes in ±1/K; `data` and `kmeans` replace them with the first vectors they see."""
        super().reset_buffers()
        size = self.codebook_size
        self.codebook.uniform_(-1 / size, 1 / size)
        if self.cosine:
            self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self._restart_average(torch.full_like(self.code_share, 1 / size), known=not self.config.ema_bias_correction)
        self.num_updates.zero_()
        self.initialized.fill_(self.config.codebook_init == "uniform")
        if self.penalty is not None:
            self.penalty.zero_()

    def _restart_average(self, share: torch.Tensor, known: bool) -> None:
        self.ema_weight.fill_(1.0 if known else 0.0)
        self.code_share.copy_(share * self.ema_weight)
        self.code_sum.copy_(self.codebook * self.code_share[:, None])

    # ---------------------------------------------------------------- choosing codes
    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=1) if self.cosine else vectors

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook.float()[codes]

    def nearest(self, vectors: torch.Tensor) -> torch.LongTensor:
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
        """What squared distances are divided by, so that a temperature means the same for any width.

        √width (`temperature_scale="dim"`), the mean squared distance between vectors and codes (`"mean"`), the vectors' mean
        variance per channel (`"variance"`), or 1 (`"none"`); of the whole step where it was looked ahead.
        """
        if self.config.temperature_scale == "none":
            return torch.ones((), device=vectors.device)
        if self.config.temperature_scale == "dim":
            return torch.tensor(math.sqrt(self.width), device=vectors.device)
        if self.training and self._step_scale is not None:
            return self._step_scale
        return self._spread(vectors)

    @torch.no_grad()
    def _spread(self, vectors: torch.Tensor) -> torch.Tensor:
        # Without a gradient: features would otherwise shrink to nothing, which the commitment term likes best.
        if self.config.temperature_scale == "variance":
            return (vectors - vectors.mean(0)).square().mean().clamp_min(1e-12)
        codebook = self.codebook.float()
        squares = vectors.square().sum(1).mean() + codebook.square().sum(1).mean()
        return (squares - 2 * (vectors.mean(0) * codebook.mean(0)).sum()).clamp_min(1e-12)

    def assignment_logits(self, vectors: torch.Tensor, temperature: float, scale: torch.Tensor) -> torch.Tensor:
        """−(‖x − e‖² + penalty) / (temperature · scale) up to a constant per row, `(n, k)`."""
        # A copy: the update moves the codebook in place before the backward pass needs it.
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

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if self.config.gradient_estimator == "rotation":
            return rotate_to(vectors, chosen)
        return super().connect(vectors, chosen)

    def soft_assignments(self, vectors: torch.Tensor) -> torch.Tensor:
        """Log probabilities `(n, codebook_size)` of the codes at `entropy_temperature`, of every stride-th vector."""
        # A stride instead of a random choice keeps runs reproducible and the table below 2^24 entries.
        stride = math.ceil(vectors.shape[0] * self.codebook_size / (1 << 24))
        scale = self.distance_scale(vectors)
        return self.assignment_logits(vectors[::stride], self.config.entropy_temperature, scale).log_softmax(1)

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.entropy_losses(vectors)[0]

    def entropy_losses(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = self.soft_assignments(vectors)
        p = log_p.exp()
        per_sample = -(p * log_p).sum(1).mean()
        mean_p = p.mean(0)
        everyone = self._mean_assignment
        if self.training and everyone is None and world_size() > 1:
            everyone = all_reduce(mean_p.detach().clone()) / world_size()
        # Out of training a rank may be alone (pictures), and would wait for the others for ever.
        if self.training and everyone is not None:
            # The global batch's value with the gradient of this part of it; the trainer averages over the parts.
            mean_p = mean_p + (everyone - mean_p).detach()
        batch = -(mean_p * mean_p.clamp_min(1e-12).log()).sum()
        largest = math.log(self.codebook_size)
        sure = per_sample if self.config.entropy_term == "choice" else torch.zeros_like(per_sample)
        return (sure - batch) / largest, 1 - batch / largest

    @torch.no_grad()
    def look_ahead(self, micro_batches: list[torch.Tensor]) -> None:
        if self.config.temperature_scale == "variance":
            moments = [torch.stack([vectors.mean(0), vectors.square().mean(0)]) for vectors in micro_batches]
            first, second = all_reduce(torch.stack(moments).mean(0)) / world_size()
            self._step_scale = (second - first.square()).mean().clamp_min(1e-12)
        else:
            distances = torch.stack([self._spread(vectors) for vectors in micro_batches])
            self._step_scale = all_reduce(distances.mean()) / world_size()
        means = torch.stack([self.soft_assignments(vectors).exp().mean(0) for vectors in micro_batches])
        self._mean_assignment = all_reduce(means.mean(0)) / world_size()

    # ---------------------------------------------------------------- moving codes
    @torch.no_grad()
    def initialize(self, vectors: torch.Tensor) -> None:
        """Places the codes on the data: `(n, width)` prepared vectors, the same on every rank.

        Raises:
            ValueError: vectors that are NaN or infinite; the codebook stays as it was.
        """
        size = self.codebook_size
        iterations = self.config.kmeans_iterations if self.config.codebook_init == "kmeans" else 0
        centres, count = kmeans(
            vectors.float(), size, iterations, seed=self.config.codebook_seed, spherical=self.cosine
        )
        self.codebook.copy_(centres)
        # Half the mass goes by size, half evenly: a code without vectors in the sample is not yet a dead code.
        self._restart_average((count / count.sum() + 1 / size) / 2, known=True)
        if self.penalty is not None:
            self.penalty.zero_()
        self.initialized.fill_(True)

    @torch.no_grad()
    def record(self, codes: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        if self.config.freeze_codebook:
            return super().record(codes, vectors, chosen)
        count, total = cluster_sums(vectors, codes, self.codebook_size)
        self._pending = count if self._pending is None else self._pending.add_(count)
        self._sum = total if self._sum is None else self._sum.add_(total)
        if self.penalty is not None:
            error = vectors.new_zeros(self.codebook_size).index_add_(0, codes, (vectors - chosen).square().sum(1))
            self._error = error if self._error is None else self._error.add_(error)
        if self.config.reset_fraction > 0:
            room = self.config.reset_pool - sum(len(part) for part in self._pool)
            if room > 0:
                self._pool.append(vectors[:room])

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Moves the codes to the statistics since the last call (once per optimizer step), then revives dead codes."""
        self._mean_assignment, self._step_scale = None, None
        if self._pending is None:
            return
        super().update()
        if self._sum is None or self.config.freeze_codebook:
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
        """Makes codes dearer that were chosen too often: `error (k,)` summed squared distances of `count (k,)` vectors.

        The step is in units of a code's own mean squared distance where that is small: one that suits the sparse parts of
        the space would throw all vectors of a dense one from code to code.
        """
        mean = error.sum() / count.sum().clamp_min(1)
        local = torch.where(count > 0, error / count.clamp_min(1), mean).clamp_max(mean)
        excess = (count / count.sum().clamp_min(1) * self.codebook_size - 1).clamp_max(1)
        self.penalty.add_(self.config.balance_rate * local * excess)

    def dead_codes(self, vectors_per_step: int) -> torch.Tensor:
        """Mask `(codebook_size,)` of codes whose moving average is below the threshold."""
        share = self.code_share / self.ema_weight.clamp_min(1e-12)
        unit = self.codebook_size if self.config.dead_code_unit == "mean" else vectors_per_step
        return share * unit < self.config.dead_code_threshold

    @torch.no_grad()
    def reset_dead_codes(self, pool: torch.Tensor, vectors_per_step: int) -> int:
        """Moves dead codes, the least used first, onto vectors of the pool; live codes stay as they are.

        Args:
            pool: vectors `(n, width)`, the same on every rank. They are drawn evenly and without replacement: codes then
                land where vectors are dense and will be used. (Drawn by their error they land on outliers.)
            vectors_per_step: vectors of one optimizer step over all ranks.

        Returns:
            number of codes moved, at most `reset_fraction` of the codebook.

        Raises:
            ValueError: vectors of the pool that are NaN or infinite; no code is moved.
        """
        check_finite(pool, "The reset of dead codes")
        dead = self.dead_codes(vectors_per_step).nonzero().flatten()
        limit = int(self.config.reset_fraction * self.codebook_size)
        if len(dead) == 0 or limit == 0:
            return 0
        dead = dead[self.code_share[dead].argsort(stable=True)][:limit]
        seed = self.config.codebook_seed + 1_000_003 * int(self.num_updates)
        chosen = sample_rows(pool.new_ones(len(pool)), len(dead), seed)
        dead = dead[: len(chosen)]
        vectors = pool[chosen]
        if self.penalty is not None:
            # As dear as the code that they chose so far: a free one would take all vectors around it.
            self.penalty[dead] = self.penalty[nearest_codes(vectors, self.codebook.float(), self.penalty)]
        self.codebook[dead] = vectors
        self.code_share[dead] = self.ema_weight / self.codebook_size
        self.code_sum[dead] = vectors * self.code_share[dead][:, None]
        self.usage[dead] = self.usage_weight / self.codebook_size
        return len(dead)

    @torch.no_grad()
    def expand(self, codebook_size: int) -> None:
        """Grows the codebook; codes 0 … K−1 keep their ids and vectors, new ones start beside the most used codes."""
        old = self.codebook_size
        extra = codebook_size - old
        generator = torch.Generator().manual_seed(self.config.codebook_seed + old)
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


def rotate_to(vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns `chosen` with the gradient of the rotation and rescaling that carries `vectors` to it (2410.06424).

    With unit vectors u, q and r = (u + q)/‖u + q‖: R x = x − 2 r (r·x) + 2 q (u·x); lengths are scaled by ‖chosen‖/‖x‖.
    """
    length = vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)
    target_length = chosen.norm(dim=1, keepdim=True).clamp_min(1e-6)
    u, q = (vectors / length).detach(), (chosen / target_length).detach()
    r = F.normalize(u + q, dim=1)
    rotated = vectors - 2 * r * (r * vectors).sum(1, keepdim=True) + 2 * q * (u * vectors).sum(1, keepdim=True)
    return rotated * (target_length / length).detach()
