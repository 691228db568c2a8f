"""What TokCom's document says of the models and of their training, each statement checked on a small documented model."""

import ast
import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from torch import nn

from tokcom_hf import (
    DenoisedModel,
    DenoisedModelConfig,
    DenoiserTrainer,
    DenoiserTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAE,
    TokComVAEConfig,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.data.latent_rows import encode_rows

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 64, length: int = 16):
        self.ids = torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(self.ids[index])}


def arguments(folder, **changes) -> dict:
    return {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 1, "sample_every": 0,
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none",
        "learning_rate": 1e-3, **changes,
    }  # fmt: skip


@pytest.fixture
def model() -> TokComModel:
    """The documented model, small, with weights at which every input matters."""
    torch.manual_seed(0)
    model = TokComModel(TokComConfig(vae={"vocab_size": 51, **SHAPE}, denoiser=SHAPE, max_chunks=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


CHUNKS = torch.arange(20).view(5, 4)


def outputs_of(module: nn.Module, call) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda own, given, result: seen.append(result))
    call()
    handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------- numbers
def test_the_architecture_table():
    vae, denoiser = TokComVAEConfig(), DenoisedModelConfig()
    for part in (vae, denoiser):
        assert (part.hidden_size, part.num_hidden_layers) == (896, 24)
    whole = TokComConfig()
    assert vae.chunk_size == 4 and whole.max_chunks == 256 and whole.max_chunks * vae.chunk_size == 1024
    with torch.device("meta"):
        parts = TokComVAE(vae), DenoisedModel(denoiser)
    assert [len(stack.layers) for stack in (parts[0].encoder, parts[0].decoder, parts[1])] == [24, 24, 24]


def test_the_installation_the_files_and_the_license():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    tree = ast.parse(setup)
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    packages = {re.split(r"[<>=\[]", text)[0] for text in texts}
    # tqdm comes with transformers, and the Hub's client downloads without hf_transfer since its version 1.
    assert {"torch", "transformers", "datasets", "wandb"} <= packages and any(
        "tqdm" in word for word in requires("transformers")
    )
    for name in ("train_tokcom.py", "infer_tokcom.py", "configs/paper/train_tokcom.yaml"):
        assert (ROOT / "recipes" / name).is_file()
    for name in ("models/modeling_tokcom_vae.py", "models/modeling_tokcom_denoiser.py", "data/text.py"):
        assert (ROOT / "tokcom_hf" / name).is_file()
    assert "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8") and 'license="MIT"' in setup
    assert (ROOT / "README.md").is_file()


# ----------------------------------------------------------------------------------------------------------------- VAE
@torch.no_grad()
def test_the_encoder_turns_chunks_of_ids_into_one_latent_each(model):
    states = outputs_of(model.vae.encoder, lambda: model.vae(CHUNKS))[0]
    latents = model.vae(CHUNKS).latents
    assert states.shape == (5, 4, 32) and latents.shape == (5, 32)
    # It is the last position's state, after the final norm, and nothing else.
    assert torch.equal(latents, states[:, -1])


@torch.no_grad()
def test_the_decoder_turns_a_latent_into_logits_of_a_chunk_by_omni_tokens(model):
    vae = model.vae
    inputs: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_pre_hook(lambda own, given: inputs.append(given[0]))
    output = vae(CHUNKS)
    handle.remove()
    assert output.logits.shape == (5, 4, 51) and vae.config.omni_token_id == 50
    omni = vae.embed_tokens.weight[50]
    # The latent stands first, the omni token's embedding in every other place.
    assert torch.equal(inputs[0][:, 0], output.latents) and torch.equal(inputs[0][:, 1:], omni.expand(5, 3, 32))


