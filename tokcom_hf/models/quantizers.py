"""Vector quantizers behind one interface: `ema` (learned codebook), `fsq` (rounding) and `lfq` (binary).

Every quantizer maps features `(..., input_size)` to embeddings of the same shape and integer codes `(...)` in
[0, codebook_size). The arithmetic is float32 whatever the autocast, so that codes do not depend on it.

Sources: VQ-VAE 1711.00937 (EMA codebook), CVQ-VAE 2307.15139 (moving dead codes onto data), rotation trick 2410.06424,
FSQ 2309.15505, LFQ 2310.05737.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .lfq_entropy import factorised_entropy
from .vector_search import (
    all_reduce,
    cluster_sums,
    code_scores,
    gather_rows,
    kmeans,
    nearest_codes,
    sample_rows,
    world_size,
)


@dataclass
class QuantizerOutput(ModelOutput):
    """What a quantizer returns.

    embeddings: `(..., input_size)`, with a gradient to the features.
    codes: `(...)` int64.
    commitment_loss: mean squared distance between projected features and their codes (scalar).
    entropy_loss: (mean per-sample entropy − entropy of the mean assignment) / log K, in [−1, 1]; 0 where unused.
    """

    embeddings: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 whatever the type of its weights."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight.float(), self.bias.float())


class Quantizer(nn.Module):
    """Projections in and out, straight-through gradient, and the count of codes; subclasses pick the codes.

    `enabled = False` lets features through unquantized (codes are still reported): the trainer's warm-up.
    `update_in_forward = True` applies codebook statistics in each training forward; a trainer that accumulates
    gradients sets it to False and calls `update()` once per optimizer step.
    """

    def __init__(self, config, input_size: int, width: int):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.width = width
        project = width != input_size or config.codebook_projection
        self.project_in = Float32Linear(input_size, width) if project else nn.Identity()
        self.project_out = Float32Linear(width, input_size) if project else nn.Identity()
        self.entropy_weight = config.entropy_weight
        self.usage_decay = config.usage_decay
        self.enabled = True
        self.update_in_forward = True
        self.temperature = 0.0
        self.last_count: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None
        # Exponential average of each code's share of the vectors, with the weight that corrects its start.
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("usage_weight", torch.zeros(()))

    def reset_buffers(self) -> None:
        """Refills buffers after construction on the meta device."""
        self.usage.zero_()
        self.usage_weight.zero_()

    # ---------------------------------------------------------------- what subclasses define
    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `(n, width)` → codes `(n,)` and code vectors `(n, width)` without gradient."""
        raise NotImplementedError

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(...)` → code vectors `(..., width)`."""
        raise NotImplementedError

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        """Maps projected features into the space where codes live."""
        return vectors

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `QuantizerOutput`; differentiable in `vectors`."""
        raise NotImplementedError

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen code vectors with a gradient to `vectors`: straight-through."""
        return vectors + (chosen - vectors).detach()

    # ---------------------------------------------------------------- interface
    def forward(self, features: torch.Tensor) -> QuantizerOutput:
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.prepare(self.project_in(features.float()).reshape(-1, self.width))
            codes, chosen = self.assign(vectors)
            commitment = F.mse_loss(vectors, chosen.detach())
            entropy = vectors.new_zeros(())
            if self.enabled and self.entropy_weight and (self.training or not torch.is_grad_enabled()):
                entropy = self.entropy_loss(vectors)
            connected = self.connect(vectors, chosen) if self.enabled else vectors
            if not self.enabled:
                commitment = commitment * 0
            elif self.training:
                self.record(codes, vectors.detach(), chosen)
                if self.update_in_forward:
                    self.update()
            embeddings = self.project_out(connected)
        return QuantizerOutput(
            embeddings=embeddings.reshape(features.shape).to(features.dtype),
            codes=codes.reshape(features.shape[:-1]),
            commitment_loss=commitment,
            entropy_loss=entropy,
        )

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(...)` → embeddings `(..., input_size)`.

        Raises:
            TypeError: codes are not integers.
            ValueError: a code outside [0, codebook_size).
        """
        if codes.dtype.is_floating_point or codes.dtype in (torch.bool, torch.complex64):
            raise TypeError(f"Codes must be integers, got {codes.dtype}.")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"Codes must be in [0, {self.codebook_size}), got {int(codes.min())} … {int(codes.max())}."
            )
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(self.vectors_of(codes.long()))

    # ---------------------------------------------------------------- statistics
    @torch.no_grad()
    def record(self, codes: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        """Remembers one training forward until the next `update()`."""
        count = torch.bincount(codes, minlength=self.codebook_size).float()
        self._pending = count if self._pending is None else self._pending + count

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Applies what was recorded since the last call, summed over ranks; every rank must call it."""
        if self._pending is None:
            return
        self.last_count = all_reduce(self._pending)
        self._pending = None
        share = self.last_count / self.last_count.sum().clamp_min(1)
        self.usage.lerp_(share, 1 - self.usage_decay)
        self.usage_weight.lerp_(torch.ones_like(self.usage_weight), 1 - self.usage_decay)

    def usage_share(self) -> torch.Tensor:
        """Bias-corrected moving average of each code's share of the vectors, `(codebook_size,)`."""
        return self.usage / self.usage_weight.clamp_min(1e-12)


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
        self._sum: torch.Tensor | None = None
        self._pool: list[torch.Tensor] = []
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

    def _restart_average(self, share: torch.Tensor, known: bool) -> None:
        self.ema_weight.fill_(1.0 if known else 0.0)
        self.code_share.copy_(share * self.ema_weight)
        self.code_sum.copy_(self.codebook * self.code_share[:, None])

    # ---------------------------------------------------------------- choosing codes
    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=1) if self.cosine else vectors

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook.float()[codes]

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and self.enabled and not self.initialized:
            self.initialize(gather_rows(vectors.detach()))
        codebook = self.codebook.float()
        if self.training and self.enabled and self.temperature > 0:
            codes = self.sample_codes(vectors.detach())
        else:
            codes = nearest_codes(vectors.detach(), codebook)
        return codes, codebook[codes]

    def assignment_logits(self, vectors: torch.Tensor, temperature: float) -> torch.Tensor:
        """−‖x − e‖² / (temperature · scale) up to a constant per row, `(n, k)`.

        The scale is √width (`temperature_scale="dim"`) or the mean squared distance of the vectors to the codes
        (`"mean"`), so that a temperature means the same for any width.
        """
        # A copy: the update moves the codebook in place before the backward pass needs it.
        scores = 2 * code_scores(vectors, self.codebook.float().clone())
        if self.config.temperature_scale == "dim":
            scale = torch.tensor(math.sqrt(self.width), device=vectors.device)
        else:
            scale = (vectors.square().sum(1).mean() - scores.mean()).detach().clamp_min(1e-12)
        return scores / (temperature * scale)

    @torch.no_grad()
    def sample_codes(self, vectors: torch.Tensor) -> torch.Tensor:
        """Draws codes from softmax(logits) with the Gumbel-max trick, in chunks of rows."""
        rows = max(1, (1 << 22) // self.codebook_size)
        codes = []
        for part in vectors.split(rows):
            logits = self.assignment_logits(part, self.temperature)
            codes.append((logits - torch.empty_like(logits).exponential_().clamp_min_(1e-20).log_()).argmax(1))
        return torch.cat(codes)

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if self.config.gradient_estimator == "rotation":
            return rotate_to(vectors, chosen)
        return super().connect(vectors, chosen)

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        # A stride instead of a random choice keeps runs reproducible and the table below 2^24 entries.
        stride = math.ceil(vectors.shape[0] * self.codebook_size / (1 << 24))
        logits = self.assignment_logits(vectors[::stride], self.config.entropy_temperature)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        per_sample = -(p * log_p).sum(1).mean()
        mean_p = p.mean(0)
        if world_size() > 1:
            # Value of the global batch; DDP averages the gradients of the ranks' own shares of it.
            everyone = all_reduce(mean_p.detach().clone()) / world_size()
            mean_p = mean_p + (everyone - mean_p).detach()
        batch = -(mean_p * mean_p.clamp_min(1e-12).log()).sum()
        return (per_sample - batch) / math.log(self.codebook_size)

    # ---------------------------------------------------------------- moving codes
    @torch.no_grad()
    def initialize(self, vectors: torch.Tensor) -> None:
        """Places the codes on the data: `(n, width)` prepared vectors, the same on every rank."""
        size = self.codebook_size
        iterations = self.config.kmeans_iterations if self.config.codebook_init == "kmeans" else 0
        centres, count = kmeans(
            vectors.float(), size, iterations, seed=self.config.codebook_seed, spherical=self.cosine
        )
        self.codebook.copy_(centres)
        # Half the mass goes by size, half evenly: a code without vectors in the sample is not yet a dead code.
        self._restart_average((count / count.sum() + 1 / size) / 2, known=True)
        self.initialized.fill_(True)

    @torch.no_grad()
    def record(self, codes: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        if self.config.freeze_codebook:
            return super().record(codes, vectors, chosen)
        count, total = cluster_sums(vectors, codes, self.codebook_size)
        self._pending = count if self._pending is None else self._pending.add_(count)
        self._sum = total if self._sum is None else self._sum.add_(total)
        if self.config.reset_fraction > 0:
            room = self.config.reset_pool - sum(len(part) for part in self._pool)
            if room > 0:
                error = (vectors - chosen).square().sum(1, keepdim=True)
                self._pool.append(torch.cat([vectors[:room], error[:room]], dim=1))

    @torch.no_grad()
    def update(self, allow_reset: bool = True) -> None:
        """Moves the codes to the statistics since the last call (once per optimizer step), then revives dead codes."""
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

    def dead_codes(self, vectors_per_step: int) -> torch.Tensor:
        """Mask `(codebook_size,)` of codes whose moving average is below the threshold."""
        share = self.code_share / self.ema_weight.clamp_min(1e-12)
        unit = self.codebook_size if self.config.dead_code_unit == "mean" else vectors_per_step
        return share * unit < self.config.dead_code_threshold

    @torch.no_grad()
    def reset_dead_codes(self, pool: torch.Tensor, vectors_per_step: int) -> int:
        """Moves dead codes, the least used first, onto vectors of the pool; live codes stay as they are.

        Args:
            pool: `(n, width + 1)`: vectors and, in the last column, their squared distance to their code; the same on
                every rank. Vectors are drawn without replacement, in proportion to that distance.
            vectors_per_step: vectors of one optimizer step over all ranks.

        Returns:
            number of codes moved, at most `reset_fraction` of the codebook.
        """
        dead = self.dead_codes(vectors_per_step).nonzero().flatten()
        limit = int(self.config.reset_fraction * self.codebook_size)
        if len(dead) == 0 or limit == 0:
            return 0
        dead = dead[self.code_share[dead].argsort(stable=True)][:limit]
        seed = self.config.codebook_seed + 1_000_003 * int(self.num_updates)
        chosen = sample_rows(pool[:, -1] + 1e-12, len(dead), seed)
        dead = dead[: len(chosen)]
        vectors = pool[chosen, :-1]
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
        self.codebook_size = codebook_size
        self._pending, self._sum, self._pool = None, None, []


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


class FSQQuantizer(Quantizer):
    """Finite scalar quantization: each of a few bounded dimensions is rounded to one of `levels` values."""

    def __init__(self, config, input_size: int):
        super().__init__(config, input_size, len(config.fsq_levels))
        self.levels = tuple(config.fsq_levels)
        self.entropy_weight = 0.0

    def prepare(self, vectors: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, device=vectors.device, dtype=vectors.dtype)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / half).atanh()).tanh() * half - offset

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        digits = vectors.detach().round()
        codes = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
        for axis, levels in reversed(list(enumerate(self.levels))):
            codes = codes * levels + (digits[:, axis].long() + levels // 2).clamp(0, levels - 1)
        return codes, digits

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        digits = []
        for levels in self.levels:
            digits.append((codes % levels - levels // 2).float())
            codes = codes // levels
        return self._unit(torch.stack(digits, dim=-1))

    def connect(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self._unit(super().connect(vectors, chosen))

    def _unit(self, digits: torch.Tensor) -> torch.Tensor:
        return digits / torch.tensor([levels // 2 for levels in self.levels], device=digits.device)


class LFQQuantizerHead(Quantizer):
    """Lookup-free quantization: code = Σ bit_i · 2^i with bit_i = [vector_i > 0]; code vectors are ±1."""

    def __init__(self, config, input_size: int):
        super().__init__(config, input_size, int(math.log2(config.codebook_size)))
        self.entropy_temperature = config.entropy_temperature

    def assign(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits = vectors.detach() > 0
        places = torch.arange(self.width, device=vectors.device)
        return (bits.long() << places).sum(1), bits.to(vectors.dtype) * 2 - 1

    def vectors_of(self, codes: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.width, device=codes.device)
        return ((codes[..., None] >> places) & 1).float() * 2 - 1

    def entropy_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        # softmax over ±1 codes of −‖x − e‖²/T factorises into bits with logit 4x/T.
        logits = 4 * vectors / self.entropy_temperature
        if world_size() == 1:
            per_sample, batch = factorised_entropy(logits)
            return (per_sample - batch) / math.log(self.codebook_size)
        # The other ranks' vectors enter as constants. Weighting by the number of ranks undoes DDP's averaging.
        others = gather_rows(logits.detach())
        per_sample, _ = factorised_entropy(logits)
        rank, size = torch.distributed.get_rank(), len(others) // world_size()
        together = torch.cat([others[: rank * size], logits[:size], others[(rank + 1) * size :]])
        _, batch = factorised_entropy(together)
        batch = batch.detach() + world_size() * (batch - batch.detach())
        return (per_sample - batch) / math.log(self.codebook_size)


QUANTIZERS = {"ema": EMAQuantizer, "fsq": FSQQuantizer, "lfq": LFQQuantizerHead}


def build_quantizer(config, input_size: int) -> Quantizer:
    """The quantizer named by `config.quantizer`, for features of `input_size` channels."""
    return QUANTIZERS[config.quantizer](config, input_size)
