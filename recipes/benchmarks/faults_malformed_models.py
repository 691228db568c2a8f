"""Small models and the good files they save, from which the malformed files are made."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from tokcom_hf import VQGAN, TokComConfig, TokComModel, TokComVAE, TokComVAEConfig, VQGANConfig
from tokcom_hf.data.latents import save_latents
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor
from tokcom_hf.models.processing_lfq import LFQProcessor
from tokcom_hf.small_models.small_internvl import build_small_internvl
from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor
from tokcom_hf.tokcom_checkpoint_writer import save_checkpoint

VOCABULARY = 257
SHAPE = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1,
}  # fmt: skip
VAE = {"vocab_size": VOCABULARY + 1, "omni_token_id": VOCABULARY, "chunk_size": 4, **SHAPE}
VQ = {
    "image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "channel_multipliers": [1, 2],
    "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1, "latent_channels": 12,
}  # fmt: skip


@cache
def tokenizer() -> Any:
    """A tokenizer of 257 tokens: 256 bytes and the end of a text."""
    return train_tokenizer(["a text"], VOCABULARY)


@cache
def lfq_processor() -> LFQProcessor:
    """A processor whose vocabulary has 2^4 image tokens after the text tokens."""
    return LFQProcessor(tokenizer=tokenizer(), lfq_start_token_id=VOCABULARY, output_dim=4)


@cache
def model(kind: str) -> Any:
    """`vae`, `tokcom` or `vqgan` with seeded weights."""
    torch.manual_seed(0)
    if kind == "vqgan":
        return VQGAN(VQGANConfig(**VQ)).eval()
    if kind == "vae":
        return TokComVAE(TokComVAEConfig(**VAE)).eval()
    return TokComModel(TokComConfig(vae=VAE, denoiser=SHAPE, max_chunks=8)).eval()


def save_model(kind: str, folder: Path) -> Path:
    """Saves a model with its tokenizer or image processor; returns the folder."""
    model(kind).save_pretrained(folder)
    if kind == "vqgan":
        VQGANImageProcessor(16, size_divisor=4).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
    return folder


def save_base(kind: str, folder: Path) -> Path:
    """Saves an untrained `llama`, `llava` or `internvl` with its tokenizer or processor; returns the folder."""
    torch.manual_seed(0)
    if kind == "llama":
        base, processor = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)), tokenizer()
    elif kind == "llava":
        vision = {name: SHAPE[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
        processor = scene_processor(32, 8)
        tower = CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=1, **vision)
        base = build_small_llava(tower, SHAPE, processor)
    else:
        vision = {"image_size": [32, 32], "patch_size": [8, 8], "num_hidden_layers": 1, "num_attention_heads": 2}
        base, processor = build_small_internvl(vision | {"hidden_size": 16, "intermediate_size": 16}, SHAPE)
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_pt(path: Path, tokenizer_path: str, kind: str = "tokcom") -> Path:
    """Saves a model as the documented `.pt` checkpoint; returns the path."""
    return save_checkpoint(
        path, model(kind), epoch=1, val_loss=1.0, tokenizer_path=tokenizer_path, max_length=32
    )  # fmt: skip


def save_latents_of(path: Path) -> Path:
    """Saves latents of two texts, of six and of three tokens; returns the path."""
    return save_latents(path, [torch.zeros(2, 16), torch.zeros(1, 16)], [6, 3], model("tokcom"))
