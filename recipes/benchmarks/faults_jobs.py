"""The runs that `faults.py` disturbs: every training recipe, so small that a whole run takes seconds on one core."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[1]
CPU = ("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--threads", "1")
SAVES = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3")
TOKCOM = (
    "--vae.hidden_size", "32", "--vae.intermediate_size", "64", "--vae.latent_size", "16", "--denoiser.hidden_size", "32",
    "--denoiser.intermediate_size", "64", "--denoiser.num_hidden_layers", "1", "--context.hidden_size", "32",
    "--context.intermediate_size", "64", "--context.num_hidden_layers", "1", "--run.length", "32",
    "--run.tokenizer_vocab_size", "300", "--max_steps", "6", "--eval_steps", "2", "--per_device_eval_batch_size", "8",
    "--logging_steps", "2", "--per_device_train_batch_size", "2", "--metric_rows", "2", "--sample_chunks", "4",
    "--sample_steps", "2", "--sample_every", "0", *SAVES, *CPU,
)  # fmt: skip
VQGAN = (
    "--image_size", "16", "--run.num_train", "24", "--run.num_eval", "8", "--model.base_channels", "8",
    "--model.latent_channels", "8", "--model.codebook_size", "16", "--discriminator.base_channels", "4",
    "--per_device_train_batch_size", "4", "--logging_steps", "2", "--eval_steps", "2", "--autoencoder_steps", "1",
    "--adversarial_start", "0.3", "--max_steps", "6", "--init_images", "16", *SAVES, *CPU,
)  # fmt: skip
SMALL_VLM = (
    "--tower_steps", "3", "--eval_questions", "5", "--max_steps", "4", "--per_device_train_batch_size", "4",
    "--vision.hidden_size", "16", "--vision.intermediate_size", "16", "--text.hidden_size", "32",
    "--text.intermediate_size", "32", "--text.num_hidden_layers", "3", "--vision.image_size", "32", *SAVES, *CPU,
)  # fmt: skip
PRUNING = (
    "--train_images", "40", "--eval_questions", "5", "--max_steps", "6", "--per_device_train_batch_size", "4",
    "--target_merge_tokens", "8", "--pruner.layers", "1", "2", "--keep_tokens", "4", "2", "--adversarial_weight", "0.1",
    "--discriminator.layers", "-1", "-2", "--discriminator.internal_size", "16", "--logging_steps", "2",
    "--eval_max_new_tokens", "4", "--eval_strategy", "steps", "--eval_steps", "3", *SAVES, *CPU,
)  # fmt: skip
JOINT = (
    "--train_images", "24", "--eval_images", "4", "--output_dim", "6", "--max_steps", "6", "--warmup_steps", "0",
    "--quantizer.hidden_size", "16", "--quantizer.intermediate_size", "16", "--per_device_train_batch_size", "4",
    "--eval_steps", "3", "--quantizer_start_steps", "2", "--logging_steps", "2", *SAVES, *CPU,
)  # fmt: skip
IMAGE_TOKENS = (
    "--train_images", "24", "--eval_captions", "4", "--image_size", "16", "--vqgan.codebook_size", "16",
    "--vqgan.codebook_dim", "4", "--vqgan.base_channels", "8", "--vqgan.latent_channels", "8",
    "--vqgan_training.max_steps", "4", "--vqgan_training.autoencoder_steps", "1", "--base_model.hidden_size", "32",
    "--base_model.intermediate_size", "32", "--base_model.num_hidden_layers", "1", "--base_steps", "3",
    "--training.max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "2", *SAVES, *CPU,
)  # fmt: skip
AR_BASELINE = (
    "--parameters", "20000", "--head_dim", "16", "--num_layers", "1", "--length", "16", "--tokens", "384",
    "--tokenizer_vocab_size", "300", "--per_device_train_batch_size", "4", "--warmup_steps", "1",
    *SAVES, *CPU[:-2],
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command of one recipe.

    Attributes:
        recipe: file name without `.py`.
        arguments: of the command, without `--output_dir`; `{work}` stands for the benchmark's folder.
        trainings: number of calls of `Trainer.train` in a whole run; faults happen in or after the last one.
        base: job whose finished folder is copied to the output folder first, because the recipe continues there.
        needs: jobs whose output folders the arguments name.
    """

    recipe: str
    arguments: tuple[str, ...]
    trainings: int = 1
    base: str | None = None
    needs: tuple[str, ...] = ()


# One job for each trainer of the package.
TRAINERS: Mapping[str, Job] = {
    "vae": Job("train_tokcom", (*TOKCOM, "--stage", "vae", "--train_file", "{work}/text.txt")),
    "denoiser": Job("train_tokcom", (*TOKCOM, "--stage", "denoiser", "--train_file", "{work}/text.txt"), base="vae"),
    "distillation": Job(
        "train_tokcom", (*TOKCOM, "--stage", "distill", "--train_file", "{work}/text.txt"), base="denoiser"
    ),
    "vqgan": Job("train_vqgan", VQGAN),
    "pruning": Job(
        "train_token_pruning", (*PRUNING, "--base_model", "{work}/whole/pretrain_vlm"), needs=("pretrain_vlm",)
    ),
    "joint_lfq": Job(
        "train_joint_lfq", (*JOINT, "--base", "{work}/whole/pretrain_internvl"), needs=("pretrain_internvl",)
    ),
}
OTHERS: Mapping[str, Job] = {
    "tokcom": Job("train_tokcom", (*TOKCOM, "--stage", "all", "--train_file", "{work}/text.txt"), trainings=3),
    "pretrain_vlm": Job("pretrain_vlm", (*SMALL_VLM, "--grid", "4"), trainings=2),
    "pretrain_internvl": Job(
        "pretrain_internvl", (*SMALL_VLM, "--scenes.image_size", "32", "--vision.patch_size", "4"), trainings=2
    ),
    "image_tokens": Job("image_tokens", IMAGE_TOKENS, trainings=3),
    "ar_baseline": Job("train_ar_baseline", (*AR_BASELINE, "--train_file", "{work}/text.txt")),
}
JOBS: Mapping[str, Job] = {**TRAINERS, **OTHERS}


def with_needs(names: tuple[str, ...]) -> list[str]:
    """`names` and all jobs that they build on, in an order in which they can run."""
    found: list[str] = []
    for name in names:
        job = JOBS[name]
        for needed in with_needs(tuple(filter(None, (job.base, *job.needs)))):
            if needed not in found:
                found.append(needed)
        if name not in found:
            found.append(name)
    return found


WORDS = (
    "the",
    "red",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "brown",
    "dog",
    "and",
    "runs",
    "under",
    "old",
    "house",
    "stone",
)


def write_text(file: Path) -> None:
    """Writes the text of the text recipes: sixty documents of forty words."""
    documents = [
        " ".join(WORDS[(3 * row + step * (row % 5 + 1)) % len(WORDS)] for step in range(40)) for row in range(60)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")
