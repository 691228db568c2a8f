"""Trains TokCom: a VAE that turns 4 tokens into 1 latent, a flow that writes such latents, and on demand its few-step copy.

    accelerate launch recipes/train_tokcom.py                                    # embedded English text, CPU, minutes
    accelerate launch recipes/train_tokcom.py --train_file my.txt --output_dir outputs/mine
    accelerate launch recipes/train_tokcom.py --config recipes/configs/base/train_tokcom.yaml \
        --dataset_name Salesforce/wikitext --dataset_config wikitext-103-raw-v1
    accelerate launch recipes/train_tokcom.py --config recipes/configs/paper/train_tokcom.yaml
    accelerate launch recipes/train_tokcom.py --resume_from_checkpoint true      # go on after an interruption
    accelerate launch recipes/train_tokcom.py --stage distill                    # 2 steps per block, from the model of above

Leaves in the output folder: the model (`AutoModel.from_pretrained`), its tokenizer, a model card, `results.json`,
`samples.txt`, the VAE alone in `vae/`, and the distilled model in `distilled/`. `best.json` in the folder of a stage says at
which epoch its loss was best.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, LlamaConfig, set_seed

from tokcom_hf import (
    DenoisedModelConfig,
    DenoiserTrainer,
    DenoiserTrainingArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAE,
    TokComVAEConfig,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.cards import EMBEDDED_TEXT, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.latent_rows import encode_rows, latent_statistics
from tokcom_hf.data.text import Corpus, hub_dataset, load_text_rows
from tokcom_hf.data.tokenizers import check_tokenizer
from tokcom_hf.documented_names import TRAIN_TOKCOM
from tokcom_hf.evaluation.tokcom_denoising import denoising_metrics
from tokcom_hf.evaluation.tokcom_reconstruction import reconstruction_metrics
from tokcom_hf.evaluation.tokcom_report import measure_text, print_report
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.tokcom_checkpoint_writer import check_documented, save_checkpoint

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_tokcom.yaml"
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass
class RunArguments(RunFolderArguments):
    """What the run reads and where it writes."""

    output_dir: str = field(default="outputs/tokcom", metadata={"help": "Folder of the model and the reports."})
    stage: str = field(
        default="both",
        metadata={
            "help": "'vae', 'denoiser' (takes the VAE in <output_dir>/vae), 'distill' (takes the model in <output_dir>), "
            "'both' (the first two) or 'all'."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text (.txt) or JSON lines (.jsonl) to train on, in place of a data set that the file names.",
            "replaces": ("dataset_name", "dataset_config"),
        },
    )
    text_column: str = field(default="text", metadata={"help": "Field of JSON lines and Hub data sets."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set on the Hub; a configuration of WikiText, as wikitext-2-raw-v1, stands for itself.",
            "replaces": ("train_file", "dataset_config"),
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    streaming: bool = field(default=False, metadata={"help": "Read the Hub data set as a stream."})
    max_documents: int | None = field(default=None, metadata={"help": "Stop reading after so many documents."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer by name or folder; none trains one on the corpus."}
    )
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained on the corpus."})
    length: int = field(default=1024, metadata={"help": "Tokens per row; a multiple of the chunk size."})
    validation_share: float = field(default=0.05, metadata={"help": "Share of the documents held out."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out text of its own; all other text is training text then."}
    )
    offset_copies: int = field(
        default=1, metadata={"help": "Times the training text is given, each cut into chunks at other places."}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the held-out split; --seed where not set."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of data, initial weights and training."})
    threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of a single process; all cores by default (accelerate launch alone gives one)."
        },
    )
    sample_chunks: int = field(default=32, metadata={"help": "Chunks of the samples shown at the end."})
    sample_steps: int | None = field(
        default=None, metadata={"help": "Flow steps of those samples; the model's own where not set."}
    )
    prompt: str = field(default="The function returns", metadata={"help": "Prompt of the conditional sample."})
    pt_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Also write best_vae.pt and best_diffusion.pt, the documented files, into output_dir; the documented "
            "architecture alone fits into them."
        },
    )

    def __post_init__(self):
        self.dataset_name, self.dataset_config = hub_dataset(self.dataset_name, self.dataset_config)

    def corpus(self) -> Corpus:
        """The text of these arguments; --split_seed or else --seed decides which part is held out."""
        shared = {item.name: getattr(self, item.name) for item in fields(Corpus) if item.name != "seed"}
        return Corpus(**shared, seed=self.seed if self.split_seed is None else self.split_seed)


# --stage -> the stages that it trains, and those that it takes from the output folder. A stage is called as its folder.
STAGES = {
    "vae": (("vae",), ()), "denoiser": (("denoiser",), ("vae",)), "distill": (("distilled",), ("vae", "denoiser")),
    "both": (("vae", "denoiser"), ()), "all": (("vae", "denoiser", "distilled"), ()),
}  # fmt: skip
SECTIONS = {
    "run": RunArguments,
    "vae": TokComVAEConfig,
    "denoiser": DenoisedModelConfig,
    "context": LlamaConfig,
    "flow": TokComConfig,
    "vae_training": TokComVAETrainingArguments,
    "denoiser_training": DenoiserTrainingArguments,
    "distillation_training": DistillationTrainingArguments,
}
# The sections that decide the result of a stage, beside those of the stages before.
DECIDING = {
    "vae": ("run", "vae", "vae_training"), "denoiser": ("denoiser", "context", "flow", "denoiser_training"),
    "distilled": ("distillation_training",),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_TOKCOM)
    run = RunArguments(**values["run"])
    if run.stage not in STAGES:
        raise RecipeError(f"--stage must be one of {', '.join(STAGES)}, got {run.stage!r}.")
    stages, given = STAGES[run.stage]
    # The whole folder is pushed once, when it is finished: by the run, not by the trainer of a stage.
    uploads = {
        name: take_upload(values[name]) for name in ("vae_training", "denoiser_training", "distillation_training")
    }
    upload = uploads["distillation_training" if run.stage == "distill" else "denoiser_training"]
    if upload is not None and run.stage == "vae":
        raise RecipeError("--push_to_hub pushes the whole model; --stage vae trains only its first part.")
    repo_id = None if upload is None else upload.repo_id
    folder = RunFolder(run, "train_tokcom", stages, ("vae", "denoiser", "distilled"), given=given)
    out = folder.path
    state = PartialState()
    use_all_cores(run.threads)
    started = time.time()
    set_seed(run.seed)

    chunk_size = values["vae"].get("chunk_size", 4)
    data = load_text_rows(
        run.corpus(),
        folder.begun_with("vae", "tokenizer.json") or run.tokenizer or given_tokenizer(out, given),
        run.tokenizer_vocab_size,
        run.length,
        chunk_size,
        run.offset_copies,
    )
    print_once(state, f"{len(data.train):,} training rows and {len(data.validation):,} held-out rows of {run.length} "
               f"tokens; vocabulary {len(data.tokenizer):,} + omni token")  # fmt: skip
    results: dict[str, Any] = {"rows": len(data.train), "vocabulary": len(data.tokenizer)}

    # The settings of all stages are checked before the first one starts.
    vae_config, vae_arguments = vae_settings(values, run, data)
    if "vae" in given:
        vae, results["vae"] = load_part(out / "vae", data.tokenizer, "vae"), earlier_results(out / "vae")
        vae_config = vae.config
    if "denoiser" in given:
        model = load_part(out, data.tokenizer, "denoiser")
    config, denoiser_arguments = denoiser_settings(values, run, data, vae_config)
    distillation_arguments = DistillationTrainingArguments(
        **training_values(values, "distillation_training", "distilled", run)
    )
    if run.pt_checkpoints:
        check_documented(config)
    for stage in given:
        check_given(folder, run.stage, stage, stage_settings(values, stage))
    folder.start({stage: stage_settings(values, stage) for stage in stages})

    if "vae" in stages:
        vae, results["vae"] = train_vae(folder, vae_config, vae_arguments, run, data)
    if "denoiser" in stages:
        model, results["denoiser"] = train_denoiser(folder, config, denoiser_arguments, run, data, vae)
        finish(out, model, data, run, results, started, repo_id)
    if "distilled" in stages:
        model, results["distilled"] = distill(folder, model, distillation_arguments, run, data)
        finish(out / "distilled", model, data, run, results, started, repo_id if run.stage == "distill" else None)
    if upload is not None:
        print_once(state, f"pushed to {upload.push(out / 'distilled' if run.stage == 'distill' else out)}")


def given_tokenizer(out: Path, given: tuple[str, ...]) -> str | None:
    """The folder of the tokenizer with which the stages that this run takes over were trained."""
    return str(out / "vae") if given and (out / "vae" / "tokenizer.json").is_file() else None


def stage_settings(values, stage: str) -> dict[str, Any]:
    """What decides the result of a stage, that of the stages before it included."""
    order = list(DECIDING)
    names = [name for earlier in order[: order.index(stage) + 1] for name in DECIDING[earlier]]
    shown = ("stage", "prompt", "sample_chunks", "sample_steps", "pt_checkpoints")
    return settings_of({name: SECTIONS[name] for name in names}, values, ignore=shown)


def check_given(folder: RunFolder, asked: str, stage: str, settings: dict[str, Any]) -> None:
    """Raises RecipeError where options describe another model than the one that this run takes over from `stage`."""
    recorded = {} if folder.marker is None else folder.marker["stages"].get(stage, {}).get("settings", {})
    sections = tuple(name for name in DECIDING[stage] if name != "run" and not name.endswith("_training"))
    for name, before in recorded.items():
        if name.partition(".")[0] in sections and settings.get(name, before) != before:
            raise RecipeError(
                f"--stage {asked} takes over the model of stage {stage!r}, which was trained with {name} {before!r}, not "
                f"{settings[name]!r}. Leave the option out, or train stage {stage!r} anew."
            )


def earlier_results(folder: Path) -> dict[str, Any]:
    """What an earlier run measured of the VAE that this one takes over; nothing where it came from elsewhere."""
    file = folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def vae_settings(values, run: RunArguments, data) -> tuple[TokComVAEConfig, TokComVAETrainingArguments]:
    """Stage 1's configuration and training arguments."""
    vocabulary = {"vocab_size": len(data.tokenizer) + 1, "omni_token_id": len(data.tokenizer)}
    arguments = TokComVAETrainingArguments(**training_values(values, "vae_training", "vae", run))
    return TokComVAEConfig(**values["vae"] | vocabulary), arguments


