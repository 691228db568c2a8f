"""Nearest-code search, k-means and the collective operations of a codebook, as plain tensor functions.

Distances are always computed in float32: bf16 rounding flips the index of close codes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Scores (rows × codes) that are computed at once: 16 MiB of float32, about the size of a processor's cache.
MAX_SCORES = 1 << 22


def code_scores(vectors: torch.Tensor, codebook: torch.Tensor, penalty: torch.Tensor | None = None) -> torch.Tensor:
    """x·e − (‖e‖² + penalty) / 2: the larger the score, the nearer the code; its penalty counts as squared distance.

    Args:
        vectors: `(n, d)`.
        codebook: `(k, d)`.
        penalty: `(k,)` added to squared distances, or None.

    Returns:
        scores `(n, k)`; −‖x − e‖² − penalty = 2·score − ‖x‖².
    """
    return torch.addmm(_offsets(codebook, penalty), vectors, codebook.t())


def _offsets(codebook: torch.Tensor, penalty: torch.Tensor | None) -> torch.Tensor:
    squares = codebook.square().sum(1)
    return (squares if penalty is None else squares + penalty).mul_(-0.5)


@torch.no_grad()
def nearest_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, penalty: torch.Tensor | None = None, max_scores: int = MAX_SCORES
) -> torch.Tensor:
    """Index `(n,)` of the code with the smallest ‖x − e‖² + `penalty (k,)`; `max_scores` bounds the scores in memory."""
    bias = _offsets(codebook, penalty)
    table = codebook.t()
    rows = max(1, max_scores // codebook.shape[0])
    if vectors.shape[0] <= rows:
        return torch.addmm(bias, vectors, table).argmax(1)
    codes = torch.empty(vectors.shape[0], dtype=torch.long, device=vectors.device)
    scores = torch.empty(rows, codebook.shape[0], device=vectors.device)
    for start in range(0, vectors.shape[0], rows):
        part = vectors[start : start + rows]
        out = scores[: part.shape[0]]
        torch.addmm(bias, part, table, out=out)
        codes[start : start + rows] = out.argmax(1)
    return codes


def cluster_sums(vectors: torch.Tensor, codes: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number `(k,)` and sum `(k, d)` of the vectors of each code."""
    count = torch.bincount(codes, minlength=codebook_size).to(vectors.dtype)
    total = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return count, total


def sample_rows(weights: torch.Tensor, number: int, seed: int) -> torch.Tensor:
    """Indices of up to `number` distinct rows, drawn with probability proportional to `weights (n,)`.

    The random numbers come from the CPU, so that a seed gives the same rows on every rank and device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(weights.shape[0]).exponential_(generator=generator).clamp_min_(1e-20).to(weights.device)
    number = min(number, int((weights > 0).sum()))
    return (weights.float().clamp_min(0) / noise).topk(number).indices


# Length of vectors whose squared distances fit into float32: (2 · 1e18)² is 4e36, and the largest float32 is 3.4e38.
LARGEST_NORM = 1e18


class NonFiniteFeaturesError(ValueError, FloatingPointError):
    """Features without a nearest code: a wrong input (ValueError), or training that diverged (FloatingPointError)."""


@torch.no_grad()
def check_finite(vectors: torch.Tensor, user: str) -> None:
    """Raises ValueError if a row of `vectors (n, d)` is NaN, infinite or longer than `LARGEST_NORM`.

    user: the operation that needs the vectors, for the message.
    """
    # Negated, because comparisons with NaN are false.
    wrong = ~(vectors.abs().amax(1) * vectors.shape[1] ** 0.5 <= LARGEST_NORM)
    if bool(wrong.any()):
        raise NonFiniteFeaturesError(
            f"{user} needs finite features of a length below {LARGEST_NORM:.0e}, but {int(wrong.sum())} of {len(vectors)} "
            "are NaN, infinite or larger. Look for such values in the input images, and lower the learning rate if training "
            "produced them."
        )


@torch.no_grad()
def kmeans(
    vectors: torch.Tensor, codebook_size: int, iterations: int = 10, seed: int = 0, spherical: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's k-means; empty clusters move to vectors, drawn in proportion to the squared distance to their centres.

    Args:
        vectors: `(n, d)` float32.
        codebook_size: number of centres k; those beyond n are noisy copies of vectors.
        iterations: passes over the vectors.
        seed: seed of the first centres.
        spherical: keep centres on the unit sphere.

    Returns:
        centres `(k, d)` and the number of vectors of each `(k,)`.

    Raises:
        ValueError: there are no vectors, or their values are NaN, infinite or too large for distances.
    """
    number, width = vectors.shape
    check_finite(vectors, "k-means")
    if number == 0 or codebook_size < 1:
        raise ValueError(f"k-means needs at least one vector and one centre, got {number} and {codebook_size}.")
    # k-means++ in rounds: later centres are drawn in proportion to the squared distance to earlier ones.
    round_size = max(1, codebook_size // 4)
    centres = vectors[sample_rows(vectors.new_ones(number), round_size if codebook_size > 8 else 1, seed)]
    while len(centres) < min(codebook_size, number):
        error = (vectors - centres[nearest_codes(vectors, centres)]).square().sum(1) + 1e-12
        step_size = min(codebook_size, number) - len(centres)
        chosen = sample_rows(error, min(step_size, round_size), seed + 100 + len(centres))
        centres = torch.cat([centres, vectors[chosen]])
    if number < codebook_size:
        generator = torch.Generator().manual_seed(seed + 1)
        extra = torch.randint(number, (codebook_size - number,), generator=generator).to(vectors.device)
        noise = torch.randn(codebook_size - number, width, generator=generator).to(vectors)
        spread = vectors.std() if vectors.numel() > 1 else vectors.new_zeros(())
        centres = torch.cat([centres, vectors[extra] + 0.1 * spread * noise])
    centres = F.normalize(centres, dim=1) if spherical else centres.clone()
    for step in range(iterations):
        codes = nearest_codes(vectors, centres)
        count, total = cluster_sums(vectors, codes, codebook_size)
        used = count > 0
        empty = (~used).nonzero().flatten()
        if len(empty):
            error = (vectors - centres[codes]).square().sum(1)
            chosen = sample_rows(error, len(empty), seed + 2 + step)
            total[empty[: len(chosen)]] = vectors[chosen]
            count[empty[: len(chosen)]] = 1
            used = count > 0
        centres = torch.where(used[:, None], total / count.clamp_min(1)[:, None], centres)
        if spherical:
            centres = F.normalize(centres, dim=1)
    count = torch.bincount(nearest_codes(vectors, centres), minlength=codebook_size).to(vectors.dtype)
    return centres, count


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_of_process() -> int:
    """Rank of this process among those that train together, 0 for a single process."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over ranks in place and returns it; with one process the tensor stays as it is."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows `(n, d)` of all ranks, rank after rank; each rank gives as many rows as the rank with the fewest has."""
    if world_size() == 1:
        return rows
    smallest = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    mine = rows[: int(smallest)].contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)
