"""recipes/pretrain_internvl.py and train_joint_lfq.py from end to end at a small setting."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

from tests.helpers.recipes import load

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL_BASE = [
    "--tower_steps", "3", "--eval_questions", "10", "--max_steps", "3", "--per_device_train_batch_size", "8",
    "--scenes.image_size", "32", "--vision.image_size", "32", "--vision.patch_size", "4", "--vision.hidden_size", "16",
    "--vision.intermediate_size", "16", "--text.hidden_size", "32", "--text.intermediate_size", "32",
    "--text.num_hidden_layers", "2", "--threads", "1",
]  # fmt: skip
SMALL_RUN = [
    "--train_images", "40", "--eval_images", "12", "--output_dim", "8", "--max_steps", "12", "--warmup_steps", "0",
    "--quantizer.hidden_size", "16", "--quantizer.intermediate_size", "16", "--per_device_train_batch_size", "8",
    "--save_steps", "6", "--eval_steps", "6", "--quantizer_start_steps", "5", "--threads", "1",
]  # fmt: skip


@pytest.mark.slow
def test_pretraining_and_joint_training_leave_models_that_answer_and_draw(tmp_path, monkeypatch, capsys):
    pretrain, joint = load("pretrain_internvl"), load("train_joint_lfq")
    base, out = tmp_path / "base", tmp_path / "joint"
    told = pretrain.main(["--output_dir", str(base), *SMALL_BASE])
    assert told["scenes"]["image_size"] == 32 and 0 <= told["accuracy"]["all"] <= 1
    common = ["--base", str(base), "--output_dir", str(out), *SMALL_RUN]
    results = joint.main(common)

    # What is printed, saved and written on the cards is the same result.
    assert results == json.loads((out / "results.json").read_text(encoding="utf-8"))
    after, before = results["after"], results["before"]
    assert before["continuous_agreement"] == 1 and before["continuous_kl"] >= before["continuous_lfq_mass"] > 0
    assert after["lfq_mass_first"] < before["lfq_mass_first"]
    assert after["generation_loss"] < before["generation_loss"]
    printed = capsys.readouterr().out
    assert f"generation loss {after['generation_loss']:.3f} nats" in printed and "dead" in printed
    assert f"{after['generation_loss']:.3f}" in (out / "model" / "README.md").read_text(encoding="utf-8")
    card = (out / "quantizer" / "README.md").read_text(encoding="utf-8")
    assert f"{after['bit_mean_min']:.3f} to {after['bit_mean_max']:.3f}" in card and "8-bit codes" in card
    with Image.open(out / "joint_training.png") as figure:
        assert figure.width > 800

    # The models load by themselves, read an image as ids, draw ids after a caption, and answer from codes.
    quantizer, model = AutoModel.from_pretrained(out / "quantizer"), AutoModel.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    start, end = model.lfq_token_range
    assert end - start == quantizer.config.codebook_size == 256
    prompt = tokenizer("a small red circle at the top" + tokenizer.start_image_token, add_special_tokens=False)
    ids = model.generate(torch.tensor([prompt["input_ids"]]), mode="image", num_image_tokens=16, do_sample=False)
    drawn = ids[0, len(prompt["input_ids"]) :]
    assert len(drawn) == 16 and ((drawn >= start) & (drawn < end)).all()
    plain = AutoModelForImageTextToText.from_pretrained(base)
    assert torch.equal(
        plain.get_input_embeddings().weight, model.base.get_input_embeddings().weight
    )  # old rows unchanged

    # Going on with a finished run trains no further and reports the same.
    again = joint.main([*common, "--resume_from_checkpoint", "true"])
    assert again["after"] == after and again["steps"] == 12


@pytest.mark.slow
def test_joint_training_on_json_lines_with_a_frozen_language_model(tmp_path, monkeypatch):
    pretrain, joint = load("pretrain_internvl"), load("train_joint_lfq")
    pretrain.main(["--output_dir", str(tmp_path / "base"), *SMALL_BASE])
    lines = []
    for index, colour in enumerate(["red", "green", "blue", "yellow"] * 2):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{index}.png")
        lines.append({"image": f"{index}.png", "caption": colour, "question": "what colour ?", "answer": colour})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    files = ["--image_text_file", str(rows), "--eval_file", str(rows)]
    common = ["--base", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), *SMALL_RUN]
    results = joint.main([*common, *files, "--tune_llm", "false", "--packed_questions", "false"])
    assert results["train_images"] == 8 and results["data"] == "rows.jsonl"
    assert results["after"]["continuous_kl"] < results["before"]["continuous_kl"]
    assert results["after"]["continuous_agreement"] == 1
    with pytest.raises(ValueError, match="belong together"):
        joint.main([*common, "--image_text_file", str(rows)])


@pytest.mark.parametrize("size", ["tiny", "base", "paper"])
def test_every_configuration_fits_the_recipe(tmp_path, monkeypatch, size):
    joint = load("train_joint_lfq")
    path = RECIPES / "configs" / size / "train_joint_lfq.yaml"
    values = joint.parse_recipe("", joint.SECTIONS, path, [])
    joint.RunArguments(**values["run"])
    config = joint.LFQConfig(**values["quantizer"])
    options = values["training"] | {"output_dir": str(tmp_path), "use_cpu": True}
    args = joint.JointLFQTrainingArguments(**options)
    assert (args.generation_weight, args.understanding_weight, args.caption_drop) == (1.0, 25.0, 0.1)
    assert config.output_dim == 16 and args.weight_decay == 0.05
    if size == "paper":
        assert config.num_hidden_layers == 16 and args.learning_rate == 1e-4
