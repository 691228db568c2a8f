"""`expand_vocab.py` and `image_tokens.py`: what they leave behind, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, LlamaConfig, LlamaForCausalLM, pipeline

from tests.helpers.recipes import load
from tokcom_hf import LFQExpandedModel, get_lfq_token_range
from tokcom_hf.data.tokenizers import train_tokenizer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama whose table has more rows than its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["a red circle and a blue ring"] * 4, 270)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_expanding_a_folder(base, tmp_path, capsys):
    report = load("expand_vocab").main([str(base), str(tmp_path / "out"), "--output_dim", "5"])
    assert report["lfq_token_range"] == [320, 352] and report["old_logits"] == "bitwise equal"
    assert report["saved"] == "new rows" and report["megabytes"] < 0.1
    assert "LFQ ids 320 … 351" in capsys.readouterr().out
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(model, LFQExpandedModel) and model.config.text_vocab_size == len(processor.tokenizer)
    ids = model.generate(**processor(text="a ring<lfq:3>", return_tensors="pt"), mode="image", num_image_tokens=4)
    assert processor.decode(ids[0]).count("<lfq:") == 5


def test_merging_and_the_small_internvl(base, tmp_path):
    report = load("expand_vocab").main([str(base), str(tmp_path / "plain"), "--merge", "--output_dim", "5"])
    assert report["saved"] == "merged"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is LlamaForCausalLM and get_lfq_token_range(plain) == (320, 352)
    report = load("expand_vocab").main(["--output_dir", str(tmp_path / "small"), "--output_dim", "8"])
    assert report["model"] == "InternVLForConditionalGeneration" and report["trainable_rows"]["trainable"] == 256


def test_wrong_arguments(base, tmp_path):
    run = load("expand_vocab").main
    with pytest.raises(ValueError, match="1 to 24"):
        run([str(base), str(tmp_path / "out"), "--output_dim", "25"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="there is no such folder"):
        run(["/no/such/model", str(tmp_path / "out")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        run([str(base), str(tmp_path / "full")])
    with pytest.raises(ValueError, match="belong together"):
        load("image_tokens").main(["--image_text_file", "x.jsonl", "--output_dir", str(tmp_path / "i")])


@pytest.mark.slow
def test_the_full_circle_at_a_small_setting(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPES / "image_tokens.py")]
    small = {
        "output_dir": out, "train_images": 96, "eval_captions": 8, "vqgan.codebook_size": 16, "vqgan.codebook_dim": 4,
        "vqgan_training.max_steps": 3, "vqgan_training.autoencoder_steps": 1,
        "training.max_steps": 4, "training.save_steps": 2, "base_steps": 2,
        "training.per_device_train_batch_size": 8, "base_model.hidden_size": 32, "base_model.num_hidden_layers": 1,
        "base_model.intermediate_size": 32,
    }  # fmt: skip
    command += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shapes and colours" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 4 and set(results["drawn"]) >= {"true images", "their reconstructions", "drawn"}
    # The check has teeth: true pictures pass, those of four training steps do not.
    assert results["drawn"]["true images"]["shape_and_colour"] >= 0.9 > results["drawn"]["drawn"]["shape_and_colour"]
    for name in ("generated.png", "completed.png"):
        assert Image.open(out / name).width > 400
    card = (out / "README.md").read_text()
    assert f"{results['generation_loss']:.3f} nats" in card and "lfq-image-text" in card
    pipe = pipeline("lfq-image-text", model=str(out))
    assert pipe("a red ring at the top")[0]["images"][0].size == (48, 48)
    # The base's rows have not moved.
    base, model = LlamaForCausalLM.from_pretrained(out / "base"), LFQExpandedModel.from_pretrained(out)
    assert torch.equal(base.lm_head.weight, model.base.lm_head.weight)
    # The same command with --resume goes on where the run ended, without training anything again.
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((out / "results.json").read_text())["generation_loss"] == results["generation_loss"]
