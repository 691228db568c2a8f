"""Memory of one training step of a small Qwen2-VL, whose number of vision tokens grows with the image."""

import torch

from tokcom_hf.data.image_limit import ImageLimit
from tokcom_hf.metrics.memory import high_water_mark
from tokcom_hf.small_models.scene_tokenizer import scene_tokenizer

IMAGE = (1120, 1120)


class ImageOnlyProcessor:
    """A Qwen2-VL processor of images and text; that of transformers needs torchvision, for videos."""

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        pixels = {"shortest_edge": 28 * 28, "longest_edge": 2000 * 28 * 28}
        self.image_processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
        self.tokenizer = tokenizer

    def __call__(self, text, images, **options):
        images_batch = self.image_processor(images, return_tensors="pt")
        counts = [int(grid.prod()) // 4 for grid in images_batch["image_grid_thw"]]
        words = [part.replace(self.image_token, f"{self.image_token} " * n) for part, n in zip(text, counts)]
        return {**self.tokenizer(words, **options), **images_batch}


def qwen2_vl():
    """An untrained Qwen2-VL and its processor, which makes one vision token per 28 x 28 pixels."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    names = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    tokenizer = scene_tokenizer(names)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "rope_parameters": {"rope_type": "default",
        "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    return model, ImageOnlyProcessor(tokenizer)


def memory_step(batch: int = 12, **limits) -> dict:
    """Runs one training step in this process; returns images, vision tokens per image, and growth of peak memory (MiB)."""
    from PIL import Image

    model, processor = qwen2_vl()
    image = Image.new("RGB", IMAGE)
    image = ImageLimit(processor, **limits)(image) if limits else image
    inputs = processor(text=[processor.image_token] * batch, images=[image] * batch, return_tensors="pt")
    before = high_water_mark(restart=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    model(**inputs, mm_token_type_ids=types, labels=inputs["input_ids"]).loss.backward()
    tokens = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    return {"batch": batch, "tokens": tokens, "peak_mib": (high_water_mark() - before) / 2**20}
