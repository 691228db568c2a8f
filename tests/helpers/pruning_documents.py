"""A small LLaVA with the documented depth, and recipes run as their commands run them."""

import json
import runpy
import sys
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, set_seed

RECIPES = Path(__file__).parents[2] / "recipes"


def save_small_llava(folder: Path) -> Path:
    """32 layers of width 16 and images of 4 x 4 vision tokens: every documented layer number exists."""
    from tokcom_hf.small_models.small_vlm import build_small_llava, scene_processor

    set_seed(0)
    processor = scene_processor(32, 8)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 32, "num_attention_heads": 2}
    build_small_llava(vision, text | {"num_key_value_heads": 2}, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps({"scenes": {"image_size": 32}}))
    return folder


def run_script(monkeypatch, name: str, *arguments) -> None:
    """What `python recipes/NAME ARGUMENTS` runs."""
    torch.set_num_threads(1)
    script = RECIPES / name
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(RECIPES))
    runpy.run_path(str(script), run_name="__main__")
