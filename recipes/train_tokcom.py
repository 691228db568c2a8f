"""Trains TokCom: a VAE that turns 4 tokens into 1 latent, a flow that generates latents, and optionally its few-step copy.

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

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import LlamaConfig, set_seed

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
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.text import TextRows
from tokcom_hf.data.text_evaluation import TextSource, load_source
from tokcom_hf.documented_names import TRAIN_TOKCOM
from tokcom_hf.evaluation.tokcom_stage_report import measure_stage, report_model, report_vae, training_summary
from tokcom_hf.hub import Upload, take_upload
from tokcom_hf.run_arguments import require_positive
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores
from tokcom_hf.tokcom_checkpoint_writer import check_documented
from tokcom_hf.trainers.tokcom_stages import (
    STAGES,
    check_given,
    fit_latents,
    keep_best,
    load_stage,
    read_results,
    stage_settings,
)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_tokcom.yaml"


@dataclass
class RunArguments(TextSource, RunFolderArguments):
    """What the run reads and where it writes."""

    output_dir: str = field(default="outputs/tokcom", metadata={"help": "Folder of the model and the reports."})
    stage: str = field(
        default="both",
        metadata={
            "help": "'vae', 'denoiser' (takes the VAE in <output_dir>/vae), 'distill' (takes the model in <output_dir>), "
            "'both' (the first two) or 'all'."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer by name or folder; none trains one on the corpus."}
    )
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained on the corpus."})
    length: int = field(default=1024, metadata={"help": "Tokens per row; a multiple of the chunk size."})
    offset_copies: int = field(
        default=1, metadata={"help": "Copies of the training text, each cut into chunks at a different offset."}
    )
    split_seed: int | None = field(default=None, metadata={"help": "Seed of the held-out split; --seed if not set."})
    seed: int = field(default=42, metadata={"help": "Seed of data, initial weights and training."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads of a single process; all by default."})
    sample_chunks: int = field(default=32, metadata={"help": "Chunks of the samples shown at the end."})
    sample_steps: int | None = field(
        default=None, metadata={"help": "Flow steps of the samples; the model's own where not set."}
    )
    prompt: str = field(default="The function returns", metadata={"help": "Prompt of the conditional sample."})
    pt_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Also write best_vae.pt and best_diffusion.pt, which hold the documented architecture only."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.split_seed is None:
            self.split_seed = self.seed
        require_positive(self, "sample_chunks", "sample_steps")


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
TRAINING = {"vae": "vae_training", "denoiser": "denoiser_training", "distilled": "distillation_training"}
# Value of --stage -> the stage whose folder is pushed to the Hub.
PUSHED = {"denoiser": "denoiser", "distill": "distilled", "both": "denoiser", "all": "denoiser"}


@dataclass
class Job:
    """One run: its checked settings, its data, and what its stages have left so far.

    training: stage -> training arguments.
    vae_config, config: configuration of stage 1's VAE and of the whole model.
    models, results, repo_ids: stage -> trained model, its part of results.json, its Hub repository.
    """

    run: RunArguments
    folder: RunFolder
    training: dict[str, Any]
    data: TextRows
    vae_config: TokComVAEConfig
    config: TokComConfig
    models: dict[str, Any]
    results: dict[str, Any]
    repo_ids: dict[str, str]
    started: float

    def place(self, stage: str) -> Path:
        """The folder of a stage's model."""
        return self.folder.path if stage == "denoiser" else self.folder.path / stage


def read_arguments(argv: list[str] | None) -> tuple[dict[str, Any], RunArguments, dict[str, Any], Upload | None]:
    """Values of all sections, run arguments, each stage's training arguments, and where the result is pushed."""
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG, argv, TRAIN_TOKCOM)
    run = RunArguments(**values["run"])
    if run.stage not in STAGES:
        raise RecipeError(f"--stage must be one of {', '.join(STAGES)}, got {run.stage!r}.")
    # The run pushes the finished folder once; the trainers of the stages push nothing.
    uploads = {stage: take_upload(values[section]) for stage, section in TRAINING.items()}
    upload = uploads[PUSHED.get(run.stage, "denoiser")]
    if upload is not None and run.stage == "vae":
        raise RecipeError("--push_to_hub pushes the whole model; --stage vae trains only its first part.")
    return values, run, training_arguments(values, run), upload


def training_arguments(values, run: RunArguments) -> dict[str, Any]:
    """Each stage's training arguments, with the output folder and the seed of the run."""
    arguments = {}
    for stage, section in TRAINING.items():
        own = {name: value for name, value in values[section].items() if name != "resume_from_checkpoint"}
        decided = {"output_dir": str(Path(run.output_dir) / stage), "seed": run.seed}
        arguments[stage] = SECTIONS[section](**own | decided)
    return arguments


def build_data(run: RunArguments, folder: RunFolder, chunk_size: int) -> TextRows:
    """Training and held-out rows, with the tokenizer of earlier stages if the run resumes or reuses any."""
    vae = folder.path / "vae"
    given = str(vae) if folder.given and (vae / "tokenizer.json").is_file() else None
    tokenizer = folder.begun_with("vae", "tokenizer.json") or run.tokenizer or given
    data = load_source(run, run.length, tokenizer, run.tokenizer_vocab_size, chunk_size, run.offset_copies)
    say(f"{len(data.train):,} training rows and {len(data.validation):,} held-out rows of {run.length} tokens; "
        f"vocabulary {len(data.tokenizer):,} + omni token")  # fmt: skip
    return data


