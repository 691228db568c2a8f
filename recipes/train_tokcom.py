"""Trains TokCom: a VAE that turns 4 tokens into 1 latent, then a denoiser that generates such latents.

    accelerate launch recipes/train_tokcom.py                                    # embedded English text, CPU, minutes
    accelerate launch recipes/train_tokcom.py --train_file my.txt --output_dir outputs/mine
    accelerate launch recipes/train_tokcom.py --config recipes/configs/base/train_tokcom.yaml \
        --dataset_name Salesforce/wikitext --dataset_config wikitext-103-raw-v1
    accelerate launch recipes/train_tokcom.py --config recipes/configs/paper/train_tokcom.yaml
    accelerate launch recipes/train_tokcom.py --resume_from_checkpoint true      # go on after an interruption

Leaves in the output folder: the model (`AutoModel.from_pretrained`), its tokenizer, a model card, `results.json`,
`samples.txt`, and the VAE alone in `vae/`.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, set_seed

from tokcom_hf import (
    DenoisedModelConfig,
    DenoiserTrainer,
    DenoiserTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAE,
    TokComVAEConfig,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.cards import EMBEDDED_TEXT, card_dataset, write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.latent_rows import encode_rows
from tokcom_hf.data.text import load_text_rows
from tokcom_hf.data.tokenizers import check_tokenizer
from tokcom_hf.fingerprints import settings_of
from tokcom_hf.hub import take_upload
from tokcom_hf.metrics.denoising import denoising_metrics
from tokcom_hf.metrics.reconstruction import reconstruction_metrics
from tokcom_hf.run_folders import RunFolder, RunFolderArguments
from tokcom_hf.threads import use_all_cores

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny" / "train_tokcom.yaml"
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass
class RunArguments(RunFolderArguments):
    """What the run reads and where it writes."""

    output_dir: str = field(default="outputs/tokcom", metadata={"help": "Folder of the model and the reports."})
    stage: str = field(default="both", metadata={"help": "'vae', 'denoiser' (needs <output_dir>/vae) or 'both'."})
    train_file: str | None = field(default=None, metadata={"help": "Text (.txt) or JSON lines (.jsonl) to train on."})
    text_column: str = field(default="text", metadata={"help": "Field of JSON lines and Hub data sets."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
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
    sample_steps: int = field(default=32, metadata={"help": "Flow steps of those samples."})
    prompt: str = field(default="The function returns", metadata={"help": "Prompt of the conditional sample."})


STAGES = ("vae", "denoiser")
SECTIONS = {
    "run": RunArguments,
    "vae": TokComVAEConfig,
    "denoiser": DenoisedModelConfig,
    "flow": TokComConfig,
    "vae_training": TokComVAETrainingArguments,
    "denoiser_training": DenoiserTrainingArguments,
}


def main() -> None:
    values = parse_recipe(__doc__, SECTIONS, DEFAULT_CONFIG)
    run = RunArguments(**values["run"])
    if run.stage not in ("vae", "denoiser", "both"):
        raise RecipeError(f"--stage must be vae, denoiser or both, got {run.stage!r}.")
    # The whole folder is pushed once, when it is finished: by the run, not by the trainer of a stage.
    take_upload(values["vae_training"])
    upload = take_upload(values["denoiser_training"])
    if upload is not None and run.stage == "vae":
        raise RecipeError("--push_to_hub pushes the whole model; --stage vae trains only its first part.")
    stages = STAGES if run.stage == "both" else (run.stage,)
    folder = RunFolder(run, "train_tokcom", stages, STAGES, given=("vae",) if run.stage == "denoiser" else ())
    out = folder.path
    state = PartialState()
    use_all_cores(run.threads)
    started = time.time()
    set_seed(run.seed)

    chunk_size = values["vae"].get("chunk_size", 4)
    data = load_text_rows(
        train_file=run.train_file,
        dataset_name=run.dataset_name,
        dataset_config=run.dataset_config,
        text_column=run.text_column,
        streaming=run.streaming,
        max_documents=run.max_documents,
        tokenizer=folder.begun_with("vae", "tokenizer.json") or run.tokenizer,
        vocab_size=run.tokenizer_vocab_size,
        length=run.length,
        chunk_size=chunk_size,
        validation_share=run.validation_share,
        validation_file=run.validation_file,
        offset_copies=run.offset_copies,
        seed=run.seed if run.split_seed is None else run.split_seed,
    )
    print_once(state, f"{len(data.train):,} training rows and {len(data.validation):,} held-out rows of {run.length} "
               f"tokens; vocabulary {len(data.tokenizer):,} + omni token")  # fmt: skip
    results: dict[str, Any] = {"rows": len(data.train), "vocabulary": len(data.tokenizer)}

    if run.stage == "denoiser":
        vae, results["vae"] = load_vae(out / "vae", data.tokenizer), {}
    # Both stages' settings are checked before the first one starts.
    config, arguments = vae_settings(values, run, data)
    shape = config if run.stage != "denoiser" else vae.config
    flow, denoiser_arguments = denoiser_settings(values, run, data, shape)
    folder.start({stage: stage_settings(values, stage) for stage in stages})

    if run.stage != "denoiser":
        vae, results["vae"] = train_vae(folder, config, arguments, run, data)
    if run.stage == "vae":
        return
    model, results["denoiser"] = train_denoiser(folder, flow, denoiser_arguments, run, data, vae)
    if state.is_main_process and model.config.train_embeddings:
        # The tables have moved since stage 1: what is reported is what is saved.
        results["vae"] |= reconstruction_metrics(model.vae, *held_out(data, 128), SIGMAS)
    if state.is_main_process:
        parts = [part["seconds"] for part in (results["vae"], results["denoiser"]) if "seconds" in part]
        # Of a resumed run the seconds of all its parts, else those on the clock, data and reports included.
        results["seconds"] = round(max(time.time() - started, sum(parts)), 1)
        report(out, model, data, run, results, None if upload is None else upload.repo_id)
        if upload is not None:
            print("pushed to", upload.push(out))


def stage_settings(values, stage: str) -> dict[str, Any]:
    """What decides the result of a stage, that of the stage before it included."""
    names = ["run", "vae", "vae_training"] + (["denoiser", "flow", "denoiser_training"] if stage == "denoiser" else [])
    shown = ("stage", "prompt", "sample_chunks", "sample_steps")
    return settings_of({name: SECTIONS[name] for name in names}, values, ignore=shown)


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
    denoiser = {"latent_size": vae.latent_size, **values["denoiser"]}
    config = TokComConfig(**flow | values["flow"] | {"vae": vae.to_dict(), "denoiser": denoiser})
    return config, DenoiserTrainingArguments(**training_values(values, "denoiser_training", "denoiser", run))


def train_vae(
    folder: RunFolder, config: TokComVAEConfig, arguments: TokComVAETrainingArguments, run: RunArguments, data
) -> tuple[TokComVAE, dict[str, Any]]:
    """Stage 1; returns the trained VAE and its held-out accuracies."""
    out = folder.path / "vae"
    if folder.is_finished("vae"):
        print_once(PartialState(), f"stage 1 is finished in {out}; going on with stage 2")
        return load_vae(out, data.tokenizer), json.loads((out / "results.json").read_text(encoding="utf-8"))
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
    if trainer.is_world_process_zero():
        results = {"parameters": parameters, "steps": trainer.state.global_step}
        results |= {"seconds": round(trainer.training_seconds, 1), **metrics}
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
    model.vae.load_state_dict(vae.state_dict())
    vae = model.vae
    parameters = model.denoiser.num_parameters()
    print_once(state, f"stage 2: DenoisedModel with {parameters:,} parameters")
    # One process writes the latents, the others read its file.
    with state.main_process_first():
        train = encode_rows(vae, data.train, latents / "train_latents.npy", description="encoding training rows")
        validation = encode_rows(
            vae, data.validation, latents / "validation_latents.npy", description="encoding held-out rows"
        )
    model.fit_latents(train.mean, train.std)
    trainer = DenoiserTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation, processing_class=data.tokenizer
    )
    trainer.train(folder.checkpoint(trainer.checkpoint_files(), "denoiser"))
    trainer.use_averaged_weights()
    model = trainer.unwrapped_model.eval()
    ids, mask = held_out(data, 64)
    metrics = denoising_metrics(model, ids, mask, TIMES) if trainer.is_world_process_zero() else {}
    trainer.save_model(str(folder.path))
    folder.finish("denoiser")
    steps = {"parameters": parameters, "steps": trainer.state.global_step}
    return model, steps | {"seconds": round(trainer.training_seconds, 1), **metrics}


def report(
    out: Path, model: TokComModel, data, run: RunArguments, results: dict[str, Any], repo_id: str | None
) -> None:
    """Samples, results.json and the model card; prints what a newcomer wants to see."""
    device = model.device
    generator = torch.Generator().manual_seed(run.seed)
    settings = {"num_steps": run.sample_steps, "generator": generator}
    generated = model.generate(num_chunks=run.sample_chunks, **settings)[0]
    prompt = data.tokenizer(run.prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    continued = model.generate(prompt, num_generate_chunks=run.sample_chunks, **settings)[0]
    text = data.tokenizer.decode(generated, skip_special_tokens=True)
    continuation = data.tokenizer.decode(continued, skip_special_tokens=True)
    vae, denoiser = results["vae"], results["denoiser"]
    # Files first: whatever happens to the terminal, they are there.
    (out / "samples.txt").write_text(f"{text}\n\n---\n\n{continuation}\n", encoding="utf-8")
    results["samples"] = {"generated": text, "conditional": continuation}
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    parameters = {"VAE": vae.get("parameters"), "denoiser": denoiser["parameters"]}
    metrics = {k: v for part in (vae, denoiser) for k, v in part.items() if isinstance(v, float)}
    card = {"parameters": parameters, "metrics": metrics, "samples": results["samples"]} | card_data(run, metrics)
    write_model_card(out, "tokcom", tags=["text-generation", "flow-matching"], pipeline_tag="text-generation",
                     name="TokCom", repo_id=repo_id, config=model.config.to_dict(), **card)  # fmt: skip
    figures = plot(out, vae, denoiser)
    print("\nheld-out accuracy of the VAE against noise (sigma in latent standard deviations)")
    for sigma in SIGMAS:
        name = "token_accuracy" + (f"_sigma_{sigma:g}" if sigma else "")
        if name in vae:
            print(f"  sigma {sigma:<4g} token {vae[name]:.4%}   chunk {vae[name.replace('token', 'chunk')]:.4%}")
    print("\nheld-out token accuracy of one denoising step against t (0 noise, 1 clean)")
    for t in TIMES:
        print(f"  t {t:g}   denoised {denoiser[f'denoised_accuracy_t_{t:g}']:.2%}   "
              f"noisy latent decoded directly {denoiser[f'direct_accuracy_t_{t:g}']:.2%}")  # fmt: skip
    if "next_token_loss" in denoiser:
        loss = denoiser["next_token_loss"]
        print(f"\nheld-out loss of the next token: {loss:.3f} nats, a perplexity of {math.exp(loss):.1f}")
    print(f"\ngenerated from nothing:\n  {text!r}\n\ncontinuing {run.prompt!r}:\n  {continuation!r}")
    print(f"\n{figures}\n\nmodel, tokenizer, card and results in {out} after {results['seconds']:.0f} s; load it with\n"
          f"  AutoModel.from_pretrained({str(out)!r})")  # fmt: skip


def plot(out: Path, vae: dict[str, Any], denoiser: dict[str, Any]) -> str:
    """Two figures: accuracy against latent noise, and against t; returns what to say about them."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed (pip install 'tokcom_hf[plots]')"
    from tokcom_hf.plots_text import plot_accuracy_against_noise, plot_denoising_against_time

    if "token_accuracy" in vae:
        plot_accuracy_against_noise(vae, out / "accuracy_against_noise.png")
    plot_denoising_against_time(denoiser, out / "denoising_against_time.png")
    return f"figures: {out / 'accuracy_against_noise.png'}, {out / 'denoising_against_time.png'}"


def load_vae(folder: Path, tokenizer) -> TokComVAE:
    """Stage 1's result, checked against the tokenizer."""
    if not (folder / "config.json").is_file():
        raise RecipeError(f"No trained VAE in {str(folder)!r}; run --stage vae first.")
    vae = AutoModel.from_pretrained(folder)
    check_tokenizer(tokenizer, vae.config)
    return vae


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
