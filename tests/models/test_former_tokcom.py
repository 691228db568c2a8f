"""A folder that version 0.1.0 wrote gives the numbers and the text that version 0.1.0 gave."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tokcom_hf import DenoisedModelConfig, TokComConfig, TokComModel, TokComVAEConfig

# Written by 0.1.0: fixed_norm, self_conditioning, clean_prefix, standardised latents; its outputs beside it.
FOLDER = Path(__file__).parents[1] / "data" / "former_tokcom"


@pytest.fixture(scope="module")
def model() -> TokComModel:
    return AutoModel.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def former() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "outputs.safetensors")


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@torch.no_grad()
def test_latents_and_logits(model, former):
    latents = model.encode(former["ids"])
    close(latents, former["encoded"])
    close(model.standardize(latents), former["standardized"])
    close(model.vae.decode_logits(latents), former["decoded_logits"])


@torch.no_grad()
def test_denoised_latents(model, former):
    close(model.denoiser(former["x_t"], former["t"]).clean_latents, former["clean_latents"])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    told = model.denoiser(
        former["x_t"], former["chunk_times"], self_condition=former["self_condition"], attention_mask=mask
    )
    close(told.clean_latents, former["clean_latents_told"])


def test_generated_text(model, former):
    prompt, mask = former["ids"][:, :7], former["prompt_mask"]
    assert bool((mask == 0).any()) and 7 % model.config.vae.chunk_size
    for name, settings in {
        "generated": {"num_chunks": 6, "num_steps": 8, "batch_size": 3, "sampler": "euler"},
        "continued": {"input_ids": prompt, "attention_mask": mask, "num_generate_chunks": 4, "num_steps": 8},
        "by_default": {"input_ids": prompt, "attention_mask": mask, "max_new_tokens": 10},
        "heun": {"input_ids": prompt, "num_generate_chunks": 3, "num_steps": 4, "sampler": "heun"},
        "renoise": {"num_chunks": 6, "num_steps": 4, "sampler": "renoise"},
    }.items():
        assert model.generate(**settings, generator=seeded()).tolist() == former[name].tolist(), name


def test_it_is_saved_without_the_removed_fields(model, former, tmp_path):
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"clean_latents", "noise_likelihood", "token_window_size", "independent_times"} & stored.keys()
    assert "encoder" not in stored["vae"] and "attention" not in stored["denoiser"]
    again = AutoModel.from_pretrained(tmp_path)
    close(again.encode(former["ids"]), former["encoded"])
    assert (again.config.num_steps, again.config.step_power, again.config.sampler) == (50, 1.0, "euler")


REMOVED = [
    ({"clean_latents": "posterior_mean"}, "clean_latents='posterior_mean'"),
    ({"noise_likelihood": True, "sampler": "commit"}, "noise_likelihood=True"),
    ({"token_window_size": 16, "token_mlp_size": 8}, "token_window_size=16, token_mlp_size=8"),
    ({"vae": {"encoder": "embedding"}}, "encoder='embedding'"),
    ({"vae": {"nearest_decoder": True}}, "nearest_decoder=True"),
    ({"denoiser": {"attention": "block_causal"}}, "attention='block_causal'"),
    ({"denoiser": {"num_context_layers": 2}}, "num_context_layers=2"),
    # Blocks beside the latents of what was written before.
    ({"block_size": 4}, "block_size=4"),
]


@pytest.mark.parametrize(("fields", "named"), REMOVED)
def test_the_removed_kind_is_refused_in_words(fields, named, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "former")
    stored = json.loads((FOLDER / "config.json").read_text())
    for name, value in fields.items():
        stored[name] = stored[name] | value if isinstance(value, dict) else value
    (tmp_path / "former" / "config.json").write_text(json.dumps(stored))
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(
            ValueError, match=r"removed; the last version of tokcom_hf that reads it is 0\.1\.0"
        ) as error:
            auto.from_pretrained(tmp_path / "former")
        assert named in str(error.value)


def test_fields_that_acted_in_training_alone_do_not_matter(former, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "former")
    stored = json.loads((FOLDER / "config.json").read_text())
    stored |= {"block_sizes": [2, 8], "independent_times": True, "vae": stored["vae"] | {"latent_dropout": 0.1}}
    (tmp_path / "former" / "config.json").write_text(json.dumps(stored))
    loaded = AutoModel.from_pretrained(tmp_path / "former")
    assert loaded.config.block_sizes == [0]
    close(loaded.encode(former["ids"]), former["encoded"])
    # A configuration of this version says what acts.
    with pytest.raises(ValueError, match="the whole row is one block"):
        TokComConfig(block_sizes=[1, 4, 16, 64, 0])


def test_removed_arguments_of_a_part_are_refused_too():
    for build in (
        lambda: TokComVAEConfig(encoder="embedding"),
        lambda: DenoisedModelConfig(output_size=64),
    ):
        with pytest.raises(ValueError, match=r"the last version of tokcom_hf that reads it is 0\.1\.0"):
            build()
    assert not hasattr(TokComVAEConfig(encoder="transformer"), "encoder")
