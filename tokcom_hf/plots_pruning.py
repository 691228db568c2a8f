"""Pictures of the patches that each layer of a `PrunedVLM` keeps (needs the extra `plots`)."""

from pathlib import Path

import torch


@torch.no_grad()
def plot_kept_patches(model, collator, rows, path: str | Path) -> str:
    """Draws one line per image: the image, then what enters the language model and each pruning layer.

    Returns:
        A sentence that says where the picture is, or why there is none.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import numpy as np
    except ImportError:
        return "no picture: matplotlib is not installed (pip install 'tokcom_hf[plots]')"
    shown: list[tuple] = []
    for row in rows:
        batch = collator([row])
        output = model(**{k: v.to(next(model.parameters()).device) for k, v in batch.items()})
        places = (batch["input_ids"][0] == model.adapter.image_token_id).nonzero()[:, 0].tolist()
        side = int(len(places) ** 0.5)
        if row["image"] is None or side * side != len(places):
            continue
        kept = [set(index[0].tolist()) for index in output.kept_index]
        stages = [n for n in range(len(kept)) if n == 0 or kept[n] != kept[n - 1]]
        grids = [torch.tensor([p in kept[n] for p in places]).view(side, side).numpy() for n in stages]
        shown.append((row, stages, grids))
    if not shown:
        return "no picture: the images do not give square grids of tokens"
    columns = 1 + max(len(stages) for _, stages, _ in shown)
    figure, axes = plt.subplots(len(shown), columns, figsize=(2.2 * columns, 2.4 * len(shown)), squeeze=False)
    for line, (row, stages, grids) in zip(axes, shown):
        picture = np.asarray(row["image"].convert("RGB"))
        line[0].imshow(picture)
        line[0].set_title(row["questions"][0], fontsize=7)
        for axis, stage, grid in zip(line[1:], stages, grids):
            height, width = picture.shape[:2]
            side = len(grid)
            mask = grid[np.arange(height) * side // height][:, np.arange(width) * side // width]
            axis.imshow((picture * (0.2 + 0.8 * mask[..., None])).astype("uint8"))
            axis.set_title(f"from layer {stage}: {int(grid.sum())} tokens", fontsize=7)
        for axis in line:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return f"picture: {path}"
