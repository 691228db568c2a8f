"""Tables that translate option names of the four documents into the recipes' own options.

`parse_recipe(..., aliases=TRAIN_VQGAN)` accepts the documented names on the command line and in YAML files, and shows
each in `--help` beside its option. The same tables suggest an option for an unknown flag ("Did you mean"), so that a
documented name given to the wrong recipe leads to that recipe's option of the same meaning.

A name with dots is a path in a documented YAML file, for example `method_settings.merge_ratio`. Its last part is also a flag
if no option and no other path of the recipe has that name. A documented name may equal an option's own name only if the
option is among those it stands for: then it selects one section of several, or sets further options with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """The options that a documented name stands for.

    Args:
        option: `section.field`, or a tuple of several.
        convert: function from the documented value to the option's value, or to a tuple of one value per option; it raises
            ValueError with one sentence for an invalid value. None passes the value on.
    """

    option: str | tuple[str, ...]
    convert: Callable[[Any], Any] | None = None


Aliases = dict[str, str | Alias]


def _is_cpu(device: Any) -> bool:
    """Returns the value of `use_cpu` for a documented device; without it, Trainer uses the first visible accelerator."""
    import torch

    if device == "cpu":
        return True
    kind, _, index = str(device).partition(":")
    if index not in ("", "0"):
        raise ValueError(
            f"a run uses the first device that it can see; give --device {kind}, and choose the device by the environment."
        )
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != kind:
        here = "cpu" if found is None else f"{found.type} or cpu"
        raise ValueError(f"this machine has no device {str(device)!r} that torch can use; give --device {here}.")
    return False


def _negated(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}.")
    return not value


_TOKCOM_STAGES = ("vae_training", "denoiser_training", "distillation_training")


def _epochs(value: Any) -> tuple[float, int]:
    """Returns `num_train_epochs` and the `max_steps` of -1, because a positive `max_steps` would override the epochs."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"expected a number of epochs above 0, got {value!r}.")
    return float(value), -1


# Other names of TrainConfig are options already: dataset_name, chunk_size, noise_std, sample_every, num_samples,
# wandb_project.
TRAIN_TOKCOM: Aliases = {
    "tokenizer_path": "run.tokenizer",
    "max_length": "run.length",
    "batch_size": Alias(
        tuple(f"{stage}.per_device_{part}_batch_size" for stage in _TOKCOM_STAGES for part in ("train", "eval"))
    ),
    "num_workers": Alias(tuple(f"{stage}.dataloader_num_workers" for stage in _TOKCOM_STAGES)),
    "vae_epochs": Alias(("vae_training.num_train_epochs", "vae_training.max_steps"), _epochs),
    "vae_lr": "vae_training.learning_rate",
    "diffusion_epochs": Alias(("denoiser_training.num_train_epochs", "denoiser_training.max_steps"), _epochs),
    "diffusion_lr": "denoiser_training.learning_rate",
    "num_sample_steps": "denoiser_training.sample_steps",
}

INFER_TOKCOM: Aliases = {"checkpoint": "run.model", "input_text": "run.text"}

TRAIN_VQGAN: Aliases = {
    "train_dir": "run.image_dir",
    # Only the model's option: the discriminator's in_channels are the model's output channels.
    "in_channels": "model.in_channels",
    # Documented runs are measured in epochs; each epoch ends with an evaluation and a checkpoint.
    "epochs": Alias(
        ("training.num_train_epochs", "training.max_steps", "training.eval_strategy", "training.save_strategy"),
        lambda epochs: (epochs, -1, "epoch", "epoch"),
    ),
    "device": Alias("training.use_cpu", _is_cpu),
    "use_amp": "training.bf16",
    "CODEBOOK_CONFIG.n_embed": "model.codebook_size",
    "CODEBOOK_CONFIG.embed_dim": "model.codebook_dim",
    # The decay of the codebook; that of the averaged weights is --training.ema_decay.
    "CODEBOOK_CONFIG.ema_decay": "model.ema_decay",
    "CODEBOOK_CONFIG.commitment_loss_beta": "model.commitment_weight",
    "TRAINER_CONFIG.entropy_weight": "model.entropy_weight",
    "TRAINER_CONFIG.l1_weight": "model.l1_weight",
    "TRAINER_CONFIG.perceptual_weight": "training.perceptual_weight",
    "TRAINER_CONFIG.adversarial_weight": "training.adversarial_weight",
    "TRAINER_CONFIG.reset_low_usage_interval": Alias(
        ("model.reset_interval", "training.reset_epochs"), lambda epochs: (0, epochs)
    ),
    "TRAINER_CONFIG.reset_low_usage_percentage": "model.reset_fraction",
    "TRAINING_STRATEGY.batch_size": Alias(
        ("training.per_device_train_batch_size", "training.per_device_eval_batch_size")
    ),
    "TRAINING_STRATEGY.temperature": Alias(
        ("model.temperature", "training.temperature_schedule"), lambda temperature: (temperature, "constant")
    ),
    "TRAINING_STRATEGY.codebook_init": "model.codebook_init",
    "TRAINING_STRATEGY.commitment_warmup_epochs": "training.commitment_warmup_epochs",
    "TRAINING_STRATEGY.reset_dead_codes_threshold": Alias(
        ("model.dead_code_threshold", "model.dead_code_unit"), lambda vectors: (vectors, "count")
    ),
    "TRAINING_STRATEGY.disable_codebook_expansion": Alias("training.codebook_expansion", _negated),
    "codebook_diversity_loss": "model.diversity_weight",
}

