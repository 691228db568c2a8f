"""Small models of the TokCom and VQGAN families, and inputs for them."""

import torch

from tokcom_hf import (
    VQGAN,
    DenoisedModel,
    DenoisedModelConfig,
    TokComConfig,
    TokComModel,
    TokComVAE,
    TokComVAEConfig,
    VQGANConfig,
    VQGANDiscriminator,
    VQGANDiscriminatorConfig,
)

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip
VAE = {"vocab_size": 51, "latent_size": 16, **SHAPE}
# Another width than the denoiser's, so that none is taken for the other.
CONTEXT = SHAPE | {"hidden_size": 48, "intermediate_size": 64}
VQ = {
    "image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "channel_multipliers": [1, 2],
    "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1, "latent_channels": 12,
}  # fmt: skip
FLOW = {"vae": VAE, "denoiser": SHAPE, "noise_std": 1.0, "mse_weight": 1.0}
MODELS = {
    "vae": lambda **more: TokComVAE(TokComVAEConfig(**VAE | more)),
    "denoiser": lambda **more: DenoisedModel(DenoisedModelConfig(**{"latent_size": 16} | SHAPE | more)),
    # The documented model, and one with a context.
    "tokcom": lambda **more: TokComModel(TokComConfig(**FLOW | more)),
    "context": lambda **more: TokComModel(
        TokComConfig(**FLOW | {"context": CONTEXT, "block_size": 2, "block_sizes": [1, 2]} | more)
    ),
    # One that predicts latents by way of its tokens.
    "posterior": lambda **more: TokComModel(
        TokComConfig(
            **FLOW
            | {
                "context": CONTEXT,
                "block_size": 2,
                "block_sizes": [1, 2],
                "token_posterior": True,
                "recent_size": 6,
            }
            | more
        )
    ),
    "vqgan": lambda **more: VQGAN(VQGANConfig(**VQ | more)),
    "discriminator": lambda **more: VQGANDiscriminator(
        VQGANDiscriminatorConfig(**{"base_channels": 8, "num_layers": 2} | more)
    ),
}


def small(kind: str, **settings):
    """A model of `MODELS` whose weights are large enough that every input matters (adaLN-Zero would hide the time)."""
    torch.manual_seed(0)
    model = MODELS[kind](**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        if settings.get("standardize_latents"):
            model.fit_latents(torch.randn(16), torch.rand(16) + 0.5)
        if kind == "posterior":
            model.posterior.fit(model, torch.randint(0, 50, (600, 4), generator=seeded(7)))
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Arguments of its forward, in float32."""
    generator = seeded(1)
    if kind == "vae":
        return {"input_ids": torch.randint(0, 50, (2, 8), generator=generator)}
    if kind == "denoiser":
        return {
            "latents": torch.randn(2, 5, 16, generator=generator),
            "timesteps": torch.rand(2, generator=generator),
        }
    if kind in ("tokcom", "context", "posterior"):
        blocks = (2, 1, 2) if kind == "tokcom" else (2, 2, 1)
        return {
            "input_ids": torch.randint(0, 50, (2, 8), generator=generator),
            "noise": torch.randn(*blocks, 16, generator=generator),
            "timesteps": torch.rand(blocks[:2], generator=generator),
        } | ({} if kind == "tokcom" else {"block_size": 1})
    return {"pixel_values": torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1}


def main_output(output) -> torch.Tensor:
    """The logits, clean latents or pictures of an output."""
    names = ("logits", "clean_latents", "reconstruction")
    return next(output[name] for name in names if output.get(name) is not None)
