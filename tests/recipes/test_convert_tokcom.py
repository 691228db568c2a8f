"""recipes/convert_tokcom_checkpoint.py against an independent plain-PyTorch TokCom that writes the documented files."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

import tokcom_hf
from tokcom_hf.tokcom_checkpoint import checkpoint_settings, convert_checkpoint, read_checkpoint

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "convert_tokcom_checkpoint.py"
ARGUMENTS = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 61, "omni_token_id": 60,
}  # fmt: skip


# ---------------------------------------------------------------- the documented architecture, written from its description
class ReferenceRope(nn.Module):
    def __init__(self, dim: int, theta: float, positions: int = 64):
        super().__init__()
        inv_freq = torch.tensor([1.0 / theta ** (2 * i / dim) for i in range(dim // 2)])
        table = torch.outer(torch.arange(positions).float(), inv_freq).repeat(1, 2)
        self.register_buffer("inv_freq", inv_freq)
        self.register_buffer("cos_cached", table.cos())
        self.register_buffer("sin_cached", table.sin())

    def forward(self, x):
        length, half = x.shape[-2], x.shape[-1] // 2
        left, right = x[..., :half], x[..., half:]
        turned = torch.cat((-right, left), -1)
        return x * self.cos_cached[:length] + turned * self.sin_cached[:length]


class ReferenceAttention(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.heads, self.groups = a["num_attention_heads"], a["num_key_value_heads"]
        self.dim = a["hidden_size"] // self.heads
        self.q_proj = nn.Linear(a["hidden_size"], self.heads * self.dim)
        self.k_proj = nn.Linear(a["hidden_size"], self.groups * self.dim)
        self.v_proj = nn.Linear(a["hidden_size"], self.groups * self.dim)
        self.o_proj = nn.Linear(self.heads * self.dim, a["hidden_size"], bias=False)
        self.rope = ReferenceRope(self.dim, a["rope_theta"])

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.rope(self.q_proj(x).reshape(batch, length, self.heads, self.dim).permute(0, 2, 1, 3))
        k = self.rope(self.k_proj(x).reshape(batch, length, self.groups, self.dim).permute(0, 2, 1, 3))
        v = self.v_proj(x).reshape(batch, length, self.groups, self.dim).permute(0, 2, 1, 3)
        shared = self.heads // self.groups
        out = []
        for head in range(self.heads):
            key, value = k[:, head // shared], v[:, head // shared]
            weights = torch.softmax(torch.einsum("bqd,bkd->bqk", q[:, head], key) / math.sqrt(self.dim), -1)
            out.append(torch.einsum("bqk,bkd->bqd", weights, value))
        return self.o_proj(torch.cat(out, -1))


class ReferenceMLP(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.gate_proj = nn.Linear(a["hidden_size"], a["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(a["hidden_size"], a["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(a["intermediate_size"], a["hidden_size"], bias=False)

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class ReferenceNorm(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(a["hidden_size"])), a["rms_norm_eps"]

    def forward(self, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class ReferenceLayer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.self_attn, self.mlp = ReferenceAttention(a), ReferenceMLP(a)
        self.input_layernorm, self.post_attention_layernorm = ReferenceNorm(a), ReferenceNorm(a)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class ReferenceStack(nn.Module):
    def __init__(self, a, embedding, head: bool):
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(ReferenceLayer(a) for _ in range(a["num_hidden_layers"]))
        self.norm = ReferenceNorm(a)
        if head:
            self.lm_head = nn.Linear(a["hidden_size"], a["vocab_size"], bias=False)
            self.lm_head.weight = embedding.weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ReferenceVAE(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.omni = a["omni_token_id"]
        self.embed_tokens = nn.Embedding(a["vocab_size"], a["hidden_size"])
        self.encoder = ReferenceStack(a, self.embed_tokens, head=False)
        self.decoder = ReferenceStack(a, self.embed_tokens, head=True)

    def encode(self, chunks):
        return self.encoder(self.embed_tokens(chunks))[:, -1]

    def forward(self, chunks):
        z = self.encode(chunks)
        omni = self.embed_tokens(torch.full((len(chunks), chunks.shape[1] - 1), self.omni))
        return self.decoder.lm_head(self.decoder(torch.cat([z[:, None], omni], 1)))


class ReferenceAdaLN(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.norm = ReferenceNorm(a)
        self.scale_shift_mlp = nn.Sequential(nn.SiLU(), nn.Linear(a["hidden_size"], 2 * a["hidden_size"]))

    def forward(self, x, time):
        scale, shift = self.scale_shift_mlp(time)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class ReferenceDenoiserLayer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.self_attn, self.mlp = ReferenceAttention(a), ReferenceMLP(a)
        self.adaln_attn, self.adaln_mlp = ReferenceAdaLN(a), ReferenceAdaLN(a)

    def forward(self, x, time):
        x = x + self.self_attn(self.adaln_attn(x, time))
        return x + self.mlp(self.adaln_mlp(x, time))


class ReferenceDenoiser(nn.Module):
    def __init__(self, a):
        super().__init__()
        size = self.size = a["hidden_size"]
        self.time_mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))
        self.layers = nn.ModuleList(ReferenceDenoiserLayer(a) for _ in range(a["num_hidden_layers"]))
        self.norm, self.output_proj = ReferenceNorm(a), nn.Linear(size, size)

    def forward(self, x, t):
        half = self.size // 2
        angles = t[:, None] * torch.tensor([10000.0 ** (-i / half) for i in range(half)])
        time = self.time_mlp(torch.cat([angles.cos(), angles.sin()], -1))
        for layer in self.layers:
            x = layer(x, time)
        return self.output_proj(self.norm(x))


# ---------------------------------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="module")
def reference() -> tuple[ReferenceVAE, ReferenceDenoiser]:
    torch.manual_seed(0)
    vae, denoiser = ReferenceVAE(ARGUMENTS), ReferenceDenoiser(ARGUMENTS)
    for parameter in (*vae.parameters(), *denoiser.parameters()):
        # Every weight away from its default, norms included, or a swapped or forgotten one would not show.
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.15)
    return vae.eval(), denoiser.eval()


def contents(reference, **changes) -> dict:
    vae, denoiser = reference
    return {
        "epoch": 3, "stage": "diffusion", "val_loss": 1.5, "model_args": dict(ARGUMENTS),
        "config": {"chunk_size": 4, "noise_std": 0.07, "max_length": 64},
        "vae_model_state_dict": vae.state_dict(), "denoised_model_state_dict": denoiser.state_dict(),
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best_diffusion.pt"
    torch.save(contents(reference), path)
    return path


def convert(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


# ------------------------------------------------------------------------------------------------------------------- tests
def test_the_reference_writes_the_documented_keys(reference):
    vae, denoiser = (set(part.state_dict()) for part in reference)
    for key in ("embed_tokens.weight", "encoder.embed_tokens.weight", "encoder.layers.0.self_attn.q_proj.bias",
                "encoder.layers.2.self_attn.rope.cos_cached", "encoder.norm.weight", "decoder.lm_head.weight",
                "decoder.layers.1.post_attention_layernorm.weight"):  # fmt: skip
        assert key in vae, key
    for key in ("time_mlp.0.weight", "time_mlp.2.bias", "layers.0.adaln_attn.norm.weight", "output_proj.bias",
                "layers.0.adaln_mlp.scale_shift_mlp.1.bias", "norm.weight", "layers.2.self_attn.rope.inv_freq"):  # fmt: skip
        assert key in denoiser, key
    assert "encoder.layers.0.self_attn.o_proj.bias" not in vae


@pytest.mark.slow
@torch.no_grad()
def test_the_converted_folder_gives_the_numbers_of_the_original(checkpoint, reference, tmp_path):
    out = tmp_path / "converted"
    result = convert(checkpoint, out, "--parts", "true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "epoch 3" in result.stdout and "validation loss 1.5" in result.stdout
    vae, denoiser = reference
    model = AutoModel.from_pretrained(out)
    assert isinstance(model, tokcom_hf.TokComModel)
    assert (model.config.noise_std, model.config.max_chunks) == (0.07, 16)
    chunks = torch.randint(0, 60, (9, 4), generator=torch.Generator().manual_seed(1))
    x, t = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(2)), torch.tensor([0.01, 0.4, 0.99])
    for part in (model.vae, AutoModel.from_pretrained(out / "vae")):
        torch.testing.assert_close(part(chunks).logits, vae(chunks), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.encode(chunks.view(1, -1))[0], vae.encode(chunks), atol=1e-5, rtol=1e-5)
    for part in (model.denoiser, AutoModel.from_pretrained(out / "denoiser")):
        torch.testing.assert_close(part(x, t).clean_latents, denoiser(x, t), atol=1e-5, rtol=1e-5)
    assert model.vae.lm_head.weight is model.vae.embed_tokens.weight
    card = (out / "README.md").read_text()
    assert "best_diffusion.pt" in card and f"{sum(p.numel() for p in vae.parameters()):,}" in card

    kept = out / "notes.txt"
    kept.write_text("mine")
    refused = convert(checkpoint, out)
    assert refused.returncode == 2 and "is not empty" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert convert(checkpoint, out, "--overwrite", "true").returncode == 0
    assert kept.read_text() == "mine" and not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_a_converted_model_generates_as_documented(reference):
    """50 Euler steps of one block from noise of deviation 0.07; a prompt's latents are put back before every step."""
    vae, denoiser = reference
    model = convert_checkpoint(contents(reference))
    prompt = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    known = vae.encode(prompt.view(-1, 4)).view(2, 2, 48)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4)) * 0.07
    for step in range(50):
        t = torch.full((2,), step / 50)
        clean = denoiser(torch.cat([known, x], dim=1), t)[:, 2:]
        x = x + (clean - x) / (1 - t[0]) / 50
    omni = vae.embed_tokens(torch.full((10, 3), 60))
    logits = vae.decoder.lm_head(vae.decoder(torch.cat([x.reshape(10, 1, 48), omni], dim=1)))
    ids = logits[..., :60].argmax(-1).view(2, 20)
    written = model.generate(prompt, num_generate_chunks=5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(written, torch.cat([prompt, ids], dim=1)) and len(ids.unique()) > 3
    assert model.config.context is None and model.config.eos_token_id is None


@torch.no_grad()
def test_a_stage_one_file_becomes_a_vae_and_vocab_size_may_leave_out_the_omni_token(reference):
    arguments = ARGUMENTS | {"vocab_size": 60}
    model = convert_checkpoint(contents(reference, model_args=arguments, denoised_model_state_dict=None))
    assert type(model).__name__ == "TokComVAE" and model.config.vocab_size == 61
    chunks = torch.arange(8).view(2, 4)
    torch.testing.assert_close(model(chunks).logits, reference[0](chunks), atol=1e-5, rtol=1e-5)


PRINTED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "omni_token_id",
)  # fmt: skip


