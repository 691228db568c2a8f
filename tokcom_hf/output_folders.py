"""Checks output folders of recipes, and removes the files of a former run from them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from .checkpoints import checkpoints
from .hub import RUN_MARKER
from .whole_files import UNFINISHED_PREFIX, remove, remove_unfinished

# Files that recipes write into their folders, besides checkpoints; nothing else is ever removed.
RESULT_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "training_args.bin", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "processor_config.json", "preprocessor_config.json", "README.md",
    "results.json", "budget.json", "samples.txt", "samples.jsonl", "train_latents.*", "validation_latents.*",
    "accuracy_against_noise.png", "denoising_against_time.png", "reconstructions.png", "codebook.png", "history.png",
    "joint_training.png", "generated.png", "completed.png", "best.json", "best_vae.pt", "best_diffusion.pt",
    "logs/training.log", "checkpoints/*_step_*.pt",
    "logs/tensorboard/events.out.tfevents.*", "step-*-reconstructions.png", "step-*-codebook.png",
)  # fmt: skip

NOT_EMPTY = (
    "Output folder {folder!r} is not empty; add --resume_from_checkpoint true to resume its run, --overwrite to "
    "replace it, or name another folder with --output_dir."
)


def holds_files(folder: Path) -> bool:
    """Returns whether an output folder holds more than the files that an interrupted start leaves."""
    return any(item.name != RUN_MARKER and not item.name.startswith(UNFINISHED_PREFIX) for item in folder.iterdir())


def remove_results(folders: Sequence[Path]) -> None:
    """Removes the files that a run of this package wrote into its folders, and then the folders that are empty.

    Args:
        folders: the output folder, which is kept, and the folders below it that the run writes into.
    """
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            continue
        remove_checkpoints(folder)
        remove_unfinished(folder)
        for pattern in RESULT_FILES:
            for file in folder.glob(pattern):
                if file.is_file() or file.is_symlink():
                    file.unlink()
        for emptied in (folder / "logs" / "tensorboard", folder / "logs", folder / "checkpoints"):
            with contextlib.suppress(OSError):  # the folder holds files of others, or does not exist
                emptied.rmdir()
        if folder != folders[0]:
            with contextlib.suppress(OSError):  # the folder holds files of others
                folder.rmdir()


def remove_checkpoints(folder: Path) -> None:
    """Removes the folders `checkpoint-N` directly in `folder`; of a symbolic link, only the link is removed."""
    for checkpoint in list(checkpoints(folder)):
        remove(checkpoint)


def check_new_folder(path: str | Path, overwrite: bool = False) -> Path:
    """Refuses a non-empty output folder of a recipe without training, unless it may overwrite files of the same names.

    Raises:
        FileExistsError: the folder holds files and `overwrite` is not set.
        NotADirectoryError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Output folder {str(path)!r} is a file; name a folder.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"Output folder {str(path)!r} is not empty; add --overwrite to replace files of the same names in it, or name "
            "another folder."
        )
    return path


def check_output_dir(path: str | Path, overwrite: bool = False, resume: bool = False) -> Path:
    """Refuses a non-empty output folder unless the run overwrites or resumes it.

    With `overwrite`, the folders `checkpoint-N` directly in it are removed, and nothing else. Recipes use `RunFolder`
    instead, which knows all files of a run.

    Raises:
        FileExistsError: the folder holds files and neither flag is set.
        NotADirectoryError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Output folder {str(path)!r} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not (overwrite or resume):
            raise FileExistsError(NOT_EMPTY.format(folder=str(path)))
        if overwrite and not resume:
            remove_checkpoints(path)
    return path
