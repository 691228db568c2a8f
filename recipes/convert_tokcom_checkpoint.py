"""Turns a TokCom `best_diffusion.pt` (or `best_vae.pt`) into a folder that `AutoModel.from_pretrained` opens.

    python recipes/convert_tokcom_checkpoint.py best_diffusion.pt outputs/converted
    python recipes/convert_tokcom_checkpoint.py best_diffusion.pt outputs/converted --tokenizer my/tokenizer --parts true

The folder holds the whole model, or the VAE alone if the file is `best_vae.pt`. --parts also writes the folders `vae/` and
`denoiser/`, each a model of its own. --tokenizer saves the tokenizer beside the model and takes the EOS token from it.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tokcom_hf import TokComModel
from tokcom_hf.cards import write_model_card
from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe
from tokcom_hf.data.tokenizers import check_tokenizer, load_tokenizer
from tokcom_hf.run_folders import check_new_folder
from tokcom_hf.tokcom_checkpoint import checkpoint_settings, convert_checkpoint, read_checkpoint


@dataclass
class ConversionArguments:
    """Options, which follow the two paths."""

    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer of the checkpoint, by name or folder."})
    parts: bool = field(default=False, metadata={"help": "Also write <OUT>/vae and <OUT>/denoiser."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the model that OUT holds."})


def main() -> None:
    """Converts the checkpoint and prints what was written."""
    paths = []
    arguments = sys.argv[1:]
    while arguments and not arguments[0].startswith("--"):
        paths.append(arguments.pop(0))
    run = ConversionArguments(**parse_recipe(__doc__, {"run": ConversionArguments}, argv=arguments)["run"])
    if len(paths) != 2:
        raise RecipeError(f"Name the checkpoint and the output folder before any option, got {len(paths)} paths.")
    checkpoint = read_checkpoint(paths[0])
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer else None
    model = convert_checkpoint(checkpoint, None if tokenizer is None else tokenizer.eos_token_id, paths[0])
    whole = isinstance(model, TokComModel)
    vae = model.vae if whole else model
    if tokenizer is not None:
        check_tokenizer(tokenizer, vae.config)
    out = check_new_folder(paths[1], run.overwrite)
    write(out, model, tokenizer, run.parts and whole, Path(paths[0]).name)
    print(
        f"stage {checkpoint.get('stage')!r}, epoch {checkpoint.get('epoch')}, validation loss {checkpoint.get('val_loss')}"
    )
    if tokenizer is None:
        print(
            f"  trained with the tokenizer {checkpoint_settings(checkpoint)['tokenizer_path']!r}; --tokenizer saves it here"
        )
    for name, part in (("VAE", vae), ("denoiser", model.denoiser if whole else None)):
        if part is not None:
            print(f"  {name}: {part.num_parameters():,} parameters")
    print(f"written to {out}; load it with AutoModel.from_pretrained({str(out)!r})")


def write(out: Path, model, tokenizer, parts: bool, source: str) -> None:
    """Writes into a folder beside `out` first, so that an interruption leaves `out` as it was."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        folders = {unfinished: model}
        if parts:
            folders |= {unfinished / "vae": model.vae, unfinished / "denoiser": model.denoiser}
        for folder, part in folders.items():
            part.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        whole = isinstance(model, TokComModel)
        counts = {"VAE": (model.vae if whole else model).num_parameters()}
        if whole:
            counts["denoiser"] = model.denoiser.num_parameters()
        write_model_card(
            unfinished, "tokcom", tags=["text-generation" if whole else "text-compression"],
            pipeline_tag="text-generation" if whole else "feature-extraction", repo_id=out.name,
            name="TokCom" if whole else "TokComVAE",
            config=model.config.to_dict(), parameters=counts, metrics={}, samples={},
            data=f"data not recorded in {source}, from which it was converted",
        )  # fmt: skip
        # Other files of an overwritten folder are kept.
        out.mkdir(parents=True, exist_ok=True)
        for item in (path for path in unfinished.rglob("*") if path.is_file()):
            target = out / item.relative_to(unfinished)
            target.parent.mkdir(exist_ok=True)
            item.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    run_recipe(main)
