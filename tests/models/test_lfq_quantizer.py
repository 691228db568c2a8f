"""LFQQuantizer: bits, straight-through gradients, positions, entropies, loading."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tokcom_hf import LFQConfig, LFQQuantizer
from tokcom_hf.models import modeling_lfq_quantizer
from tokcom_hf.models.modeling_lfq_quantizer import rotary_2d
from tokcom_hf.models.shared_bit_entropy import factorised_entropy

SHAPE = {
    "input_size": 24, "llm_hidden_size": 20, "num_tokens": 9, "output_dim": 6,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def quantizer(**changes) -> LFQQuantizer:
    """Random weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = LFQQuantizer(LFQConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


def features(batch=2, length=9, width=24, seed=1) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def dense_entropies(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From the table of all 2^d probabilities, as the definitions say."""
    places = torch.arange(logits.shape[1])
    patterns = ((torch.arange(2 ** logits.shape[1])[:, None] >> places) & 1).to(logits.dtype)
    log_p = torch.nn.functional.logsigmoid(logits) @ patterns.t()
    log_p = log_p + torch.nn.functional.logsigmoid(-logits) @ (1 - patterns).t()
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(1).mean(), -(mean * mean.log()).sum()


# ---------------------------------------------------------------------------------------------- configuration
def test_defaults_are_the_documented_numbers():
    config = LFQConfig()
    assert (config.input_size, config.num_tokens, config.output_dim, config.codebook_size) == (4096, 256, 16, 65536)
    assert (config.variant, config.hidden_size, config.num_hidden_layers) == ("transformer", 1024, 16)
    assert (config.num_attention_heads, config.qk_norm, config.group_norm) == (16, True, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dim": 0}, "output_dim must be 1 to 24"),
        ({"output_dim": -3}, "got -3"),
        ({"output_dim": 25}, "output_dim must be 1 to 24"),
        ({"variant": "conv"}, "transformer or linear, got 'conv'"),
        ({"hidden_size": 36}, "multiple of 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_tokens": 10}, "square number"),
    ],
)
def test_bad_configurations_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        LFQConfig(**SHAPE | changes)


def test_wrong_inputs_say_what_is_wrong():
    model = quantizer()
    with pytest.raises(ValueError, match=r"input_size=24\), got shape \(2, 9, 23\)"):
        model(features(width=23))
    with pytest.raises(ValueError, match="num_tokens=9 features per image, got 16"):
        model(features(length=16))
    with pytest.raises(ValueError, match=r"grid \(2, 4\) holds 8 features, got 9"):
        model(features(), grid=(2, 4))
    with pytest.raises(ValueError, match="no square grid"):
        quantizer(num_tokens=None)(features(length=10))
    with pytest.raises(ValueError, match=r"output_dim=6 bits, got shape \(2, 5\)"):
        model.decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 9, 20\), got \(2, 9, 24\)"):
        model(features(), targets=features())


# ---------------------------------------------------------------------------------------------- codes
def test_golden_codes_and_embeddings_of_the_linear_variant(monkeypatch):
    """LayerNorm makes (1, 3) to (-1, 1) and (4, 0) to (1, -1); the rest is worked out by hand."""
    monkeypatch.setattr(modeling_lfq_quantizer, "NORM_EPS", 1e-12)
    changes = {"variant": "linear", "input_size": 2, "llm_hidden_size": 2, "output_dim": 2, "num_tokens": None}
    model = quantizer(**changes, group_norm=False)
    with torch.no_grad():
        model.to_bits.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        model.to_bits.bias.copy_(torch.tensor([0.0, 1.0]))
        for layer in (model.from_bits[0], model.from_bits[2]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    out = model(torch.tensor([[[1.0, 3.0], [4.0, 0.0]]]))
    assert torch.allclose(out.logits, torch.tensor([[[-1.0, 3.0], [1.0, -1.0]]]), atol=1e-5)
    assert out.codes.tolist() == [[[0, 1], [1, 0]]] and out.codes.dtype == torch.int64
    gelu = lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
    expected = torch.tensor([[[gelu(-1), gelu(1)], [gelu(1), gelu(-1)]]])
    assert torch.allclose(out.embeddings, expected, atol=1e-6)
    # The targets are the features: squared errors over the mean square 26 / 4.
    errors = [gelu(-1) - 1, gelu(1) - 3, gelu(1) - 4, gelu(-1)]
    assert out.reconstruction_loss.item() == pytest.approx(sum(e * e for e in errors) / 26, rel=1e-5)
    p = [[1 / (1 + math.exp(-x / 0.25)) for x in row] for row in ([-1, 3], [1, -1])]
    binary = lambda q: -q * math.log(q) - (1 - q) * math.log1p(-q)  # noqa: E731
    per_sample = sum(binary(q) for row in p for q in row) / 2
    mean = [
        sum((row[0] if a else 1 - row[0]) * (row[1] if b else 1 - row[1]) for row in p) / 2
        for a in (0, 1)
        for b in (0, 1)
    ]
    batch = -sum(q * math.log(q) for q in mean)
    assert out.sample_entropy.item() == pytest.approx(per_sample, rel=1e-4)
    assert out.batch_entropy.item() == pytest.approx(batch, rel=1e-4)
    assert out.entropy_loss.item() == pytest.approx((per_sample - batch) / (2 * math.log(2)), rel=1e-4)
    assert out.loss.item() == pytest.approx(out.reconstruction_loss.item() + 0.1 * out.entropy_loss.item())


@pytest.mark.parametrize("variant", ["transformer", "linear"])
def test_embeddings_are_a_function_of_the_code_alone(variant):
    """What a language model draws decodes exactly like what was read off an image, in training mode too."""
    model = quantizer(variant=variant).train()
    out = model(features())
    assert torch.equal(out.embeddings, model.decode(out.codes))
    assert torch.equal(model.decode(2 * out.codes - 1), model.decode(out.codes.bool()))
    assert torch.equal(model.encode(features()), out.codes)
    assert torch.equal(out.codes, (out.logits.sigmoid() > 0.5).long())
    assert 0 < out.codes.float().mean() < 1


def test_group_norm_centres_the_bits_of_each_image():
    logits = quantizer().bit_logits(features() * 7 + 3)
    assert torch.allclose(logits.mean((1, 2)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(logits.square().mean((1, 2)), torch.ones(2), atol=1e-3)
    assert quantizer(group_norm=False).bit_logits(features()).mean().abs() > 1e-3


def test_matched_embeddings_resemble_the_features_of_any_scale():
    """Freshly drawn weights explain nothing of the features; regression on the codes explains some, without bias."""
    seen = 300 * features(50) * torch.linspace(0.1, 2, 24) + torch.arange(24)
    model = quantizer(llm_hidden_size=24)
    fresh = model(seen).reconstruction_loss
    model.match_features(seen)
    out = model(seen)
    assert fresh > 0.99 and out.reconstruction_loss < 0.9
    residual = (out.embeddings - seen).flatten(0, 1)
    assert (residual.mean(0).abs() < 1e-3 * seen.std()).all()
    with pytest.raises(ValueError, match=r"input_size=24\), got shape \(2, 9, 23\)"):
        model.match_features(features(width=23))


def test_matched_first_layers_see_faint_directions_too():
    """Whitening with a floor of 0.3 of the mean variance: a variance v becomes v / (v + floor)."""
    model = quantizer(variant="linear", input_size=6, output_dim=6, group_norm=False)
    with torch.no_grad():
        model.to_bits.weight.copy_(torch.eye(6))
        model.to_bits.bias.zero_()
    seen = features(300, 9, 6) * torch.tensor([1.0, 1, 1, 1, 0.3, 0.1]) + 2
    normed = model.input_norm(seen).flatten(0, 1)
    spread = torch.linalg.eigvalsh(normed.t().cov())
    assert spread[1] < 0.1 * spread[-1]  # LayerNorm takes one direction away; another is faint
    model.match_features(seen)
    logits = model.bit_logits(seen).flatten(0, 1)
    assert torch.allclose(logits.mean(0), torch.zeros(6), atol=1e-4)
    after = torch.linalg.eigvalsh(logits.t().cov())
    assert torch.allclose(after, spread / (spread + 0.3 * spread.mean()), atol=1e-3)
    assert after[0] < 1e-3 and after[1] / after[-1] > 3 * spread[1] / spread[-1]


def test_images_do_not_see_each_other():
    model = quantizer()
    both = features()
    assert torch.allclose(model(both).logits[:1], model(both[:1]).logits, atol=1e-5)


# ---------------------------------------------------------------------------------------------- gradients
def test_the_straight_through_gradient_is_that_of_the_sigmoid():
    model = quantizer()
    out = model(features())
    weights = torch.randn(out.embeddings.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((out.embeddings * weights).sum(), out.logits)
    bits = out.codes.float().requires_grad_()
    (through_bits,) = torch.autograd.grad((model._embed(bits) * weights).sum(), bits)
    p = out.logits.detach().sigmoid()
    assert torch.allclose(gradient, through_bits * p * (1 - p), atol=1e-5)


@pytest.mark.parametrize("loss", ["embeddings", "entropy_loss", "reconstruction_loss"])
def test_every_loss_reaches_the_first_layer(loss):
    model = quantizer(llm_hidden_size=24).train()
    model(features())[loss].square().sum().backward()
    assert model.input_proj.weight.grad.abs().max() > 0 and model.input_norm.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = quantizer(llm_hidden_size=24).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(features().requires_grad_()).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_bf16_autocast_keeps_losses_in_float32():
    model = quantizer(llm_hidden_size=24).train()
    plain = model(features())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(features())
    assert out.logits.dtype == out.entropy_loss.dtype == out.reconstruction_loss.dtype == torch.float32
    assert out.entropy_loss.item() == pytest.approx(plain.entropy_loss.item(), abs=0.02)
    sure = plain.logits.abs() > 0.1
    assert torch.equal(out.codes[sure], plain.codes[sure]) and sure.float().mean() > 0.8
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- attention
def test_rotary_positions_see_offsets_of_rows_and_columns():
    """The score of two features is a function of their offset, and not of rows or columns alone."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_2d((4, 5), 16, 100.0, "cpu", torch.float32)
    turned = [apply_rotary_pos_emb(x.expand(1, 1, 20, 16), x.expand(1, 1, 20, 16), cos, sin)[0] for x in (query, key)]
    score = (turned[0][0, 0] @ turned[1][0, 0].t()).view(4, 5, 4, 5)
    assert score[1, 1, 2, 3] == pytest.approx(score[0, 2, 1, 4].item(), abs=1e-5)
    assert abs(score[1, 1, 2, 3] - score[1, 1, 3, 2]) > 1e-3
    assert abs(score[1, 1, 2, 3] - score[1, 1, 2, 2]) > 1e-3
    assert abs(score[1, 1, 2, 3] - score[1, 1, 1, 3]) > 1e-3


def test_the_grid_matters_and_any_number_of_tokens_works_where_none_is_set():
    model = quantizer(num_tokens=None)
    six = features(length=6)
    assert not torch.allclose(model(six, grid=(2, 3)).logits, model(six, grid=(3, 2)).logits, atol=1e-3)
    assert model(features(length=25)).embeddings.shape == (2, 25, 20)
    assert quantizer(variant="linear", num_tokens=None)(features(length=7)).codes.shape == (2, 7, 6)


def test_query_key_norm_makes_attention_blind_to_their_scale():
    results = []
    for factor in (1.0, 50.0):
        model = quantizer()
        with torch.no_grad():
            for block in model.blocks:
                block.attention.qkv_proj.weight[: 2 * 32] *= factor
                block.attention.qkv_proj.bias.zero_()
        results.append(model(features()).logits)
    assert torch.allclose(*results, atol=1e-3)


def test_sdpa_and_eager_attention_agree():
    model = quantizer()
    sdpa = model(features()).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(features()).logits, sdpa, atol=1e-5)


# ---------------------------------------------------------------------------------------------- entropies
@pytest.mark.parametrize("width", [1, 2, 5, 9, 14])
def test_entropies_equal_the_dense_table_in_float64(width):
    logits = 4 * torch.randn(40, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    logits[0] = 60.0  # a sure code: 0 · log 0 is 0
    exact, dense = (x.clone().requires_grad_() for x in (logits, logits))
    values, expected = factorised_entropy(exact), dense_entropies(dense)
    for value, truth in zip(values, expected, strict=True):
        assert value.dtype == torch.float64 and abs(value - truth) < 1e-10
    (values[0] - 2 * values[1]).backward()
    (expected[0] - 2 * expected[1]).backward()
    assert (exact.grad - dense.grad).abs().max() < 1e-10


def test_entropies_of_known_distributions():
    per_sample, batch = factorised_entropy(torch.zeros(3, 4, dtype=torch.float64))
    assert per_sample == pytest.approx(4 * math.log(2)) and batch == pytest.approx(4 * math.log(2))
    # Two sure and different codes: no doubt about a sample, one bit of entropy in the batch.
    per_sample, batch = factorised_entropy(torch.tensor([[200.0, -200.0, 200.0], [-200.0, -200.0, 200.0]]))
    assert per_sample == 0 and batch == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match=r"\(samples, bits\), got \(3,\)"):
        factorised_entropy(torch.zeros(3))


def test_eighteen_bits_work_in_training():
    """The mean of equal samples is their product, whose entropy is the sum over bits."""
    logits = torch.randn(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(5, 18)
    per_sample, batch = factorised_entropy(logits)
    p = logits[0].sigmoid()
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).sum().item()
    assert per_sample == pytest.approx(expected, abs=1e-10) and batch == pytest.approx(expected, abs=1e-10)
    model = quantizer(output_dim=18).train()
    out = model(features())
    (out.entropy_loss + out.embeddings.sum()).backward()
    assert out.codes.shape == (2, 9, 18) and torch.isfinite(model.input_proj.weight.grad).all()


# ---------------------------------------------------------------------------------------------- saving and loading
def test_auto_classes_load_what_was_saved(tmp_path):
    model = quantizer()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LFQConfig)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, LFQQuantizer) and torch.equal(again(features()).embeddings, model(features()).embeddings)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(features())
    assert half.embeddings.dtype == torch.bfloat16 and half.logits.dtype == torch.float32
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_loads_in_a_fresh_process_without_the_package(tmp_path):
    model = quantizer()
    model.save_pretrained(tmp_path)
    script = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "tokcom_hf":
            raise ImportError("not installed")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
