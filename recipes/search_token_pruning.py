"""Searches learning rates and loss weights of token pruning with Optuna, through `Trainer.hyperparameter_search`.

    python recipes/search_token_pruning.py                       # 6 trials on the small VLM; needs tokcom_hf[search]
    python recipes/search_token_pruning.py --trials 30 --max_steps 500 --storage sqlite:///search.db

The objective is accuracy in hard mode under `flops_budget`. Prints and saves the best trial; its values can be passed
to recipes/train_token_pruning.py as they stand.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from train_token_pruning import (
    DEFAULT_CONFIG,
    SECTIONS,
    build_data,
    build_model,
    choose_gpus,
    collators,
    ensure_small_vlm,
)
from train_token_pruning import RunArguments as TrainArguments
from transformers import AutoProcessor, set_seed

from tokcom_hf import TokenPruningTrainer, TokenPruningTrainingArguments
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.vqa_sources import VQASourceArguments, vqa_collator
from tokcom_hf.documented_names import TRAIN_TOKEN_PRUNING
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.run_arguments import require_positive
from tokcom_hf.threads import use_all_cores
from tokcom_hf.trainers.pruning_build import build_discriminator, check_heads, check_merge_budget


@dataclass
class RunArguments(TrainArguments):
    """What is searched."""

    output_dir: str = field(default="outputs/search_token_pruning", metadata={"help": "Folder of best.json."})
    mode: str | None = field(default="optuna", metadata={"help": "Must be optuna, the only mode of this recipe."})
    trials: int | None = field(default=6, metadata={"help": "Number of trials."})
    storage: str | None = field(default=None, metadata={"help": "Optuna storage URL; an existing search continues."})


def main(argv: list[str] | None = None) -> None:
    """Reads the arguments and searches."""
    search(parse_recipe(__doc__, SECTIONS | {"run": RunArguments}, DEFAULT_CONFIG, argv, TRAIN_TOKEN_PRUNING))


def check_search(run: RunArguments) -> None:
    """Refuses arguments that a search cannot use, and a missing Optuna; restricts the run to --available_gpus."""
    if run.mode != "optuna" or run.search is False:
        raise RecipeError(
            f"This recipe only searches, got --mode {run.mode} --search {run.search}; "
            "recipes/train_token_pruning.py trains once."
        )
    if run.init_from or run.init_step is not None:
        raise RecipeError(
            "A search trains fresh heads in every trial; --init_from and --init_step are for train_token_pruning.py."
        )
    require_positive(run, "trials")
    choose_gpus(run)
    if run.overwrite or run.checkpoint_wanted:
        raise RecipeError("A search keeps no checkpoints; go on with it by naming the same --storage.")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise RecipeError("The search needs Optuna: pip install 'tokcom_hf[search]'.") from error


def search(values: dict) -> None:
    """Runs the search that the values of a recipe's sections describe (`parse_recipe`)."""
    run, source = RunArguments(**values["run"]), VQASourceArguments(**values["data"])
    check_search(run)
    check_heads(values, run.strategy, run.keep, run.dtype)
    use_all_cores(run.threads)
    fixed = {
        "output_dir": run.output_dir,
        "seed": run.seed,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "early_stopping_patience": 0,
    }
    args = TokenPruningTrainingArguments(**values["training"] | fixed)
    out = Path(run.output_dir)
    # Made now, so that a folder that cannot be made is refused before the first trial.
    out.mkdir(parents=True, exist_ok=True)
    ensure_small_vlm(run.base_model, run.threads)
    processor = load_pretrained(AutoProcessor, run.base_model, "Processor")

    def fresh_model(trial=None):
        set_seed(run.seed)
        return build_model(run, values)

    # Before the data, which takes longer to make: a folder that cannot be loaded is refused at once.
    probe = fresh_model()
    train, held_out = build_data(run, source)
    check_merge_budget(values["merger"], probe.base, vqa_collator(source, processor), train)
    kept = None if source.max_vision_tokens is None else probe.config.tokens_kept
    discriminator = build_discriminator(probe, values["discriminator"]) if args.adversarial_weight > 0 else None
    del probe
    trainer = TokenPruningTrainer(
        model_init=fresh_model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        discriminator=discriminator,
        **collators(source, processor, kept),
    )
    best = trainer.hyperparameter_search(
        hp_space=search_space,
        compute_objective=lambda metrics: metrics["eval_accuracy_under_budget"],
        n_trials=run.trials,
        direction="maximize",
        backend="optuna",
        study_name="token_pruning",
        storage=run.storage,
        load_if_exists=run.storage is not None,
    )
    result = {"value": best.objective, "parameters": best.hyperparameters, "trials": run.trials}
    (out / "best.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def search_space(trial) -> dict[str, float]:
    """Learning rates and loss weights of a trial, all on a logarithmic scale."""
    return {
        "merger_learning_rate": trial.suggest_float("merger_learning_rate", 1e-5, 1e-2, log=True),
        "pruner_learning_rate": trial.suggest_float("pruner_learning_rate", 1e-5, 1e-2, log=True),
        "kl_weight": trial.suggest_float("kl_weight", 0.1, 30.0, log=True),
        "task_weight": trial.suggest_float("task_weight", 0.1, 30.0, log=True),
    }


if __name__ == "__main__":
    run_recipe(main)
