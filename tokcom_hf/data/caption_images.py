"""Captions with images as LFQ tokens: the training data of a language model that generates images."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from .scenes import Scene, render_scene, sample_scene, scene_caption


def caption_of(scene: Scene) -> str:
    """The scene's caption, with a space before each comma, so that commas are words of their own."""
    return scene_caption(scene).replace(",", " ,")


def draw_scenes(
    count: int, seed: int, apart_from: frozenset[str] = frozenset(), dots: bool = True, **options: Any
) -> list[Scene]:
    """Draws seeded scenes. Where `apart_from` is given, no scene has a caption in it and no two share a caption.

    Args:
        count: number of scenes.
        seed: seed of the random generator.
        apart_from: captions to avoid, for example those of the training scenes.
        dots: keep the small dot that one object of each scene carries.
        options: arguments of `scenes.sample_scene`.

    Raises:
        ValueError: fewer than `count` scenes with a new caption were found.
    """
    rng, seen = random.Random(seed), set(apart_from)
    scenes: list[Scene] = []
    for _ in range(1000 * count):
        if len(scenes) == count:
            break
        scene = sample_scene(rng, **options)
        if not dots:
            scene = replace(scene, objects=tuple(replace(item, dot=None) for item in scene.objects))
        caption = caption_of(scene)
        if apart_from and caption in seen:
            continue
        seen.add(caption)
        scenes.append(scene)
    if len(scenes) < count:
        raise ValueError(f"Only {len(scenes)} of {count} scenes have a new caption; allow more objects.")
    return scenes


@dataclass
class CaptionImages(Dataset):
    """Rows `{"caption": str, "image": PIL image}` of scenes; each image is drawn at its first use and kept."""

    scenes: list[Scene]
    image_size: int
    _drawn: dict[int, Image.Image] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": {}}  # pickled for worker processes, which draw their own images

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._drawn:
            self._drawn[index] = render_scene(self.scenes[index], self.image_size)
        return {"caption": caption_of(self.scenes[index]), "image": self._drawn[index]}


class PixelRows(Dataset):
    """The images of caption rows as `{"pixel_values": (channels, height, width)}` for an image tokenizer's training."""

    def __init__(self, rows: Dataset, image_processor):
        self.rows, self.image_processor = rows, image_processor

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.image_processor(self.rows[index]["image"])["pixel_values"][0]}


class CaptionTokens(Dataset):
    """Rows `{"caption": str, "codes": (n,)}`: images that were encoded as LFQ codes once, before training."""

    def __init__(self, captions: list[str], codes: torch.Tensor):
        self.captions, self.codes = captions, codes.flatten(1)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"caption": self.captions[index], "codes": self.codes[index]}


@dataclass
class CaptionImageCollator:
    """Makes sequences of a caption followed by its image tokens; only image tokens have labels.

    Args:
        processor: an `LFQProcessor`; the caption is inserted into its `image_prompt`.
        caption_drop: probability that a row's caption is left out, which trains the unconditional prediction of
            classifier-free guidance. Drawn from PyTorch's global generator, so a resumed run drops the same captions.

    Raises:
        ValueError: `caption_drop` outside [0, 1].
    """

    processor: Any
    caption_drop: float = 0.0

    def __post_init__(self):
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f"caption_drop must be in [0, 1], got {self.caption_drop}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        start = self.processor.lfq_start_token_id
        prompts = []
        for row in rows:
            dropped = self.caption_drop > 0 and float(torch.rand(())) < self.caption_drop
            prompts.append(self.processor.image_prompt.replace("{caption}", "" if dropped else row["caption"]))
        encoded = self.processor(text=prompts, add_special_tokens=True)["input_ids"]
        ids = [torch.cat([torch.tensor(prompt), row["codes"] + start]) for prompt, row in zip(encoded, rows)]
        width, pad = max(map(len, ids)), self.processor.tokenizer.pad_token_id or 0
        batch = {
            "input_ids": torch.full((len(ids), width), pad),
            "attention_mask": torch.zeros(len(ids), width, dtype=torch.long),
            "labels": torch.full((len(ids), width), -100),
        }
        for index, tokens in enumerate(ids):
            count = len(rows[index]["codes"])
            batch["input_ids"][index, -len(tokens) :] = tokens
            batch["attention_mask"][index, -len(tokens) :] = 1
            batch["labels"][index, -count:] = tokens[-count:]
        return batch
