"""The simplest way to fewer vision tokens, a smaller image: a baseline of `token_pruning.py`.

The tower's position embeddings are interpolated to the smaller grid, and the processor resizes to the smaller image;
nothing else changes. Only LLaVA with a CLIP tower is supported, whose image size is fixed otherwise.
"""

import copy

import torch
import torch.nn.functional as F
from PIL import Image

from tokcom_hf.data.vqa import VQADataset


def can_downsample(model) -> bool:
    """Whether the model is a LLaVA with a CLIP tower."""
    return model.config.model_type == "llava" and model.config.vision_config.model_type == "clip_vision_model"


@torch.no_grad()
def downsampled_vlm(model, processor, image_size: int):
    """A copy of model and processor for images of `image_size` pixels, a multiple of the patch size.

    Raises:
        ValueError: the model is not a LLaVA with a CLIP tower, or the size is not a multiple of the patch size.
    """
    if not can_downsample(model):
        raise ValueError(f"Only LLaVA with a CLIP tower can be downsampled here, got {model.config.model_type!r}.")
    vision = model.config.vision_config
    if image_size % vision.patch_size:
        raise ValueError(f"image_size {image_size} must be a multiple of the patch size {vision.patch_size}.")
    model, processor = copy.deepcopy(model), copy.deepcopy(processor)
    tower = model.model.vision_tower
    embeddings = next(module for module in tower.modules() if hasattr(module, "position_embedding"))
    before, side = vision.image_size // vision.patch_size, image_size // vision.patch_size
    weights = embeddings.position_embedding.weight.data
    grid = weights[1:].T.reshape(1, -1, before, before)
    grid = F.interpolate(grid.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    grid = grid.to(weights.dtype).flatten(2)[0].T
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(torch.cat([weights[:1], grid]), freeze=False)
    embeddings.image_size = image_size
    embeddings.num_patches, embeddings.num_positions = side * side, side * side + 1
    embeddings.register_buffer("position_ids", torch.arange(side * side + 1)[None], persistent=False)
    for config in (model.config.vision_config, tower.config, embeddings.config):
        config.image_size = image_size
    model.config.image_seq_length = side * side
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": image_size}, {"height": image_size, "width": image_size}
    return model.eval(), processor


def shrunk(rows: VQADataset, image_size: int) -> VQADataset:
    """Rows with pictures of `image_size` pixels per side, shrunk with a box filter."""
    size = (image_size, image_size)
    return VQADataset([row | {"image": row["image"].resize(size, Image.Resampling.BOX)} for row in _all(rows)])


def _all(rows):
    return [rows[i] for i in range(len(rows))]