@torch.no_grad()
def test_model_args_with_exactly_the_printed_keys_are_enough(reference, caplog):
    arguments = {key: ARGUMENTS[key] for key in PRINTED}
    model = convert_checkpoint(contents(reference, model_args=arguments))
    assert (model.config.vae.rms_norm_eps, model.config.denoiser.rope_theta) == (1e-6, 1e6) and not caplog.records
    chunks = torch.arange(8).view(2, 4)
    torch.testing.assert_close(model.vae(chunks).logits, reference[0](chunks), atol=1e-5, rtol=1e-5)
    # The document leaves room for more keys; what they say is not silently lost.
    convert_checkpoint(contents(reference, model_args=arguments | {"chunk_size": 4, "dropout": 0.1, "bias": True}))
    assert [record.getMessage() for record in caplog.records] == ["model_args that are ignored: bias, dropout."]
    for key in PRINTED:
        fewer = {name: value for name, value in arguments.items() if name != key}
        with pytest.raises(ValueError, match=f"model_args lack {key}"):
            convert_checkpoint(contents(reference, model_args=fewer))


def test_a_config_without_keys_has_the_documented_values(reference):
    settings = checkpoint_settings(contents(reference, config=None))
    assert settings == {
        "tokenizer_path": "meta-llama/CodeLlama-7b-hf", "max_length": 1024, "chunk_size": 4, "noise_std": 0.05,
    }  # fmt: skip
    model = convert_checkpoint(contents(reference, config={}))
    assert (model.config.noise_std, model.config.max_chunks, model.config.num_steps) == (0.05, 256, 50)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_model_lose_their_prefix(reference, prefix):
    states = {
        name: {prefix + key: value for key, value in part.state_dict().items()}
        for name, part in zip(("vae_model_state_dict", "denoised_model_state_dict"), reference)
    }
    model = convert_checkpoint(contents(reference, **states))
    chunks, x, t = torch.arange(8).view(2, 4), torch.ones(1, 3, 48), torch.tensor([0.4])
    torch.testing.assert_close(model.vae(chunks).logits, reference[0](chunks), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.denoiser(x, t).clean_latents, reference[1](x, t), atol=1e-5, rtol=1e-5)
    states["vae_model_state_dict"]["embed_tokens.weight"] = torch.zeros(61, 48)
    with pytest.raises(ValueError, match=r"'embed_tokens\.weight' twice, under different prefixes"):
        convert_checkpoint(contents(reference, **states))


