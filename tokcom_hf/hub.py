"""Uploads a finished model folder, without the checkpoints and caches a run leaves in it.

Every recipe pushes through `push_folder`, once, when all its files are written. `Trainer`'s own pushes are not used: they
upload a generic card, and they come before results, figures and the real card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .whole_files import UNFINISHED_PREFIX

RUN_MARKER = "run.json"  # of `run_folders`; it names local paths
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
    """Where `--push_to_hub` sends the finished folder."""

    repo_id: str
    private: bool | None = None
    token: str | None = None
    revision: str | None = None

    def push(self, folder: str | Path, suffix: str = "") -> str:
        """Uploads `folder` to `repo_id + suffix` and returns the commit's address."""
        return push_folder(folder, self.repo_id + suffix, self.private, self.token, self.revision)


def take_upload(training: dict[str, Any]) -> Upload | None:
    """Moves the Hub settings out of a section of `TrainingArguments`: the recipe pushes, the trainer does not.

    Raises:
        ValueError: `push_to_hub` without `hub_model_id`, or a setting that pushes during training.
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
            "leave both out. A trainer of your own pushes checkpoints."
        )
    return Upload(repo_id, private, token, revision)


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Creates the model repository `repo_id` where it does not exist, uploads `folder`, and returns the commit's address.

    Args:
        folder: holds `config.json`.
        repo_id: `user/name`.
        private: of a new repository; None takes the account's default.
        token: access token; None takes the one logged in with.
        revision: branch, created where it does not exist; None is `main`.

    Raises:
        ValueError: no repository name.
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
