"""Encodes a whole corpus with a frozen VAE once, into a memory-mapped file of latents."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..whole_files import reserve, whole_file, write_text


class LatentRows(torch.utils.data.Dataset):
    """Rows of `latents (chunks, latent)`, `input_ids (length,)` and `attention_mask (length,)`.

    The latents are memory-mapped, so the corpus may be larger than memory; each worker process maps the file itself.

    Args:
        rows: data set of `input_ids` and `attention_mask`.
        latents_file: `.npy` file of latents (rows, chunks, latent), float32.
        mean, std: statistics of each latent dimension, (latent,).
    """

    def __init__(self, rows: Any, latents_file: Path, mean: torch.Tensor, std: torch.Tensor):
        self.rows, self.latents_file = rows, latents_file
        self.latents = np.load(latents_file, mmap_mode="r")
        self.mean, self.std = mean, std

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the whole content of the mapped file.
        return {name: value for name, value in self.__dict__.items() if name != "latents"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.latents = np.load(self.latents_file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {
            "latents": torch.from_numpy(np.array(self.latents[index])),
            "input_ids": torch.as_tensor(row["input_ids"]),
            "attention_mask": torch.as_tensor(row["attention_mask"]),
        }


@torch.no_grad()
def encode_rows(
    vae: Any, rows: Any, file: str | Path, batch_size: int = 64, description: str = "encoding"
) -> LatentRows:
    """Encodes `rows` (items with `input_ids`, `attention_mask`) with a frozen `vae` into `<file>`, or reuses it.

    The file is reused only if the fingerprint beside it shows that it was written from the same weights and rows. Mean and
    standard deviation per latent dimension are taken over chunks that hold at least one real token. The file is renamed into
    place when complete, so that processes encoding the same rows never read each other's unfinished file.

    Args:
        vae: a `TokComVAE`.
        rows: data set with items `input_ids`, `attention_mask`.
        file: `.npy` file to write; the fingerprint goes beside it, as `.json`.
        batch_size: rows per call of the VAE.
        description: label of the progress bar.
    """
    file = Path(file)
    vae.eval()
    fingerprint = _fingerprint(vae, rows)
    side = file.with_suffix(".json")
    if file.is_file() and side.is_file():
        stored = json.loads(side.read_text(encoding="utf-8"))
        if stored["fingerprint"] == fingerprint:
            return LatentRows(rows, file, torch.tensor(stored["mean"]), torch.tensor(stored["std"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as unfinished:
        mean, std = _write(vae, rows, unfinished, batch_size, description)
        # Removes the old fingerprint first: it must never stand beside the new latents.
        side.unlink(missing_ok=True)
    write_text(side, json.dumps({"fingerprint": fingerprint, "mean": mean.tolist(), "std": std.tolist()}))
    return LatentRows(rows, file, mean, std)


@torch.no_grad()
def latent_statistics(
    vae: Any, rows: Any, count: int = 512, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent dimension, (latent,) float32, over at most `count` evenly spaced rows.

    Chunks that hold padding only are left out.
    """
    vae.eval()
    device, encoded = next(vae.parameters()).device, []
    chosen = [rows[int(index)] for index in np.linspace(0, len(rows) - 1, min(count, len(rows))).round()]
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
        mask = torch.stack([torch.as_tensor(row["attention_mask"]) for row in batch])
        real = mask.view(len(mask), -1, vae.config.chunk_size).any(dim=-1)
        encoded.append(vae.encode(ids.to(device)).double().cpu()[real])
    latents = torch.cat(encoded)
    return latents.mean(dim=0).float(), latents.std(dim=0, unbiased=False).clamp(min=1e-4).float()


def _write(vae: Any, rows: Any, file: Path, batch_size: int, description: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes `rows` into `file`; returns mean and standard deviation of each latent dimension, (latent,) float32."""
    chunk_size, device = vae.config.chunk_size, next(vae.parameters()).device
    chunks = len(rows[0]["input_ids"]) // chunk_size
    shape = (len(rows), chunks, vae.config.latent_size)
    latents = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    reserve(file)
    total = torch.zeros(shape[-1], dtype=torch.float64)
    squares, count = torch.zeros_like(total), 0
    for start in tqdm(range(0, len(rows), batch_size), desc=description, unit="batch"):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
        mask = torch.stack([torch.as_tensor(row["attention_mask"]) for row in batch])
        encoded = vae.encode(ids.to(device)).float().cpu()
        latents[start : start + len(batch)] = encoded.numpy()
        real = encoded[mask.view(len(batch), chunks, chunk_size).any(dim=-1)].double()
        total += real.sum(dim=0)
        squares += (real**2).sum(dim=0)
        count += len(real)
    latents.flush()
    mean = total / max(1, count)
    std = (squares / max(1, count) - mean**2).clamp(min=1e-8).sqrt()
    return mean.float(), std.float()


def _fingerprint(vae: Any, rows: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().numpy().tobytes())
    digest.update(str(len(rows)).encode())
    for index in range(len(rows)):
        digest.update(np.asarray(rows[index]["input_ids"], dtype=np.int64).tobytes())
    return digest.hexdigest()
