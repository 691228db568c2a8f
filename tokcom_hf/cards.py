"""Writes model cards: fills the Jinja templates of `model_cards/` with a run's results and adds the Hub's metadata."""

import math
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id


class CardDataset(NamedTuple):
    """The data set of a run, as its model card names it.

    id: Hub id of the data set, or a slug of the built-in data or the user's file.
    name: name shown to readers.
    config: configuration of a data set on the Hub.
    public: whether others can get the data; a private file appears only beside the results, not under `datasets`.
    language: ISO code of the text's language, for example `en`; None for data without text or of unknown language.
    """

    id: str
    name: str
    config: str | None = None
    public: bool = True
    language: str | None = None


# Entries that `Trainer.evaluate` adds about the run, not about the model.
SPEED = ("runtime", "samples_per_second", "steps_per_second", "epoch")
EMBEDDED_TEXT = CardDataset("python-documentation", "English text of Python's documentation", language="en")
SCENES = CardDataset("procedural-scenes", "Procedural scenes of tokcom_hf", language="en")
IMAGES = CardDataset("procedural-images", "Procedural images of tokcom_hf")


def card_dataset(
    embedded: CardDataset, dataset_name: str | None = None, dataset_config: str | None = None, file: str | None = None
) -> CardDataset:
    """Describes the training data of a run: a data set on the Hub, the user's own file or folder, or else `embedded`."""
    if dataset_name:
        return CardDataset(dataset_name, dataset_name, dataset_config)
    if file:
        return CardDataset(_slug(Path(file).stem), Path(file).name, public=False)
    return embedded


def template_path(name: str) -> Path:
    """Path of `model_cards/<name>.md`, in an installed package and in a source checkout alike."""
    installed = Path(str(files("tokcom_hf"))) / "model_cards" / f"{name}.md"
    checkout = Path(__file__).resolve().parent.parent / "model_cards" / f"{name}.md"
    for path in (installed, checkout):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No model card template {name!r}; looked for {installed} and {checkout}.")


def write_model_card(
    folder: str | Path,
    template: str,
    *,
    tags: list[str],
    pipeline_tag: str | None = None,
    repo_id: str | None = None,
    base: str | None = None,
    dataset: CardDataset | None = None,
    measured: Mapping[str, Any] | None = None,
    **values,
) -> Path:
    """Renders `model_cards/<template>.md` into `<folder>/README.md` and returns its path.

    Args:
        folder: model folder.
        template: template name without extension; the template reads `repo_id`, or else the folder's name, as `model_id`.
        tags: Hub tags, for example `["text-generation", "flow-matching"]`.
        pipeline_tag: task name that the Hub knows.
        repo_id: `user/name` of the repository that the folder will be uploaded to.
        base: the base model; the metadata names it only if it is a Hub id, not a local folder.
        dataset: what the model was trained and measured on; see `card_dataset`.
        measured: results of the run by name, for the machine-readable `model-index`; needs `dataset` and `pipeline_tag`.
            Values that are not finite numbers are left out, because the Hub rejects them; so are evaluation speeds.
        values: the template's other variables, for example `metrics={"token_accuracy": 0.999}`.
    """
    model_id = repo_id or Path(folder).resolve().name
    data = ModelCardData(
        library_name="transformers",
        license="mit",
        tags=list(dict.fromkeys(["tokcom_hf", *tags])),
        pipeline_tag=pipeline_tag,
        base_model=hub_id(base),
        datasets=[dataset.id] if dataset is not None and dataset.public else None,
        language=None if dataset is None else dataset.language,
        model_name=model_id.rpartition("/")[2],
        eval_results=_results(pipeline_tag, dataset, measured or {}) or None,
    )
    card = ModelCard.from_template(data, template_path=str(template_path(template)), model_id=model_id, **values)
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def hub_id(name: str | os.PathLike | None) -> str | None:
    """Returns `name` if it is a valid Hub repository id, None for a local folder or a path."""
    if name is None or os.path.exists(name):
        return None
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return str(name)


def flat_numbers(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens nested results, joining names: `{"a": {"b": 1}}` → `{"a_b": 1.0}`; lists and strings are left out."""
    numbers: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers


def _results(task: str | None, dataset: CardDataset | None, measured: Mapping[str, Any]) -> list[EvalResult]:
    if task is None or dataset is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset.id,
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            metric_type=_slug(name, "_"),
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in flat_numbers(measured).items()
        if math.isfinite(value) and name not in SPEED
    ]


def _slug(text: str, joint: str = "-") -> str:
    return re.sub(r"[^a-z0-9.]+", joint, text.lower()).strip(f"{joint}.") or "data"
