"""Training-free reduction of vision tokens: each strategy maps one image's tokens to `keep` tokens.

Every function takes features `(tokens, width)`, the number to keep, optional received attention `(tokens,)` and a
generator, and returns the kept features `(keep, width)` (merged where the strategy merges) and their sorted places
`(keep,)`. `fastv` is not here: it selects inside the language model, see `PrunedVLM`.
"""

import torch
import torch.nn.functional as F

Kept = tuple[torch.Tensor, torch.Tensor]


def random_tokens(features, keep, attention=None, generator=None) -> Kept:
    """A uniformly random subset: the baseline that most published methods do not beat."""
    noise = torch.rand(len(features), generator=generator).to(features.device)
    index = noise.argsort()[:keep].sort().values
    return features[index], index


def uniform_tokens(features, keep, attention=None, generator=None) -> Kept:
    """Evenly spaced tokens of the flattened image."""
    steps = (torch.arange(keep, dtype=torch.float64) + 0.5) * len(features) / keep
    index = steps.long().to(features.device)
    return features[index], index


def pooled_tokens(features, keep, attention=None, generator=None) -> Kept:
    """Means over `keep` nearly equal runs of the flattened image; the place is the middle of each run."""
    group = torch.arange(len(features), device=features.device) * keep // len(features)
    sums = features.new_zeros(keep, features.shape[1]).index_add(0, group, features)
    counts = torch.bincount(group, minlength=keep)[:, None]
    starts = counts.flatten().cumsum(0) - counts.flatten()
    return sums / counts, starts + counts.flatten() // 2


def divprune_tokens(features, keep, attention=None, generator=None) -> Kept:
    """DivPrune-like (arXiv 2503.02175): greedily adds the token farthest (cosine) from those chosen.

    The published method compares projected embeddings; here they are the features given, in LLaVA and InternVL those
    from before the projector.
    """
    units = F.normalize(features.float(), dim=-1)
    distance = 1.0 - units @ units.T
    # The first token is the one whose nearest neighbour is farthest away.
    nearest = distance.clone().fill_diagonal_(float("inf")).min(-1).values
    chosen = [nearest.argmax()]
    closest = distance[chosen[0]].clone()
    closest[chosen[0]] = -1.0
    while len(chosen) < keep:
        best = closest.argmax()
        chosen.append(best)
        closest = torch.minimum(closest, distance[best])
        closest[best] = -1.0
    index = torch.stack(chosen).sort().values
    return features[index], index


def tome_tokens(features, keep, attention=None, generator=None) -> Kept:
    """ToMe-like (arXiv 2210.09461): rounds of bipartite matching that merge the most similar pairs, weighted by size.

    The published method merges inside the vision tower's blocks, by their keys and with proportional attention; here it
    is the tower's output that is merged.
    """
    values = features.float()
    sizes = values.new_ones(len(values))
    places = torch.arange(len(values), device=values.device)
    while len(values) > keep:
        units = F.normalize(values, dim=-1)
        similarity, match = (units[0::2] @ units[1::2].T).max(-1)
        merges = min(len(values) - keep, len(similarity))
        order = similarity.argsort(descending=True)
        source, stay = order[:merges] * 2, order[merges:] * 2
        target = match[order[:merges]] * 2 + 1
        weighted = (values * sizes[:, None]).index_add(0, target, values[source] * sizes[source, None])
        sizes = sizes.index_add(0, target, sizes[source])
        values = weighted / sizes[:, None]
        odd = torch.arange(1, len(values), 2, device=values.device)
        left = torch.cat([stay, odd]).sort().values
        values, sizes, places = values[left], sizes[left], places[left]
    return values.to(features.dtype), places


def visionzip_tokens(features, keep, attention=None, generator=None, contextual_share: float = 0.15) -> Kept:
    """VisionZip-like (arXiv 2412.04467): the tokens with most received attention, and a few merged of the rest.

    The published method takes the attention of the CLS token where there is one, keeps that token, matches by keys and
    adds the mean of what it merges to the target; here it is the mean of all received attention, the features, and the
    mean alone. Received attention comes from the vision tower; where a family does not give it, the attention of the
    features to each other stands in.
    """
    if attention is None:
        units = F.normalize(features.float(), dim=-1)
        attention = (units @ units.T / 0.1).softmax(-1).mean(0)
    contextual = min(max(1, round(contextual_share * keep)), keep - 1) if keep > 1 else 0
    order = attention.argsort(descending=True)
    dominant, rest = order[: keep - contextual], order[keep - contextual :].sort().values
    if contextual == 0 or len(rest) == 0:
        index = dominant.sort().values
        return features[index], index
    centres = rest[uniform_tokens(rest[:, None], contextual)[1]]
    units = F.normalize(features.float(), dim=-1)
    nearest = (units[rest] @ units[centres].T).argmax(-1)
    merged = features.new_zeros(contextual, features.shape[1]).index_add(0, nearest, features[rest])
    counts = torch.bincount(nearest, minlength=contextual)[:, None]
    merged = torch.where(counts > 0, merged / counts.clamp(min=1), features[centres])
    index, order = torch.cat([dominant, centres]).sort()
    return torch.cat([features[dominant], merged])[order], index


STRATEGIES = {
    "random": random_tokens,
    "uniform": uniform_tokens,
    "pool": pooled_tokens,
    "tome": tome_tokens,
    "visionzip": visionzip_tokens,
    "divprune": divprune_tokens,
}
# Chosen inside the language model instead of before it.
LAYER_STRATEGIES = ("fastv",)
