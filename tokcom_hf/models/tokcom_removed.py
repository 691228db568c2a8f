"""Fields of TokCom configurations that earlier versions wrote and this one does not read.

Fields of 0.1.0 belong to a second kind of model, which drew its tokens from a table of embeddings and never used its noise.
Fields of 0.2.0 are settings of training that no recipe changed.
"""

from typing import Any

from .shared_removed_fields import refuse_fields, take_removed

# By model_type: field → the value that changes nothing.
OF_0_1: dict[str, dict[str, Any]] = {
    "tokcom": {
        "clean_latents": "latent", "noise_likelihood": False, "scale_input": False, "token_time_std": 0, "token_cut_rate": 0,
        "token_loss_max_time": 1, "noise_copies": 1, "token_window_size": 0, "token_attention_heads": 0, "token_mlp_size": 0,
        "train_embeddings": False,
    },
    "tokcom_vae": {"encoder": "transformer", "nearest_decoder": False},
    "tokcom_denoiser": {"output_size": None, "attention": "bidirectional", "num_context_layers": 0},
}  # fmt: skip
OF_0_2: dict[str, dict[str, Any]] = {
    "tokcom": {
        "prefix_dropout": 0.1, "self_conditioning_rate": 0.5, "initializer_range": 0.02,
    },
    "tokcom_vae": {"kl_free_nats": 0.5, "hint_weight": 0.3},
    "tokcom_denoiser": {"time_max_period": 10000.0, "initializer_range": 0.02},
}  # fmt: skip
# Fields of 0.1.0 that acted in training alone: a folder loads with any value of them.
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
    take_removed(kwargs, OF_0_2[model_type])
    return bool(take_removed(kwargs, OF_0_1[model_type], "0.1.0"))


def refuse_block_size(block_size: int) -> None:
    """Raises ValueError for a block size in a folder of 0.1.0, whose blocks attended to the latents of earlier blocks."""
    refuse_fields({"block_size": block_size} if block_size else {}, "0.1.0")
