"""Uploads a finished model folder, without the checkpoints and caches a run leaves in it."""

from pathlib import Path

from huggingface_hub import HfApi

RUN_FILES = [
    "checkpoint-*",
    "*/checkpoint-*",
    "*.npy",
    "*/training_args.bin",
    "training_args.bin",
    "runs/*",
    "*/runs/*",
]


def push_folder(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Creates the model repository `repo_id` where it does not exist, uploads `folder`, and returns the commit's address.

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
    commit = api.upload_folder(folder_path=str(folder), repo_id=repo_id, ignore_patterns=RUN_FILES)
    return str(commit)
