"""Tiny random language and vision-language models to add LFQ tokens to."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

OLD = 100
IMAGE = 99
SHAPE = {
    "vocab_size": OLD,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Head with bias (phi), soft-capped logits (gemma2), scaled embeddings (gemma3), scaled logits (cohere), a projection
# between body and head (opt), other attribute names (gpt2).
LANGUAGE = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=OLD, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None),
    "phi": lambda: PhiConfig(**SHAPE | {"num_key_value_heads": 4}),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=8),
    "cohere": lambda: CohereConfig(**SHAPE),
    "opt": lambda: OPTConfig(
        vocab_size=OLD, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
}
VISION_LANGUAGE = ("llava", "internvl", "qwen2_vl", "qwen2_5_vl")


def language_model(name: str):
    """A random causal language model, weights large enough that every token matters."""
    return _filled(AutoModelForCausalLM.from_config(LANGUAGE[name]()))


def vision_language_model(family: str):
    """A random VLM with 16 vision tokens per image."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    qwen = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "depth": 2, "num_heads": 2}
    if family == "llava":
        tower = CLIPVisionConfig(**vision, image_size=16, patch_size=4)
        config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SHAPE), image_token_id=IMAGE)
    elif family == "internvl":
        tower = InternVLVisionConfig(**vision, image_size=[32, 32], patch_size=[4, 4])
        config = InternVLConfig(vision_config=tower, text_config=Qwen2Config(**SHAPE), image_token_id=IMAGE)
    elif family == "qwen2_vl":
        tower = patches | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        config = Qwen2VLConfig(vision_config=tower, text_config=SHAPE | rope, **qwen)
    else:
        tower = patches | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
        config = Qwen2_5_VLConfig(
            vision_config=tower | {"fullatt_block_indexes": [1]}, text_config=SHAPE | rope, **qwen
        )
    return _filled(AutoModelForImageTextToText.from_config(config))


def vision_batch(family: str) -> dict:
    """Two rows with an image each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (2, 24), generator=generator)
    ids[:, 2:18] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(2 * 64, 3 * 16, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 2)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        size = 16 if family == "llava" else 32
        inputs["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    return inputs


@torch.no_grad()
def _filled(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.15)
        elif parameter.abs().sum() == 0:
            parameter.normal_(0.0, 0.1)
    return model.float().eval()