assert "tokcom_hf" not in sys.modules
out = model(torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)))
assert torch.equal(model.decode(out.codes), out.embeddings)
print(out.codes.flatten().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(model.encode(features()).flatten().tolist())


# ---------------------------------------------------------------------------------------------- arguments and files
@pytest.mark.parametrize("variant", ["transformer", "linear"])
def test_arguments_act_or_are_refused(variant):
    model = quantizer(variant=variant)
    plain = model(features())
    assert plain.hidden_states is None
    values = model(features(), return_dict=False)
    assert (
        isinstance(values, tuple) and torch.equal(values[0], plain.loss) and torch.equal(values[1], plain.embeddings)
    )
    states = model(features(), output_hidden_states=True).hidden_states
    assert [state.shape[:2] for state in states] == [(2, 9)] * (3 if variant == "transformer" else 1)
    if variant == "transformer":
        torch.testing.assert_close(model.to_bits(model.output_norm(states[-1])).float(), _before_norm(model))
    with pytest.raises(ValueError, match="keeps no attentions"):
        model(features(), output_attentions=True)
    with pytest.raises(TypeError, match="target"):
        model(features(), target=features())


def _before_norm(model):
    """Logits as they are before the group norm over all features of an image."""
    model.config.group_norm = False
    return model.bit_logits(features())


def test_foreign_and_broken_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    quantizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    weight = good["to_bits.weight"]
    broken = weight.clone()
    broken[0, 0] = float("nan")
    for changes, message in (
        ({"to_bits.weight": broken}, r"to_bits\.weight are NaN"),
        ({"to_bits.weight": weight.to(torch.int8)}, r"to_bits\.weight is stored as torch\.int8"),
        ({"base.extra": torch.zeros(1)}, r"base\.extra"),
    ):
        save_file(good | changes, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            LFQQuantizer.from_pretrained(tmp_path)
    save_file({key: value for key, value in good.items() if key != "to_bits.bias"}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensor.*to_bits\.bias"):
        LFQQuantizer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="dtpye"):
        LFQQuantizer.from_pretrained(tmp_path, dtpye=torch.float16)


def test_losses_can_be_left_out():
    model = quantizer()
    whole, bare = model(features()), model(features(), return_loss=False)
    assert torch.equal(whole.embeddings, bare.embeddings) and torch.equal(whole.codes, bare.codes)
    assert whole.loss is not None and set(bare) == set(whole) - {
        "loss", "entropy_loss", "reconstruction_loss", "sample_entropy", "batch_entropy"
    }  # fmt: skip