ANALYZE_CODEBOOK: Aliases = {}

TRAIN_TOKEN_PRUNING: Aliases = {
    # A positive max_steps would override the epochs.
    "trainer_settings.dl_settings.epochs": Alias(
        ("training.num_train_epochs", "training.max_steps"), lambda epochs: (epochs, -1)
    ),
    "trainer_settings.dl_settings.batch_size": "training.per_device_train_batch_size",
    "trainer_settings.dl_settings.optimizers.token_merger.lr": "training.merger_learning_rate",
    "trainer_settings.dl_settings.optimizers.layer_pruners.lr": "training.pruner_learning_rate",
    "trainer_settings.dl_settings.optimizers.discriminator.lr": "training.discriminator_learning_rate",
    "trainer_settings.optimizers.token_merger.lr": "training.merger_learning_rate",
    "trainer_settings.optimizers.layer_pruners.lr": "training.pruner_learning_rate",
    "trainer_settings.optimizers.discriminator.lr": "training.discriminator_learning_rate",
    "method_settings.merger_type": "merger.merger_type",
    "method_settings.merge_ratio": "merger.merge_ratio",
    "method_settings.target_merge_tokens": "merger.target_merge_tokens",
    "method_settings.merge_sparsity_weight": "training.merge_sparsity_weight",
    "method_settings.pruning_layers": "pruner.layers",
    "method_settings.pruner_d_internal": "pruner.internal_size",
    "method_settings.pruner_num_heads": "pruner.num_attention_heads",
    "method_settings.pruner_type": "pruner.pruner_type",
    "method_settings.temperature": "training.temperature_start",
    "method_settings.temperature_min": "training.temperature_end",
    "method_settings.temperature_anneal_rate": "training.temperature_anneal_rate",
    "method_settings.adv_loss_weight": "training.adversarial_weight",
    "method_settings.task_loss_weight": "training.task_weight",
    "method_settings.disc_reinit_prob": "training.discriminator_reinit_probability",
    "manager_settings.mode": "run.mode",
    "manager_settings.available_gpus": "run.available_gpus",
    "manager_settings.gpus_per_subtask": "run.gpus_per_subtask",
    "search_settings.enable": "run.search",
    "search_settings.n_trials": "run.trials",
    # The proposed features of the document's summary, named by their titles.
    "method_settings.dynamic_merge_ratio": "merger.question_dependent_ratio",
    "method_settings.hierarchical_pruning": Alias(
        ("pruner.keep_ratio", "pruner.keep_tokens"), lambda ratios: (ratios, None)
    ),
    "method_settings.attention_guided_merge": "merger.attention_guided",
    "method_settings.max_vision_tokens": "data.max_vision_tokens",
    "method_settings.image_max_size": "data.image_max_size",
}

TRAIN_JOINT_LFQ: Aliases = {
    "model.internvl_path": "run.base",
    "model.vocab_expansion.enabled": "run.expand_vocabulary",
    "model.vocab_expansion.embedding_init_method": "run.embedding_init_method",
    "model.vocab_expansion.embedding_init_std": "run.embedding_init_std",
    "model.vocab_expansion.freeze_original": "run.freeze_original",
}

TABLES = (TRAIN_TOKCOM, INFER_TOKCOM, TRAIN_VQGAN, ANALYZE_CODEBOOK, TRAIN_TOKEN_PRUNING, TRAIN_JOINT_LFQ)


def options_of(alias: str | Alias) -> tuple[str, ...]:
    """Returns the options (`section.field`) that an entry of a table stands for."""
    option = alias.option if isinstance(alias, Alias) else alias
    return (option,) if isinstance(option, str) else option


def meanings(name: str) -> list[str]:
    """Returns the fields that a documented name stands for in any recipe, in the order of the tables, without repeats."""
    found = [
        option.rpartition(".")[2]
        for table in TABLES
        for known, alias in table.items()
        if known.rpartition(".")[2] == name
        for option in options_of(alias)
    ]
    return list(dict.fromkeys(found))
