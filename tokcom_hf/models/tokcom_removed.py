"""Fields of TokCom configurations that version 0.1.0 wrote and later versions do not read.

They described a second kind of model, which drew token after token from a table of embeddings and never used its noise. A
folder in which they all have the value that meant "not this kind" loads as before.
"""

from typing import Any

LAST_VERSION = "0.1.0"
# Field → the value that changes nothing, by model_type.
REMOVED: dict[str, dict[str, Any]] = {
    "tokcom": {
        "clean_latents": "latent", "noise_likelihood": False, "scale_input": False, "token_time_std": 0, "token_cut_rate": 0,
        "token_loss_max_time": 1, "noise_copies": 1, "token_window_size": 0, "token_attention_heads": 0, "token_mlp_size": 0,
        "train_embeddings": False,
    },
    "tokcom_vae": {"encoder": "transformer", "nearest_decoder": False},
    "tokcom_denoiser": {"output_size": None, "attention": "bidirectional", "num_context_layers": 0},
}  # fmt: skip
# They acted in training alone: a folder loads whatever their value is.
TRAINING_ONLY = ("independent_times", "latent_dropout")


def refuse_removed(model_type: str, kwargs: dict[str, Any]) -> bool:
    """Takes the removed fields out of `kwargs`.

    Returns:
        Whether there were any: the configuration is one that version 0.1.0 wrote.

    Raises:
        ValueError: one of them has a value that this version cannot follow.
    """
    for name in TRAINING_ONLY:
        kwargs.pop(name, None)
    found = {name: kwargs.pop(name) for name in REMOVED[model_type] if name in kwargs}
    refuse({name: value for name, value in found.items() if value != REMOVED[model_type][name]})
    return bool(found)


def refuse(acting: dict[str, Any]) -> None:
    """Raises ValueError where there is any field that this version cannot follow."""
    if acting:
        named = ", ".join(f"{name}={value!r}" for name, value in acting.items())
        raise ValueError(
            f"This TokCom configuration has {named}, which was removed; the last version of tokcom_hf that reads it is "
            f"{LAST_VERSION}. Load the folder with that version, or train the model anew."
        )
