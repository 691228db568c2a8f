"""Runs every recipe that knows `--push_to_hub`, at its smallest, in one process: `push_recipes.py FOLDER`.

HF_ENDPOINT and HF_TOKEN are set. The result, by recipe, is its output folder or the error; what one recipe leaves, the next
one starts from.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path

import torch
from loopback import only_loopback

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FEW_STEPS = "--max_steps 2 --save_steps 2 --per_device_train_batch_size 4 --use_cpu true --disable_tqdm true"
SMALL_TOKCOM = (
    "--train_file {work}/text.txt --vae.hidden_size 32 --vae.intermediate_size 64 --vae.latent_size 16 --eval_steps 2 "
    "--denoiser.hidden_size 32 --denoiser.intermediate_size 64 --denoiser.num_hidden_layers 1 --context.hidden_size 32 "
    "--context.intermediate_size 64 --context.num_hidden_layers 1 --run.length 32 --run.tokenizer_vocab_size 300 "
    "--metric_rows 2 --sample_chunks 4 --sample_steps 2 --sample_every 0"
)
SMALL_BASELINE = (
    "--train_file {work}/text.txt --parameters 40000 --head_dim 16 --num_layers 1 --length 16 --tokenizer_vocab_size 300 "
    "--tokens 256"
)
SMALL_VQGAN = (
    "--image_size 16 --run.num_train 32 --run.num_eval 8 --model.base_channels 8 --logging_steps 2 --eval_steps 2 "
    "--autoencoder_steps 1 --init_images 16"
)
SMALL_VLM = (
    "--image_size 32 --vision.hidden_size 16 --vision.intermediate_size 16 --text.hidden_size 32 "
    "--text.intermediate_size 32 --text.num_hidden_layers 3 --tower_steps 1 --grid 4 --eval_questions 8 --threads 1"
)
SMALL_PRUNING = (
    "--base_model {work}/pretrain_vlm --train_images 20 --eval_questions 8 --target_merge_tokens 8 --keep_tokens 5 3 "
    "--threads 1"
)
SMALL_INTERNVL = (
    "--tower_steps 1 --eval_questions 8 --scenes.image_size 32 --vision.image_size 32 --vision.patch_size 4 "
    "--vision.hidden_size 16 --vision.intermediate_size 16 --text.hidden_size 32 --text.intermediate_size 32 "
    "--text.num_hidden_layers 2 --threads 1"
)
SMALL_JOINT = (
    "--base {work}/pretrain_internvl --train_images 16 --eval_images 8 --output_dim 6 --warmup_steps 0 --eval_steps 2 "
    "--quantizer.hidden_size 16 --quantizer.intermediate_size 16 --quantizer_start_steps 1 --threads 1"
)
SMALL_IMAGE_TOKENS = (
    "--train_images 32 --eval_captions 4 --vqgan.codebook_size 16 --vqgan.codebook_dim 4 --vqgan_training.max_steps 2 "
    "--vqgan_training.autoencoder_steps 1 --vqgan.base_channels 8 --vqgan.latent_channels 8 "
    "--vqgan_training.use_cpu true --training.max_steps 2 --training.save_steps 2 "
    "--training.use_cpu true --base_steps 1 --training.per_device_train_batch_size 4 --base_model.hidden_size 32 "
    "--base_model.num_hidden_layers 1 --base_model.intermediate_size 32 --training.push_to_hub true "
    "--training.hub_model_id ada/image_tokens"
)
COMMANDS = {
    "train_tokcom": f"{SMALL_TOKCOM} {FEW_STEPS}",
    "train_ar_baseline": f"{SMALL_BASELINE} --per_device_train_batch_size 4 --use_cpu true --disable_tqdm true",
    "train_vqgan": f"{SMALL_VQGAN} {FEW_STEPS}",
    "pretrain_vlm": f"{SMALL_VLM} {FEW_STEPS}",
    "train_token_pruning": f"{SMALL_PRUNING} {FEW_STEPS}",
    "pretrain_internvl": f"{SMALL_INTERNVL} {FEW_STEPS}",
    "train_joint_lfq": f"{SMALL_JOINT} {FEW_STEPS}",
    "image_tokens": SMALL_IMAGE_TOKENS,
}


def run(name: str, work: Path) -> None:
    words = [*COMMANDS[name].format(work=work).split(), "--output_dir", str(work / name)]
    if name != "image_tokens":  # two of its sections hold settings of a trainer
        words += ["--push_to_hub", "true", "--hub_model_id", f"ada/{name}"]
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.argv = [str(RECIPES / f"{name}.py"), *words]
    torch.manual_seed(0)
    module.main()


if __name__ == "__main__":
    only_loopback()
    torch.set_num_threads(1)
    work, results = Path(sys.argv[1]), {}
    paragraphs = (f"Document {i}: the quick brown fox number {i} jumps over {i * i} dogs." for i in range(80))
    (work / "text.txt").write_text("\n\n\n".join(paragraphs), encoding="utf-8")
    for name in COMMANDS:
        try:
            run(name, work)
            results[name] = {"folder": str(work / name)}
        except BaseException:  # a recipe may end with SystemExit, too
            results[name] = {"error": traceback.format_exc()}
    (work / "recipes.json").write_text(json.dumps(results), encoding="utf-8")
