"""Suggests the option of a recipe that an unknown flag most likely means ("Did you mean ...?")."""

import difflib

from .documented_names import meanings

# Common names of options elsewhere -> names of options here; the first one that the recipe has is suggested.
MEANINGS = {
    "input_text": ("text", "train_file"),
    "input": ("input_file", "train_file"),
    "text_file": ("input_file", "train_file"),
    "data_file": ("train_file", "image_text_file"),
    "lr": ("learning_rate",),
    "batch_size": ("per_device_train_batch_size",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "train_dir": ("image_dir", "train_file"),
    "data_dir": ("image_dir", "train_file"),
    "val_dir": ("eval_file", "validation_file"),
    "val_file": ("eval_file", "validation_file"),
    "save_dir": ("output_dir",),
    "sample_dir": ("output_dir",),
    "checkpoint": ("resume_from_checkpoint", "model", "model_path"),
    "model_dir": ("model", "model_path", "base_model", "output_dir"),
    "model_name": ("base_model", "model", "model_path", "base"),
    "use_amp": ("bf16",),
    "amp": ("bf16",),
    "no_cuda": ("use_cpu",),
    "cpu": ("use_cpu",),
    "dataset": ("dataset_name", "train_file"),
}
# Abbreviations in option names -> the words used here.
WORDS = {
    "adv": "adversarial", "gan": "adversarial", "disc": "discriminator", "recon": "reconstruction", "lr": "learning_rate",
    "bs": "batch_size", "val": "eval", "dim": "size", "perc": "perceptual", "temp": "temperature",
}  # fmt: skip
EMPTY_WORDS = frozenset(("loss", "num", "n", "the", "use"))


def suggestion(name: str, known: list[str]) -> str | None:
    """Returns the option of `known` that `name` most likely means, by meaning or by spelling; None if unsure."""
    meant = [other for other in (*MEANINGS.get(name, ()), *meanings(name)) if other in known]
    if meant:
        return meant[0]
    for other in difflib.get_close_matches(name, known, n=5, cutoff=0.75):
        pairs = list(zip(name.split("_"), other.split("_")))
        alike = [difflib.SequenceMatcher(None, mine, theirs).ratio() for mine, theirs in pairs]
        # Every word must be similar, because names can share most letters without sharing their meaning.
        if name.replace("_", "") == other.replace("_", "") or (
            name.count("_") == other.count("_") and min(alike) >= 0.6
        ):
            return other
    words = {part for word in name.split("_") for part in WORDS.get(word, word).split("_")} - EMPTY_WORDS
    holding = [other for other in known if words and words <= set(other.split("_"))]
    # A single word that several options contain is ambiguous.
    if holding and (len(words) > 1 or len(holding) == 1):
        return min(holding, key=len)
    return None