def build_configs(values, run: RunArguments, folder: RunFolder, data: TextRows):
    """Configurations of the VAE and of the whole model, the reused models of earlier stages, and the results so far.

    Settings that any stage would refuse are refused here, before the first stage trains.
    """
    models, results = {}, {"rows": len(data.train), "vocabulary": len(data.tokenizer)}
    if "vae" in folder.given:
        place = folder.path / "vae"
        models["vae"], results["vae"] = load_stage(place, data.tokenizer, "vae"), read_results(place)
        vae = models["vae"].config
    else:
        vocabulary = {"vocab_size": len(data.tokenizer) + 1, "omni_token_id": len(data.tokenizer)}
        vae = TokComVAEConfig(**values["vae"] | vocabulary)
    if "denoiser" in folder.given:
        models["denoiser"] = load_stage(folder.path, data.tokenizer, "denoiser")
    flow = {"max_chunks": run.length // vae.chunk_size, "eos_token_id": data.tokenizer.eos_token_id}
    # Hint tokens are used only while stage 1 trains.
    parts = {"vae": vae.to_dict() | {"hint_tokens": 0}, "denoiser": values["denoiser"]}
    config = TokComConfig(**flow | values["flow"] | parts | {"context": values["context"] or None})
    if run.pt_checkpoints:
        check_documented(config)
    for stage in folder.given:
        check_given(folder, run.stage, stage, stage_settings(stage, SECTIONS, values))
    return vae, config, models, results


def build_model(job: Job, stage: str) -> Any:
    """The model that a stage starts from; for stage 3 the teacher."""
    if stage == "distilled":
        return job.models["denoiser"]
    if stage == "vae":
        model = TokComVAE(job.vae_config)
        say(f"stage 1: TokComVAE with {model.num_parameters():,} parameters")
        return model
    model, vae = TokComModel(job.config), job.models["vae"].state_dict()
    model.vae.load_state_dict({name: value for name, value in vae.items() if not name.startswith("hint.")})
    sizes = f"{model.num_parameters():,} parameters, {model.vae.num_parameters():,} of them the VAE's"
    say(f"stage 2: TokComModel with {sizes}")
    return model


def build_trainer(job: Job, stage: str, model: Any) -> Any:
    """A stage's trainer; for stage 2 the mean and standard deviation of the VAE's latents are set in the model."""
    arguments, train, held_out = job.training[stage], job.data.train, job.data.validation
    if stage == "denoiser":
        train, held_out = fit_latents(model, train, held_out, job.folder.path / stage)
    given = {
        "args": arguments,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": job.data.tokenizer,
    }
    if stage == "distilled":
        say(f"stage 3: {arguments.student_steps} steps instead of {arguments.teacher_steps}")
        return DistillationTrainer(teacher=model, **given)
    return (TokComVAETrainer if stage == "vae" else DenoiserTrainer)(model=model, **given)


def train(job: Job, stage: str) -> None:
    """Trains a stage, or loads it if the resumed run has finished it already."""
    if stage == "vae" and job.folder.is_finished("vae"):
        place = job.place("vae")
        say(f"stage 1 is finished in {place}; going on with stage 2")
        job.models["vae"], job.results["vae"] = load_stage(place, job.data.tokenizer, "vae"), read_results(place)
        return
    set_seed(job.run.seed)
    trainer = build_trainer(job, stage, build_model(job, stage))
    job.folder.train(trainer, stage)
    trainer.use_averaged_weights()
    job.models[stage] = trainer.distilled() if stage == "distilled" else trainer.unwrapped_model.eval()
    report(job, stage, trainer)
    job.folder.finish(stage)
    trainer.accelerator.wait_for_everyone()


def report(job: Job, stage: str, trainer: Any) -> None:
    """Saves a stage's model, card and results.json, for a whole model also samples and figures; prints a summary."""
    run, data, model, place = job.run, job.data, job.models[stage], job.place(stage)
    first = trainer.is_world_process_zero()
    metrics = measure_stage(stage, model, data.validation) if first else {}
    job.results[stage] = training_summary(trainer, model.num_parameters()) | metrics
    if stage == "distilled":
        # `trainer.save_model` would save the student only, which is one part of this model.
        if first:
            with job.folder.whole("distilled") as unfinished:
                model.save_pretrained(unfinished)
                data.tokenizer.save_pretrained(unfinished)
    else:
        trainer.save_model(str(place))
        keep_best(trainer, model, job.folder.path / ("best_vae.pt" if stage == "vae" else "best_diffusion.pt"), run)
    if first and stage == "vae":
        report_vae(place, model, data.validation, run, job.results["vae"], metrics)
    elif first:
        report_model(place, model, data, run, job.results, job.started, job.repo_ids.get(stage))


def main(argv: list[str] | None = None) -> None:
    """Trains the stages of --stage one after another, each from the result of the one before."""
    values, run, training, upload = read_arguments(argv)
    stages, given = STAGES[run.stage]
    folder = RunFolder(run, "train_tokcom", stages, tuple(TRAINING), given=given)
    use_all_cores(run.threads)
    started = time.time()
    set_seed(run.seed)
    data = build_data(run, folder, values["vae"].get("chunk_size", TokComVAEConfig.chunk_size))
    vae, config, models, results = build_configs(values, run, folder, data)
    folder.start({stage: stage_settings(stage, SECTIONS, values) for stage in stages})
    repo_ids = {} if upload is None else {PUSHED[run.stage]: upload.repo_id}
    job = Job(run, folder, training, data, vae, config, models, results, repo_ids, started)
    for stage in stages:
        train(job, stage)
    if upload is not None and PartialState().is_main_process:
        print("pushed to", upload.push(job.place(PUSHED[run.stage])))


def say(text: str) -> None:
    """Prints a line, on the main process only."""
    PartialState().print(text, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_recipe(main)
