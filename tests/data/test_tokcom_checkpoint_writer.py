"""The documented checkpoint files that this package writes: their keys, and the model that they give back."""

import pytest
import torch

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.tokcom_checkpoint import convert_checkpoint, read_checkpoint
from tokcom_hf.tokcom_checkpoint_writer import save_checkpoint

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip


def small(vae: dict | None = None, denoiser: dict | None = None, **flow) -> TokComModel:
    torch.manual_seed(0)
    model = TokComModel(
        TokComConfig(vae={"vocab_size": 51, **SHAPE, **(vae or {})}, denoiser=SHAPE | (denoiser or {}), **flow)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def test_both_stages_write_the_documented_keys(tmp_path):
    model = small(max_chunks=8, noise_std=0.07)
    told = {"epoch": 3, "val_loss": 1.5, "tokenizer_path": "tokens"}
    whole = torch.load(save_checkpoint(tmp_path / "a" / "best_diffusion.pt", model, **told), weights_only=True)
    vae = torch.load(save_checkpoint(tmp_path / "best_vae.pt", model.vae, max_length=64, **told), weights_only=True)
    for content, stage in ((whole, "diffusion"), (vae, "vae")):
        assert set(content) == {
            "epoch", "stage", "val_loss", "model_args", "config", "vae_model_state_dict", "denoised_model_state_dict",
        }  # fmt: skip
        assert (content["epoch"], content["stage"], content["val_loss"]) == (3, stage, 1.5)
        assert content["model_args"] == SHAPE | {
            "vocab_size": 51, "omni_token_id": 50, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        }  # fmt: skip
    assert whole["config"] == {"tokenizer_path": "tokens", "max_length": 32, "chunk_size": 4, "noise_std": 0.07}
    assert vae["config"]["max_length"] == 64 and vae["denoised_model_state_dict"] == {}
    names = whole["vae_model_state_dict"].keys()
    assert {"embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.lm_head.weight"} <= names
    assert "lm_head.weight" not in names and [path.name for path in (tmp_path / "a").iterdir()] == [
        "best_diffusion.pt"
    ]


def test_a_written_file_gives_the_same_model_back(tmp_path):
    # Hints are of the training of stage one alone.
    model = small({"hint_tokens": 4}, max_chunks=8, noise_std=0.07)
    path = save_checkpoint(tmp_path / "best_diffusion.pt", model, epoch=1, val_loss=0.1, tokenizer_path="tokens")
    again = convert_checkpoint(read_checkpoint(path))
    seed = torch.Generator
    ids = [one.generate(num_chunks=4, num_steps=3, generator=seed().manual_seed(0)) for one in (model, again)]
    assert torch.equal(*ids) and len(ids[0].unique()) > 2
    assert (again.config.noise_std, again.config.max_chunks) == (0.07, 8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vae": {"latent_size": 16}}, "vae.latent_size=16"),
        ({"vae": {"chunk_projection": "all"}}, "vae.chunk_projection='all'"),
        ({"vae": {"fixed_norm": True}}, "vae.fixed_norm=True"),
        ({"denoiser": {"num_hidden_layers": 1}}, "denoiser.num_hidden_layers=1"),
        ({"denoiser": {"self_conditioning": True}}, "denoiser.self_conditioning=True"),
        ({"context": SHAPE}, "denoiser.context_size=32"),
        ({"standardize_latents": True}, "flow.standardize_latents=True"),
        ({"num_steps": 8}, "flow.num_steps=8"),
    ],
)
def test_what_the_format_cannot_say_is_refused_by_name_and_nothing_is_written(tmp_path, settings, named):
    with pytest.raises(ValueError, match="cannot hold this model") as caught:
        save_checkpoint(tmp_path / "a.pt", small(**settings), epoch=1, val_loss=0.1, tokenizer_path="tokens")
    assert named in str(caught.value) and not list(tmp_path.iterdir())
