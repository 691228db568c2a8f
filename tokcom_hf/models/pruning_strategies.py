"""Training-free reduction of vision tokens: each strategy maps one image's tokens to `keep` tokens.

Every function takes features `(tokens, width)`, the number to keep, received attention `(tokens,)` or None and a generator
or None, and returns the kept or merged features `(keep, width)` and their places `(keep,)`, ascending. `fastv` works inside
the language model, see pruning_decoder.py.
"""

import torch
import torch.nn.functional as F

Kept = tuple[torch.Tensor, torch.Tensor]


def random_tokens(features, keep, attention=None, generator=None) -> Kept:
    """A uniformly random subset."""
    noise = torch.rand(len(features), generator=generator).to(features.device)
    index = noise.argsort()[:keep].sort().values
    return features[index], index


def uniform_tokens(features, keep, attention=None, generator=None) -> Kept:
    """Evenly spaced tokens of the flattened image."""
    steps = (torch.arange(keep, dtype=torch.float64) + 0.5) * len(features) / keep
    index = steps.long().to(features.device)
    return features[index], index


def pooled_tokens(features, keep, attention=None, generator=None) -> Kept:
    """Means over `keep` runs of nearly equal length of the flattened image, placed at the middle of each run."""
    group = torch.arange(len(features), device=features.device) * keep // len(features)
    sums = features.new_zeros(keep, features.shape[1]).index_add(0, group, features)
    counts = torch.bincount(group, minlength=keep)[:, None]
    starts = counts.flatten().cumsum(0) - counts.flatten()
    return sums / counts, starts + counts.flatten() // 2


def divprune_tokens(features, keep, attention=None, generator=None) -> Kept:
    """DivPrune (arXiv 2503.02175): greedily adds the token of largest cosine distance to the chosen ones.

    Difference from the paper: it compares projected embeddings; this function compares the given features, which in LLaVA
    and InternVL are those before the projector.
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
    """ToMe (arXiv 2210.09461): rounds of bipartite matching that merge the most similar pairs, weighted by size.

    Difference from the paper: it merges inside the blocks of the vision tower by their keys, with proportional attention;
    this function merges the output of the tower.
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
    """VisionZip (arXiv 2412.04467): the tokens that receive most attention, and a few tokens merged from the rest.

    Differences from the paper: it ranks by the attention of the CLS token where there is one and keeps that token, matches
    by keys, and adds the mean of the merged tokens to their target. This function ranks by the mean attention received in
    the vision tower, matches by features, and takes the mean alone. In families whose tower gives no attention, it ranks by
    the similarity of the features to each other.
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
# Strategies that select inside the language model.
LAYER_STRATEGIES = ("fastv",)
