"""Uses a trained TokCom model: generate, continue, reconstruct, denoise, or store text as latents and read it back.

    python recipes/infer_tokcom.py --model outputs/tokcom --mode generate --num_chunks 32 --batch_size 2 --seed 1
    python recipes/infer_tokcom.py --model outputs/tokcom --mode conditional --prompt "The function returns"
    python recipes/infer_tokcom.py --model outputs/tokcom --mode reconstruct --input_file README.md
    python recipes/infer_tokcom.py --model outputs/tokcom --mode denoise_reconstruct --text "Any text." --noise_level 0.5
    python recipes/infer_tokcom.py --model outputs/tokcom --mode encode --text "Any text." --output_file a.safetensors
    python recipes/infer_tokcom.py --model outputs/tokcom --mode decode --latents a.safetensors
    python recipes/infer_tokcom.py --checkpoint checkpoints/best_diffusion.pt --mode generate --num_steps 50

A model is a folder, a Hub name, or a documented checkpoint (.pt), which is converted in memory. Text comes from --text (or
--prompt) or from --input_file: a .jsonl, .ndjson or .json file gives one text per line, any other file is one text. Results
go to the terminal, and to --output_file where that is given (.jsonl: one per line). Latents are written as safetensors, or
as a torch file where --output_file ends with .pt.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from tokcom_hf import TokComModel, TokComVAE
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.latents import load_latents, save_latents
from tokcom_hf.data.text import read_json_lines
from tokcom_hf.data.text_files import is_json_lines, read_text
from tokcom_hf.data.tokenizers import check_tokenizer, load_tokenizer
from tokcom_hf.documented_names import INFER_TOKCOM
from tokcom_hf.evaluation.tokcom_windows import batches, windows
from tokcom_hf.model_folders import load_pretrained
from tokcom_hf.tokcom_checkpoint import is_checkpoint_file, load_checkpoint_file

MODES = ("generate", "reconstruct", "denoise_reconstruct", "encode", "decode", "conditional")
GENERATING = ("generate", "conditional")
READING = ("reconstruct", "denoise_reconstruct", "encode")
# Option -> the modes that use it; any other mode refuses it.
ONLY_IN = {
    **dict.fromkeys(("temperature", "block_size", "best_of", "guidance_scale"), GENERATING),
    **dict.fromkeys(("num_steps", "sampler", "seed"), (*GENERATING, "denoise_reconstruct")),
    "num_chunks": ("generate",), "num_generate_chunks": ("conditional",), "noise_level": ("denoise_reconstruct",),
    "text": READING, "prompt": ("conditional",), "input_file": (*READING, "conditional"), "latents": ("decode",),
}  # fmt: skip


@dataclass
class InferenceArguments:
    """What to do, with which model."""

    model: str = field(default="outputs/tokcom", metadata={"help": "Trained model: folder, Hub name or .pt file."})
    mode: str = field(default="generate", metadata={"help": "One of " + ", ".join(MODES) + "."})
    text: str | None = field(default=None, metadata={"help": "Text to reconstruct, denoise or encode."})
    prompt: str | None = field(default=None, metadata={"help": "Beginning to continue (mode conditional)."})
    input_file: str | None = field(default=None, metadata={"help": "File with texts or prompts."})
    text_column: str = field(default="text", metadata={"help": "Field of a .jsonl input file."})
    latents: str | None = field(default=None, metadata={"help": "File to decode, written by mode encode."})
    num_chunks: int = field(default=256, metadata={"help": "Chunks to generate without a prompt."})
    num_generate_chunks: int = field(default=64, metadata={"help": "Chunks to add to a prompt."})
    num_steps: int | None = field(default=None, metadata={"help": "Steps of the flow; none takes the model's own."})
    noise_level: float = field(default=0.5, metadata={"help": "Start of denoise_reconstruct: 0 pure noise, 1 clean."})
    batch_size: int = field(
        default=1, metadata={"help": "Mode generate: number of texts; other modes: rows per pass."}
    )
    temperature: float | None = field(
        default=None,
        metadata={"help": "Factor of all noise: 1 as trained, 0 gives one text; none takes the model's own."},
    )
    sampler: str | None = field(
        default=None, metadata={"help": "euler, heun, multistep, multirate or renoise; none: the model's own."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Chunks denoised together: 1 from left to right, 0 all; none takes the model's own."},
    )
    best_of: int | None = field(
        default=None,
        metadata={"help": "Draws per block; the one whose text encodes nearest to its latents is kept."},
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Above 1 each block follows the text before it more closely."}
    )
    seed: int | None = field(default=None, metadata={"help": "Makes the output reproducible."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto prefers an accelerator."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer by name or folder; none takes the model's."}
    )
    output_file: str | None = field(default=None, metadata={"help": "File for the result; latents in mode encode."})


def main(argv: list[str] | None = None) -> None:
    """Reads the arguments and texts, loads the model and runs the mode."""
    sections = {"run": InferenceArguments}
    given = parse_recipe(__doc__, sections, argv=argv, aliases=INFER_TOKCOM)["run"]
    run = InferenceArguments(**given)
    check_arguments(run, given)
    texts = [] if run.mode in ("generate", "decode") else read_texts(run)
    model, tokenizer = load(run)
    check_tokenizer(tokenizer, getattr(model, "vae", model).config)
    if run.mode == "generate":
        results = generate(model, tokenizer, run)
    elif run.mode == "conditional":
        results = continue_texts(model, tokenizer, texts, run)
    elif run.mode == "encode":
        results = encode(model, tokenizer, texts, run)
    elif run.mode == "decode":
        results = decode(model, tokenizer, run)
    else:
        results = reconstruct(model, tokenizer, texts, run)
    show(results, run)


def check_arguments(run: InferenceArguments, given: dict[str, Any]) -> None:
    """Refuses bad values, and given options that the mode does not use, before anything is loaded or written."""
    if run.mode not in MODES:
        raise RecipeError(f"--mode must be one of {', '.join(MODES)}, got {run.mode!r}.")
    for name in ("num_chunks", "num_generate_chunks", "num_steps", "batch_size", "best_of"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name} must be at least 1, got {value}.")
    if not 0 <= run.noise_level <= 1:
        raise RecipeError(f"--noise_level must be in [0, 1], got {run.noise_level:g}.")
    if run.temperature is not None and run.temperature < 0:
        raise RecipeError(f"--temperature must not be negative, got {run.temperature:g}.")
    for name, modes in ONLY_IN.items():
        if given.get(name) is not None and run.mode not in modes:
            raise RecipeError(f"--{name} has no meaning in mode {run.mode}; it belongs to {', '.join(modes)}.")
    if run.mode == "encode" and run.output_file is None:
        raise RecipeError("--mode encode needs --output_file, for example --output_file latents.safetensors.")
    if run.mode == "decode" and run.latents is None:
        raise RecipeError("--mode decode needs --latents, a file written by --mode encode.")


def read_texts(run: InferenceArguments) -> list[str]:
    """The texts of --text, --prompt or --input_file; exactly one of them must be given."""
    flag = "prompt" if run.mode == "conditional" else "text"
    direct = getattr(run, flag)
    if (direct is None) == (run.input_file is None):
        raise RecipeError(f"--mode {run.mode} needs either --{flag} or --input_file.")
    if direct is not None:
        texts = [direct]
    else:
        path = Path(run.input_file)
        texts = list(read_json_lines(path, run.text_column)) if is_json_lines(path) else [read_text(path)]
    if not texts or not all(texts):
        raise RecipeError(f"--mode {run.mode} needs text, but {run.input_file or '--' + flag} holds an empty one.")
    return texts


def load(run: InferenceArguments) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer; a `TokComVAE` alone is enough to reconstruct, encode and decode."""
    if is_checkpoint_file(run.model):
        model, tokenizer = load_checkpoint_file(run.model, run.tokenizer)
    else:
        model = load_pretrained(AutoModel, run.model)
        tokenizer = None
    allowed: tuple[type, ...] = (TokComModel,)
    if run.mode in ("reconstruct", "encode", "decode"):
        allowed = (TokComModel, TokComVAE)
    if not isinstance(model, allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise RecipeError(f"--mode {run.mode} needs a {names}, but {run.model!r} holds a {type(model).__name__}.")
    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {run.device} cannot be used: {str(error).splitlines()[0]}") from None
    return model, tokenizer or load_tokenizer(run.tokenizer or run.model)


def sampling_options(run: InferenceArguments, names: tuple[str, ...] = ("num_steps", "sampler")) -> dict[str, Any]:
    """The given sampling options of `names`, and a generator of the noise."""
    generator = torch.Generator()
    if run.seed is None:
        generator.seed()
    else:
        generator.manual_seed(run.seed)
    given = {name: getattr(run, name) for name in names}
    return {name: value for name, value in given.items() if value is not None} | {"generator": generator}


def generation_options(run: InferenceArguments) -> dict[str, Any]:
    """Keyword arguments of `TokComModel.generate`."""
    return sampling_options(run, ("num_steps", "sampler", "temperature", "block_size", "best_of", "guidance_scale"))


def to_text(tokenizer: Any, ids: Any) -> str:
    """Ids as text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def generate(model: TokComModel, tokenizer: Any, run: InferenceArguments) -> list[dict[str, Any]]:
    """`batch_size` texts from nothing."""
    ids = model.generate(num_chunks=run.num_chunks, batch_size=run.batch_size, **generation_options(run))
    return [{"text": to_text(tokenizer, row)} for row in ids]


def continue_texts(
    model: TokComModel, tokenizer: Any, prompts: list[str], run: InferenceArguments
) -> list[dict[str, Any]]:
    """Each prompt with its continuation, `batch_size` prompts at a time."""
    options, results = generation_options(run), []
    for start in tqdm(range(0, len(prompts), run.batch_size), desc="continuing", unit="batch", delay=2):
        rows = tokenizer(prompts[start : start + run.batch_size], add_special_tokens=False).input_ids
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids = model.generate(ids, attention_mask=mask, num_generate_chunks=run.num_generate_chunks, **options)
        results += [
            {"text": to_text(tokenizer, new[width - len(row) :]), "prompt_tokens": len(row)}
            for new, row in zip(ids, rows)
        ]
    return results


@torch.no_grad()
def reconstruct(model: Any, tokenizer: Any, texts: list[str], run: InferenceArguments) -> list[dict[str, Any]]:
    """Each text through the latents and back, after noise and denoising in mode denoise_reconstruct."""
    options, vae, results = sampling_options(run), getattr(model, "vae", model), []
    if run.mode == "denoise_reconstruct":
        options = {"num_steps": model.config.num_steps} | options
    for text in texts:
        ids, pieces, count = windows(model, tokenizer, text)
        parts = []
        for batch in batches(pieces, run.batch_size, run.mode.replace("_", " ")):
            batch = batch.to(model.device)
            if run.mode == "reconstruct":
                parts.append(vae.decode(vae.encode(batch)))
            else:
                parts.append(model.denoise_reconstruct(batch, noise_level=run.noise_level, **options))
        output = torch.cat([part.flatten() for part in parts]).cpu()[:count]
        accuracy = (output == ids).float().mean().item()
        results.append({"text": to_text(tokenizer, output), "tokens": count, "token_accuracy": accuracy})
    return results


@torch.no_grad()
def encode(model: Any, tokenizer: Any, texts: list[str], run: InferenceArguments) -> list[dict[str, Any]]:
    """Writes the latents of the texts to --output_file."""
    latents, counts = [], []
    for text in texts:
        _, pieces, count = windows(model, tokenizer, text)
        parts = [
            model.encode(batch.to(model.device)).flatten(0, 1) for batch in batches(pieces, run.batch_size, "encoding")
        ]
        latents.append(torch.cat(parts))
        counts.append(count)
    save_latents(run.output_file, latents, counts, model)
    return [{"tokens": count, "latents": list(latent.shape)} for count, latent in zip(counts, latents)]


@torch.no_grad()
def decode(model: Any, tokenizer: Any, run: InferenceArguments) -> list[dict[str, Any]]:
    """Texts of the latents in --latents."""
    results = []
    for latents, count in zip(*load_latents(run.latents, model)):
        ids = model.decode(latents.unsqueeze(0).to(model.device, model.dtype))[0, :count]
        results.append({"text": to_text(tokenizer, ids), "tokens": count})
    return results


def show(results: list[dict[str, Any]], run: InferenceArguments) -> None:
    """Writes the texts to --output_file, then prints the results."""
    if run.output_file is not None and run.mode != "encode":
        path = Path(run.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.write_text("\n\n\n".join(result["text"] for result in results), encoding="utf-8")
    for result in results:
        if "token_accuracy" in result:
            print(f"token accuracy {result['token_accuracy']:.4%} over {result['tokens']:,} tokens")
        if run.mode == "encode":
            print(f"{result['tokens']:,} tokens in {result['latents'][0]:,} latents of {result['latents'][1]}")
        else:
            print(result["text"], end="\n\n" if len(results) > 1 else "\n")
    if run.output_file is not None:
        print(f"written to {run.output_file}")


if __name__ == "__main__":
    run_recipe(main)
