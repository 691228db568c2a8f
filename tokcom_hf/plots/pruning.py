"""Pictures of the patches that each layer of a `PrunedVLM` keeps (needs the extra `plots`)."""

from pathlib import Path

import numpy as np
import torch

from .figures import pyplot, save


@torch.no_grad()
def kept_grids(model, batch: dict[str, torch.Tensor]) -> list[tuple[int, np.ndarray]]:
    """Returns which patches of an image are left, for each layer of a `PrunedVLM` at which their number falls.

    Args:
        batch: the processor's inputs for one prompt with one image.

    Returns:
        (decoder layer, bool (side, side)) for the first layer and for each later layer that sees fewer patches than the
        layer before it; an empty list where the prompt's vision tokens do not form a square.
    """
    output = model(**{name: value.to(model.device) for name, value in batch.items()})
    places = (batch["input_ids"][0] == model.family.image_token_id).nonzero()[:, 0].tolist()
    side = int(len(places) ** 0.5)
    if not places or side * side != len(places):
        return []
    kept = [set(index[0].tolist()) for index in output.kept_index]
    stages = [n for n in range(len(kept)) if n == 0 or kept[n] != kept[n - 1]]
    return [(n, np.array([place in kept[n] for place in places]).reshape(side, side)) for n in stages]


def dimmed(picture: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Darkens the patches of a picture (height, width, 3) uint8 where `grid` (side, side) is False."""
    (height, width), side = picture.shape[:2], len(grid)
    mask = grid[np.arange(height) * side // height][:, np.arange(width) * side // width]
    return (picture * (0.2 + 0.8 * mask[..., None])).astype("uint8")


@torch.no_grad()
def plot_kept_patches(model, collator, rows, path: str | Path) -> str:
    """Draws one row per image: the image, then the patches that enter the language model and each pruning layer.

    Returns:
        A sentence that says where the picture is, or why there is none.
    """
    plt = pyplot()
    if plt is None:
        return "no picture: matplotlib is not installed (pip install 'tokcom_hf[plots]')"
    shown: list[tuple] = []
    for row in rows:
        grids = [] if row["image"] is None else kept_grids(model, collator([row]))
        if grids:
            shown.append((row, grids))
    if not shown:
        return "no picture: the images do not give square grids of tokens"
    columns = 1 + max(len(grids) for _, grids in shown)
    figure, axes = plt.subplots(len(shown), columns, figsize=(2.2 * columns, 2.4 * len(shown)), squeeze=False)
    for line, (row, grids) in zip(axes, shown):
        picture = np.asarray(row["image"].convert("RGB"))
        line[0].imshow(picture)
        line[0].set_title(row["questions"][0], fontsize=7)
        for axis, (stage, grid) in zip(line[1:], grids):
            axis.imshow(dimmed(picture, grid))
            axis.set_title(f"from layer {stage}: {int(grid.sum())} tokens", fontsize=7)
        for axis in line:
            axis.axis("off")
    save(figure, path, dpi=80)
    return f"picture: {path}"
