"""Reconstruction grids and codebook plots, saved and sent to the trackers at every evaluation."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from tokcom_hf.models.image_processing_vqgan import as_grid
from tokcom_hf.models.shared_image_files import read_image
from tokcom_hf.plots.vqgan import plot_usage


class PictureCallback(TrainerCallback):
    """Writes `<output_dir>/pictures/step-N-reconstructions.png` and `step-N-codebook.png` on the main process.

    With `sample_dir` it also writes `<sample_dir>/epoch-N-reconstructions.png` after each epoch.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not (args.sample_dir and args.num_pictures):
            return
        pair = self.trainer.held_out_pictures()
        if pair is not None:
            folder = Path(args.sample_dir)
            folder.mkdir(parents=True, exist_ok=True)
            reconstruction_grid(*pair).save(folder / f"epoch-{math.ceil(state.epoch)}-reconstructions.png")

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not args.num_pictures:
            return
        pair = self.trainer.held_out_pictures()
        if pair is None:
            return
        folder = Path(args.output_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        grid = folder / f"step-{state.global_step}-reconstructions.png"
        reconstruction_grid(*pair).save(grid)
        self._send("reconstructions", grid, state.global_step)
        usage = folder / f"step-{state.global_step}-codebook.png"
        counts = self.trainer.held_out.counts
        if counts is not None and plot_usage(counts, usage, "held-out codes"):
            self._send("codebook", usage, state.global_step)

    def _send(self, name: str, path: Path, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                pixels = np.asarray(read_image(path))
                writer.add_image(name, pixels, step, dataformats="HWC")
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None and getattr(callback, "_initialized", False):
                wandb.log({name: wandb.Image(str(path))})


def reconstruction_grid(images, reconstructions, columns: int = 8) -> Image.Image:
    """A picture with each row of originals above its reconstructions; `(batch, channels, height, width)` in [-1, 1]."""
    tiles: list[Image.Image] = []
    originals, copies = _pictures(images), _pictures(reconstructions)
    for start in range(0, len(originals), columns):
        row = originals[start : start + columns]
        blank = [Image.new("RGB", row[0].size, "white")] * (columns - len(row))
        tiles += [*row, *blank, *copies[start : start + columns], *blank]
    return as_grid(tiles, columns)


def _pictures(pixels) -> list[Image.Image]:
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB") for array in arrays]
