"""Fills the Jinja templates of `model_cards/` with the numbers of a run."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def template_path(name: str) -> Path:
    """Path of `model_cards/<name>.md`, in an installed package and in a source checkout alike."""
    installed = Path(str(files("tokcom_hf"))) / "model_cards" / f"{name}.md"
    checkout = Path(__file__).resolve().parent.parent / "model_cards" / f"{name}.md"
    for path in (installed, checkout):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No model card template {name!r}; looked for {installed} and {checkout}.")


def write_model_card(
    folder: str | Path, template: str, *, tags: list[str], pipeline_tag: str | None = None, **values
) -> Path:
    """Renders `model_cards/<template>.md` into `<folder>/README.md` and returns its path.

    Args:
        folder: model folder.
        template: template name without extension.
        tags: Hub tags, for example `["text-generation", "flow-matching"]`.
        pipeline_tag: Hub pipeline tag, where one of the Hub's own fits.
        values: everything the template names, for example `metrics={"token_accuracy": 0.999}`.
    """
    data = ModelCardData(
        library_name="transformers", license="mit", tags=["tokcom_hf", *tags], pipeline_tag=pipeline_tag
    )
    card = ModelCard.from_template(data, template_path=str(template_path(template)), **values)
    path = Path(folder) / "README.md"
    card.save(path)
    return path
