"""Uploads a finished model folder to the Hub, without the checkpoints and caches that a run leaves in it.

Every recipe pushes once, through `push_folder`, when all its files are written. The pushes of `Trainer` are not used,
because they upload a generic model card, and before the results, the figures and the final card exist.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .whole_files import UNFINISHED_PREFIX

RUN_MARKER = "run.json"  # written by `run_folders`; not uploaded, because it contains local paths
RUN_FILES = [
    "checkpoint-*",
    "*/checkpoint-*",
    "*.npy",
    "*/training_args.bin",
    "training_args.bin",
    "best_vae.pt",
    "best_diffusion.pt",
    "runs/*",
    "*/runs/*",
    "logs/*",
    "*/logs/*",
    "checkpoints/*",
    RUN_MARKER,
    UNFINISHED_PREFIX + "*",
    "*/" + UNFINISHED_PREFIX + "*",
    "*/" + RUN_MARKER,
]


@dataclass(frozen=True)
class Upload:
    """Hub repository that `--push_to_hub` uploads the finished folder to; see `push_folder`."""

    repo_id: str
    private: bool | None = None
    token: str | None = None
    revision: str | None = None

    def push(self, folder: str | Path, suffix: str = "") -> str:
        """Uploads `folder` to `repo_id + suffix` and returns the commit's URL."""
        return push_folder(folder, self.repo_id + suffix, self.private, self.token, self.revision)


def take_upload(training: dict[str, Any]) -> Upload | None:
    """Removes the Hub settings from the values of `TrainingArguments`, so that the recipe pushes and the trainer does not.

    Returns:
        the upload, or None if `push_to_hub` is not set.

    Raises:
        ValueError: `push_to_hub` is set without `hub_model_id`, or with a setting that pushes during training.
    """
    wanted = training.pop("push_to_hub", False)
    repo_id = training.pop("hub_model_id", None)
    private, token = training.pop("hub_private_repo", None), training.pop("hub_token", None)
    revision, strategy = training.pop("hub_revision", None), str(training.pop("hub_strategy", "end"))
    always = training.pop("hub_always_push", False)
    if not wanted:
        return None
    if not repo_id:
        raise ValueError("--push_to_hub needs --hub_model_id user/name.")
    if strategy not in ("end", "every_save") or always:
        raise ValueError(
            f"Recipes push the finished folder once, got --hub_strategy {strategy} and --hub_always_push {always}; "
            "leave both out. To push checkpoints during training, use the trainer in a script of your own."
        )
    return Upload(repo_id, private, token, revision)


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Creates the model repository `repo_id` where it does not exist, uploads `folder`, and returns the commit's URL.

    Args:
        folder: model folder with a `config.json`.
        repo_id: `user/name`.
        private: visibility of a new repository; None means the account's default.
        token: access token; None means that of the login.
        revision: branch, created if it does not exist; None means `main`.

    Raises:
        ValueError: `repo_id` is empty.
        OSError: the folder holds no model.
    """
    if not repo_id:
        raise ValueError("Name the repository with --hub_model_id user/name to push to the Hub.")
    if not (Path(folder) / "config.json").is_file():
        raise OSError(f"{str(folder)!r} holds no config.json; only a finished model can be pushed.")
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
    options: dict[str, Any] = {}
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        options["revision"] = revision
    commit = api.upload_folder(folder_path=str(folder), repo_id=repo_id, ignore_patterns=RUN_FILES, **options)
    return str(commit)