def denoiser_settings(
    values, run: RunArguments, data, vae: TokComVAEConfig
) -> tuple[TokComConfig, DenoiserTrainingArguments]:
    """The whole model's configuration and stage 2's training arguments."""
    flow = {"max_chunks": run.length // vae.chunk_size, "eos_token_id": data.tokenizer.eos_token_id}
    # Hints are for the training of stage 1 alone.
    parts = {
        "vae": vae.to_dict() | {"hint_tokens": 0},
        "denoiser": values["denoiser"],
        "context": values["context"] or None,
    }
    config = TokComConfig(**flow | values["flow"] | parts)
    return config, DenoiserTrainingArguments(**training_values(values, "denoiser_training", "denoiser", run))


def train_vae(
    folder: RunFolder, config: TokComVAEConfig, arguments: TokComVAETrainingArguments, run: RunArguments, data
) -> tuple[TokComVAE, dict[str, Any]]:
    """Stage 1; returns the trained VAE and its held-out accuracies."""
    out = folder.path / "vae"
    if folder.is_finished("vae"):
        print_once(PartialState(), f"stage 1 is finished in {out}; going on with stage 2")
        return load_part(out, data.tokenizer, "vae"), json.loads((out / "results.json").read_text(encoding="utf-8"))
    vae = TokComVAE(config)
    parameters = vae.num_parameters()
    print_once(PartialState(), f"stage 1: TokComVAE with {parameters:,} parameters")
    trainer = TokComVAETrainer(
        model=vae, args=arguments, train_dataset=data.train, eval_dataset=data.validation,
        processing_class=data.tokenizer,
    )  # fmt: skip
    trainer.train(folder.checkpoint(trainer.checkpoint_files(), "vae"))
    trainer.use_averaged_weights()
    ids, mask = held_out(data, 128)
    metrics = reconstruction_metrics(vae, ids, mask, SIGMAS) if trainer.is_world_process_zero() else {}
    trainer.save_model(str(out))
    keep_best(trainer, trainer.unwrapped_model, folder.path / "best_vae.pt", run)
    if trainer.is_world_process_zero():
        untrained = reconstruction_metrics(TokComVAE(config), ids, mask, (0.0,))
        results = stage_results(trainer, parameters, metrics)
        results["untrained_token_accuracy"] = untrained["token_accuracy"]
        (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        card = {"parameters": {"TokComVAE": parameters}, "metrics": metrics, "samples": {}} | card_data(run, metrics)
        write_model_card(out, "tokcom", tags=["text-compression"], pipeline_tag="feature-extraction", name="TokComVAE",
                         config=config.to_dict(), **card)  # fmt: skip
        print(f"  held-out token accuracy {metrics['token_accuracy']:.4%}, chunk accuracy {metrics['chunk_accuracy']:.4%}, "
              f"token accuracy with noise 0.5 std {metrics['token_accuracy_sigma_0.5']:.4%}")  # fmt: skip
        metrics = results
    folder.finish("vae")
    trainer.accelerator.wait_for_everyone()
    return trainer.unwrapped_model, metrics


def train_denoiser(
    folder: RunFolder,
    config: TokComConfig,
    arguments: DenoiserTrainingArguments,
    run: RunArguments,
    data,
    vae: TokComVAE,
):
    """Stage 2; returns the whole model and its held-out denoising accuracies."""
    state, latents = PartialState(), folder.path / "denoiser"
    set_seed(run.seed)
    model = TokComModel(config)
    model.vae.load_state_dict(
        {name: value for name, value in vae.state_dict().items() if not name.startswith("hint.")}
    )
    vae = model.vae
    parameters = model.num_parameters()
    print_once(
        state, f"stage 2: TokComModel with {parameters:,} parameters, {vae.num_parameters():,} of them the VAE's"
    )
    train, validation = data.train, data.validation
    if model.context is None:
        # Blocks are whole rows, whose latents are encoded once. One process writes them, the others read its file.
        with state.main_process_first():
            train = encode_rows(vae, train, latents / "train_latents.npy", description="encoding training rows")
            validation = encode_rows(
                vae, validation, latents / "validation_latents.npy", description="encoding held-out rows"
            )
        model.fit_latents(train.mean, train.std)
    else:
        model.fit_latents(*latent_statistics(vae, train))
    trainer = DenoiserTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation, processing_class=data.tokenizer
    )
    trainer.train(folder.checkpoint(trainer.checkpoint_files(), "denoiser"))
    trainer.use_averaged_weights()
    model = trainer.unwrapped_model.eval()
    ids, mask = held_out(data, 64)
    metrics = denoising_metrics(model, ids, mask, TIMES) if trainer.is_world_process_zero() else {}
    trainer.save_model(str(folder.path))
    keep_best(trainer, model, folder.path / "best_diffusion.pt", run)
    folder.finish("denoiser")
    return model, stage_results(trainer, parameters, metrics)


def distill(
    folder: RunFolder, teacher: TokComModel, arguments: DistillationTrainingArguments, run: RunArguments, data
):
    """Stage 3; returns the model with the distilled denoiser and its held-out denoising accuracies."""
    print_once(PartialState(), f"stage 3: {arguments.student_steps} steps instead of {arguments.teacher_steps}")
    set_seed(run.seed)
    trainer = DistillationTrainer(
        args=arguments, teacher=teacher, train_dataset=data.train, eval_dataset=data.validation,
        processing_class=data.tokenizer,
    )  # fmt: skip
    trainer.train(folder.checkpoint(trainer.checkpoint_files(), "distilled"))
    trainer.use_averaged_weights()
    model = trainer.distilled()
    ids, mask = held_out(data, 64)
    metrics = denoising_metrics(model, ids, mask, TIMES) if trainer.is_world_process_zero() else {}
    if trainer.is_world_process_zero():
        model.save_pretrained(folder.path / "distilled")
        data.tokenizer.save_pretrained(folder.path / "distilled")
    folder.finish("distilled")
    trainer.accelerator.wait_for_everyone()
    return model, stage_results(trainer, model.num_parameters(), metrics)


def keep_best(trainer, model, file: Path, run: RunArguments) -> None:
    """Puts `best.json` of a stage beside its model, and the documented checkpoint where it is wanted."""
    if not trainer.is_world_process_zero():
        return
    best = trainer.best_model.record if trainer.args.load_best_model_at_end else None
    if best is not None and not isinstance(model, TokComVAE):
        (file.parent / "best.json").write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")
    if run.pt_checkpoints:
        step = trainer.state.global_step if best is None else best["step"]
        losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        epoch = trainer.state.epoch if best is None else best["epoch"]
        save_checkpoint(
            file, model, epoch=math.ceil(epoch - 1e-6), val_loss=losses.get(step), max_length=run.length,
            tokenizer_path=run.tokenizer or str(file.parent / "vae"),
        )  # fmt: skip


def stage_results(trainer, parameters: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of a stage: size, steps, time, first and last training losses, accuracies."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = {} if not logs else {"first_loss": logs[0]["loss"], "last_loss": logs[-1]["loss"]}
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    held_out_losses = {
        name: value for name, value in last.items() if name.startswith("eval_") and name.endswith("_loss")
    }
    steps = {
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.training_seconds, 1),
    }
    return steps | losses | held_out_losses | metrics


def finish(
    out: Path,
    model: TokComModel,
    data,
    run: RunArguments,
    results: dict[str, Any],
    started: float,
    repo_id: str | None,
) -> None:
    """Samples, held-out table, results.json and the model card; prints what a newcomer wants to see."""
    if not PartialState().is_main_process:
        return
    parts = [part["seconds"] for part in results.values() if isinstance(part, dict) and "seconds" in part]
    # Of a resumed run the seconds of all its parts, else those on the clock, data and reports included.
    results["seconds"] = round(max(time.time() - started, sum(parts)), 1)
    generator = torch.Generator().manual_seed(run.seed)
    settings = {"num_steps": run.sample_steps, "generator": generator}
    generated = model.generate(num_chunks=run.sample_chunks, **settings)[0]
    prompt = data.tokenizer(run.prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    continued = model.generate(prompt, num_generate_chunks=run.sample_chunks, **settings)[0]
    results["samples"] = {
        "generated": data.tokenizer.decode(generated, skip_special_tokens=True),
        "conditional": data.tokenizer.decode(continued, skip_special_tokens=True),
    }
    # Files first: whatever happens to the terminal, they are there.
    (out / "samples.txt").write_text("\n\n---\n\n".join(results["samples"].values()) + "\n", encoding="utf-8")
    results["text"] = measure_text(model, data.train, data.validation, seed=run.seed, num_steps=run.sample_steps)
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    # What this model measures, not its teacher.
    measured = results["vae"] | results["distilled" if "distilled" in results else "denoiser"]
    metrics = {k: v for k, v in measured.items() if "accuracy" in k or k.startswith("eval_")}
    parameters = {"TokCom": model.num_parameters(), "of them VAE": model.vae.num_parameters()}
    card = {"parameters": parameters, "metrics": metrics, "samples": results["samples"]} | card_data(run, metrics)
    write_model_card(out, "tokcom", tags=["text-generation", "flow-matching"], pipeline_tag="text-generation",
                     name="TokCom", repo_id=repo_id, config=model.config.to_dict(), **card)  # fmt: skip
    print_report(results, run.prompt)
    print(f"{plot(out, results)}\n\nmodel, tokenizer, card and results in {out} after {results['seconds']:.0f} s; load it "
          f"with\n  AutoModel.from_pretrained({str(out)!r})")  # fmt: skip


def plot(out: Path, results: dict[str, Any]) -> str:
    """Two figures: accuracy against latent noise, and against t; returns what to say about them."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed (pip install 'tokcom_hf[plots]')"
    from tokcom_hf.plots.text import plot_accuracy_against_noise, plot_denoising_against_time

    drawn = []
    if "token_accuracy" in results.get("vae", {}):
        drawn.append(out / "accuracy_against_noise.png")
        plot_accuracy_against_noise(results["vae"], drawn[-1])
    if "denoised_accuracy_t_0.5" in results.get("denoiser", {}):
        drawn.append(out / "denoising_against_time.png")
        plot_denoising_against_time(results["denoiser"], drawn[-1])
    return "figures: " + (", ".join(map(str, drawn)) or "none")


def load_part(folder: Path, tokenizer, stage: str) -> Any:
    """The VAE ("vae") or whole model ("denoiser") that an earlier stage left, checked against the tokenizer."""
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"This stage goes on from what --stage {stage} trains, and there is no model in {str(folder)!r}; run that one "
            "first, or name its folder with --output_dir."
        )
    model = AutoModel.from_pretrained(folder)
    check_tokenizer(tokenizer, getattr(model, "vae", model).config)
    return model


def training_values(values, section: str, stage: str, run: RunArguments) -> dict[str, Any]:
    """A section of TrainingArguments, with what the run decides for both stages."""
    own = {k: v for k, v in values[section].items() if k != "resume_from_checkpoint"}
    return own | {"output_dir": str(Path(run.output_dir) / stage), "seed": run.seed}


def held_out(data, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = [data.validation[i] for i in range(min(rows, len(data.validation)))]
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in batch])
    return ids, torch.stack([torch.as_tensor(row["attention_mask"]) for row in batch])


def card_data(run: RunArguments, metrics: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the run's data."""
    own = run.dataset_name or run.train_file
    return {
        "dataset": card_dataset(EMBEDDED_TEXT, run.dataset_name, run.dataset_config, run.train_file),
        "language": None if own else "en",
        "measured": metrics,
        "data": run.dataset_name or (Path(run.train_file).name if run.train_file else "the embedded English text"),
    }


def print_once(state: PartialState, text: str) -> None:
    if state.is_main_process:
        print(text, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_recipe(main)