def test_stage_one_minimises_the_cross_entropy_of_the_reconstruction(model, tmp_path):
    vae, rows = model.vae.train(), Rows()
    trainer = TokComVAETrainer(vae, TokComVAETrainingArguments(**arguments(tmp_path)), train_dataset=rows)
    ids = rows.ids[:8]
    loss = trainer.compute_loss(vae, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    logits = vae(ids.view(-1, 4)).logits
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


# ------------------------------------------------------------------------------------------------------ diffusion model
def test_the_denoiser_is_adaln_zero_conditioned_on_the_time_step():
    torch.manual_seed(0)
    denoiser = DenoisedModel(DenoisedModelConfig(latent_size=32, **SHAPE)).eval()
    x, early, late = torch.randn(2, 4, 32), torch.full((2,), 0.1), torch.full((2,), 0.9)
    maps = [module for name, module in denoiser.named_modules() if name.endswith("scale_shift_mlp.1")]
    # One for the attention and one for the MLP of each layer; at zero they leave the time out.
    assert len(maps) == 2 * 2 and all(not part.weight.any() and not part.bias.any() for part in maps)
    with torch.no_grad():
        assert torch.equal(denoiser(x, early).clean_latents, denoiser(x, late).clean_latents)
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        assert not torch.allclose(denoiser(x, early).clean_latents, denoiser(x, late).clean_latents, atol=1e-3)


def test_the_denoiser_predicts_the_clean_latents_from_the_noisy_ones(model):
    ids = torch.arange(16).view(1, 16)
    noise, t = torch.randn(1, 1, 4, 32) * 0.05, torch.full((1, 1), 0.3)
    clean = model.encode(ids).view(1, 1, 4, 32)
    seen: list[torch.Tensor] = []
    handle = model.denoiser.register_forward_pre_hook(lambda own, given: seen.append(given[0]))
    output = model(ids, noise=noise, timesteps=t)
    handle.remove()
    # x_t = (1 − t) · x0 + t · x1
    torch.testing.assert_close(seen[0].view(1, 1, 4, 32), 0.7 * noise + 0.3 * clean)
    torch.testing.assert_close(output.mse_loss, (output.clean_latents - clean).square().mean())


# --------------------------------------------------------------------------------------------------------- second stage
def test_stage_two_minimises_the_cross_entropy_through_the_frozen_decoder(model):
    ids = torch.arange(32).view(2, 16)
    output = model(ids, noise=torch.randn(2, 1, 4, 32) * 0.05, timesteps=torch.tensor([[0.2], [0.8]]))
    logits = model.vae.lm_head(model.vae.decode_hidden(output.clean_latents.reshape(-1, 32)))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(output.cross_entropy_loss, expected)
    # Nothing else enters the loss; the squared error is only logged.
    assert torch.equal(output.loss, output.cross_entropy_loss) and output.mse_loss > 0


def test_stage_two_trains_the_denoiser_and_freezes_the_vae(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = encode_rows(model.vae, Rows(), tmp_path / "latents.npy")
    settings = DenoiserTrainingArguments(**arguments(tmp_path))
    trainer = DenoiserTrainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("denoiser.") for name in changed)
    assert not any(value.requires_grad for value in model.vae.parameters())
    for name in ("diffusion/batch_ce_loss", "diffusion/batch_mse_loss"):
        assert sum(name in line for line in trainer.state.log_history) == 8


def test_noise_and_times_of_training_are_drawn_as_documented(model, tmp_path, monkeypatch):
    drawn: dict[str, list[torch.Tensor]] = {"noise": [], "timesteps": []}
    forward = TokComModel.forward

    def recorded(self, *given, **more):
        for name, values in drawn.items():
            values.append(more[name].flatten())
        return forward(self, *given, **more)

    monkeypatch.setattr(TokComModel, "forward", recorded)
    settings = DenoiserTrainingArguments(**arguments(tmp_path, max_steps=40, per_device_train_batch_size=64))
    DenoiserTrainer(model=model, args=settings, train_dataset=Rows()).train()
    noise, times = torch.cat(drawn["noise"]), torch.cat(drawn["timesteps"])
    # N(0, 0.05²): mean, deviation and share within one deviation.
    assert abs(noise.mean()) < 1e-3 and noise.std().item() == pytest.approx(0.05, rel=0.01)
    assert (noise.abs() < 0.05).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    # U[0, 1]: one time for a row, and the distance of its distribution from the diagonal.
    assert len(times) == 40 * 64 and 0 < times.min() < 0.01 and 0.99 < times.max() < 1
    places = (torch.arange(len(times)) + 0.5) / len(times)
    assert (times.sort().values - places).abs().max() < 1.63 / len(times) ** 0.5
