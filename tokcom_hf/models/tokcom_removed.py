"""Fields of TokCom configurations that earlier versions wrote and this one does not read.

Those of version 0.1.0 described a second kind of model, which drew token after token from a table of embeddings and never
used its noise. A folder in which they all have the value that meant "not this kind" loads as before.
"""

from typing import Any

from .shared_removed_fields import refuse_fields, take_removed

# Field → the value that changes nothing, by model_type.
BEFORE_0_2: dict[str, dict[str, Any]] = {
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
        Whether version 0.1.0 wrote the configuration.

    Raises:
        ValueError: a removed field has a value that this version cannot follow.
    """
    for name in TRAINING_ONLY:
        kwargs.pop(name, None)
    return bool(take_removed(kwargs, BEFORE_0_2[model_type], "0.1.0"))


def refuse_block_size(block_size: int) -> None:
    """Raises ValueError for a block size of version 0.1.0, which meant blocks beside the latents of finished ones."""
    refuse_fields({"block_size": block_size} if block_size else {}, "0.1.0")