def changed(reference, part: int, **weights) -> dict:
    return reference[part].state_dict() | {name.replace("__", "."): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"vae_model_state_dict": changed(r, 0, surprise=torch.zeros(1))}, "has the unknown surprise"),
        (lambda r: {"vae_model_state_dict": changed(r, 0, norm__bias=torch.zeros(1))}, "has the unknown norm.bias"),
        (lambda r: {"denoised_model_state_dict": {"norm.weight": torch.ones(48)}}, "denoised_model_state_dict lacks"),
        (lambda r: {"denoised_model_state_dict": changed(r, 1, norm__weight=torch.ones(3))}, r"has shape \(3,\)"),
        (lambda r: {"vae_model_state_dict": changed(r, 0, decoder__lm_head__weight=torch.zeros(61, 48))}, "differs from"),
        (lambda r: {"model_args": ARGUMENTS | {"rope_theta": 1e4}}, "not the rotary table of rope_theta=10000"),
        (lambda r: {"model_args": ARGUMENTS | {"vocab_size": 50}}, "has 61 rows"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(reference, change, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(contents(reference, **change(reference)))


class Foreign:
    """Anything that needs code to unpickle."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, good: None, "does not exist"),
        (lambda path, good: path.write_bytes(good[: len(good) // 2]), "truncated or no PyTorch checkpoint"),
        (lambda path, good: path.write_bytes(b""), "truncated or no PyTorch checkpoint"),
        (lambda path, good: path.write_text("not a checkpoint"), "no PyTorch checkpoint"),
        (lambda path, good: torch.save({"model_args": Foreign()}, path), "only tensors, numbers and text"),
        (lambda path, good: torch.save({"state_dict": {}}, path), "lacks model_args and vae_model_state_dict"),
        (lambda path, good: torch.save([1, 2], path), "it has list"),
        (
            lambda path, good: torch.save({"model_args": {"hidden_size": 3}, "vae_model_state_dict": {}}, path),
            "model_args lack num_hidden_layers",
        ),
    ],
)
def test_truncated_and_foreign_files_are_refused(checkpoint, tmp_path, write, message):
    path = tmp_path / "best_diffusion.pt"
    write(path, checkpoint.read_bytes())
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_recipe_says_one_sentence_and_writes_nothing(checkpoint, tmp_path):
    truncated = tmp_path / "cut.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:5000])
    for arguments, message in (
        ((truncated, tmp_path / "out"), "truncated"),
        ((truncated,), "Name the checkpoint and"),
    ):
        result = convert(*arguments)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt"]
