"""The documented formulas of merger and pruner by hand, documented constructors, debugging snippets, token numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tests.helpers.pruned_vlm_tools import batch, tiny_vlm
from tokcom_hf import (
    LayerPruner,
    LayerPrunerConfig,
    LayerSpecificPruner,
    LearnableTokenMerger,
    PrunedVLM,
    PruningDiscriminator,
    PruningDiscriminatorConfig,
    TokenMerger,
    TokenMergerConfig,
)
from tokcom_hf.models.pruning_report import predicted_report


@pytest.fixture
def merger():
    torch.manual_seed(0)
    return LearnableTokenMerger(d_model=16, merge_ratio=0.5, internal_size=8).eval()


def sharpened(merger):
    """With weights large enough that tokens differ."""
    with torch.no_grad():
        for parameter in merger.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5)
    return merger


# ---------------------------------------------------------------------- the merger
def test_documented_merge_is_the_formula(merger):
    sharpened(merger)
    vision = torch.randn(2, 12, 16)
    result = merger(vision, use_gumbel=False, temperature=0.5)
    importance = merger.scorer(vision).squeeze(-1)
    top = importance.topk(6).indices.sort(-1).values
    assert torch.equal(result.keep_index, top)
    centres = vision.gather(1, top[..., None].expand(-1, -1, 16))
    similarity = merger.q_proj(vision) @ merger.k_proj(centres).transpose(1, 2) / 8**0.5
    weights = (similarity / 0.5).softmax(-1)
    assert torch.allclose(result.merge_weights, weights, atol=1e-6)
    assert torch.allclose(result["merged_features"], weights.transpose(1, 2) @ vision, atol=1e-5)
    # Un-normalised: what a centre receives adds up to what it received, not to 1; rows sum to 1.
    assert torch.allclose(result.merge_weights.sum(-1), torch.ones(2, 12))
    assert (result.merge_weights.sum(1) - 1).abs().max() > 0.1


def test_temperature_acts_on_the_documented_assignment_only(merger):
    vision = torch.randn(1, 12, 16)
    sharpened(merger)
    sharpest = {t: merger(vision, temperature=t).merge_weights.amax(-1).mean().item() for t in (1.0, 0.1)}
    assert sharpest[0.1] > sharpest[1.0] + 0.2
    torch.manual_seed(0)
    ours = TokenMerger(TokenMergerConfig(feature_size=16, merger_type="simple", internal_size=8)).eval()
    first, second = (ours(vision, temperature=t).merge_weights for t in (1.0, 0.1))
    assert torch.allclose(first, second, atol=1e-6)


def test_gumbel_top_k_draws_as_documented(merger):
    """-log(-log u) added to the logits, at scale 1: P(first) of one of two tokens is the softmax of their logits."""
    vision = torch.zeros(4000, 2, 16)
    with torch.no_grad():
        for layer in merger.scorer:
            if isinstance(layer, nn.Linear):
                layer.weight.fill_(0.1)
        vision[:, 1] = 1.0
    gap = merger.scorer(vision[:1]).squeeze(-1)[0]
    torch.manual_seed(0)
    drawn = merger(vision, use_gumbel=True).keep_index[:, 0].float().mean()
    assert abs((drawn - gap.softmax(-1)[1]).item()) < 0.03
    assert (merger(vision, use_gumbel=False).keep_index == 1).all()


def test_merge_sparsity_is_kept_minus_target_squared_and_has_a_gradient(merger):
    vision = torch.randn(3, 12, 16)
    result = merger(vision)
    kept = result.scores.sigmoid().sum(-1)
    assert torch.allclose(result.kept_tokens, kept)
    assert torch.allclose(result.sparsity_loss, (kept - 6).square().mean())
    with torch.no_grad():
        merger.scorer[-1].bias.fill_(2.0)
    before = merger(vision)
    before.sparsity_loss.backward()
    assert merger.scorer[-1].bias.grad > 0  # more than the target is kept: the logits must fall
    optimizer = torch.optim.SGD(merger.scorer.parameters(), lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        merger(vision).sparsity_loss.backward()
        optimizer.step()
    assert abs(merger(vision).kept_tokens.mean().item() - 6) < 0.2 < abs(before.kept_tokens.mean().item() - 6)


def test_argmax_has_no_gradient_and_our_selection_has(merger):
    """Documented: the gradient of argmax(logits + noise) flows to the logits. It does not; ours flows straight through."""
    logits = torch.randn(5, requires_grad=True)
    assert not (logits + torch.randn(5)).argmax().requires_grad
    sharpened(merger)(torch.randn(1, 12, 16), use_gumbel=True).merged_features.square().sum().backward()
    assert merger.scorer[0].weight.grad.abs().sum() > 0


def test_soft_assignment_while_hot_and_hard_while_cold(merger):
    vision = torch.randn(1, 12, 16)
    hot, cold = (sharpened(merger)(vision, temperature=t).merge_weights for t in (50.0, 1e-4))
    assert (hot - 1 / 6).abs().max() < 0.05
    assert torch.allclose(cold.amax(-1), torch.ones(1, 12), atol=1e-3)


def test_question_aware_merger_reads_the_question():
    torch.manual_seed(0)
    merger = sharpened(
        LearnableTokenMerger(16, 0.5, merger_type="question_aware", question_size=12, internal_size=8)
    ).eval()
    vision = torch.randn(1, 12, 16)
    first, second = (merger(vision, torch.randn(1, 5, 12)).scores for _ in range(2))
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="question_embeddings are needed"):
        merger(vision)


def test_documented_heads_save_and_load(tmp_path, merger):
    merger.save_pretrained(tmp_path / "merger")
    loaded = TokenMerger.from_pretrained(tmp_path / "merger").eval()
    vision = torch.randn(1, 12, 16)
    assert torch.equal(loaded(vision).merged_features, merger(vision, temperature=0.1).merged_features)
    pruner = LayerSpecificPruner(8, [1, 3], d_internal=8).eval()
    pruner.save_pretrained(tmp_path / "pruner")
    hidden, question = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    again = LayerPruner.from_pretrained(tmp_path / "pruner").eval()(1, hidden, question)
    assert torch.equal(again.keep_logits, pruner(1, hidden, question).keep_logits)
    with pytest.raises(ValueError, match="architecture must be"):
        TokenMergerConfig(architecture="other")
    with pytest.raises(ValueError, match="simple or question_aware"):
        TokenMergerConfig(architecture="documented", merger_type="fixed_pooling")
    with pytest.raises(ValueError, match="architecture must be"):
        LayerPrunerConfig(architecture="other")


# ---------------------------------------------------------------------- the pruners
def test_documented_head_is_the_formula():
    torch.manual_seed(0)
    pruner = sharpened(LayerSpecificPruner(d_model=12, layer_indices=[2, 5], d_internal=8, num_heads=2)).eval()
    vision, question = 3 * torch.randn(2, 6, 12), 3 * torch.randn(2, 4, 12)
    head = pruner.heads["5"]
    with torch.no_grad():
        head.score[-1].bias -= pruner(5, vision, question).keep_logits.mean()
    values = head.question_proj(question)
    own = head.attention
    attended, _ = F.multi_head_attention_forward(
        head.vision_proj(vision).transpose(0, 1), values.transpose(0, 1), values.transpose(0, 1), 8, 2,
        torch.cat([own.query.weight, own.key_value.weight]), torch.cat([own.query.bias, own.key_value.bias]),
        None, None, False, 0.0, own.output.weight, own.output.bias,
    )  # fmt: skip
    logits = head.score(attended.transpose(0, 1)).squeeze(-1)
    output = pruner(5, vision, question, temperature=0.5)
    assert torch.allclose(output.keep_logits, logits, atol=1e-6)
    # The softmax of [0, logit] / temperature is a sigmoid; hard mask: above one half.
    both = torch.stack([torch.zeros_like(logits), logits], -1)
    assert torch.allclose(output.soft_mask, (both / 0.5).softmax(-1)[..., 1], atol=1e-6)
    assert 0 < output.keep_mask.sum() < 12 and torch.equal(output.keep_mask, output.soft_mask > 0.5)


def test_documented_mask_is_gumbel_softmax_in_training():
    torch.manual_seed(0)
    pruner = LayerSpecificPruner(d_model=12, layer_indices=[2], d_internal=8).train()
    vision, question = torch.randn(1, 1, 12).expand(1, 4000, 12), torch.randn(1, 3, 12)
    ours = pruner(2, vision, question, temperature=0.7)
    logits = ours.keep_logits.detach()
    theirs = F.gumbel_softmax(torch.stack([torch.zeros_like(logits), logits], -1), tau=0.7)[..., 1]
    for share in (0.1, 0.5, 0.9):
        assert (ours.soft_mask.quantile(share) - theirs.quantile(share)).abs().item() < 0.04


def test_every_layer_has_a_head_of_its_own():
    pruner = LayerSpecificPruner(d_model=8, layer_indices=[10, 20, 31], d_internal=8)
    assert list(pruner.heads) == ["10", "20", "31"] and pruner.config.selection == "threshold"
    first, last = (dict(pruner.heads[name].named_parameters()) for name in ("10", "31"))
    assert all(first[name] is not last[name] for name in first)


def test_scaling_hidden_states_is_not_scaling_scores():
    """The document multiplies hidden states by the mask; RMSNorm takes the factor out again before Q, K and V."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1)
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(1, 10, 32)
    mask = torch.ones(1, 10, 1)
    mask[:, 2:7] = 0.1
    places = torch.arange(10)[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, places)
    with torch.no_grad():
        change = (layer.input_layernorm(hidden * mask) - layer.input_layernorm(hidden)).abs().max()
        scores = [
            layer.self_attn(layer.input_layernorm(states), rotary, attention_mask=None)[1]
            for states in (hidden, hidden * mask)
        ]
    # Documented: scores times 0.1 (text to vision) or 0.01 (vision to vision). Measured: unchanged.
    assert change < 1e-3 and (scores[0] - scores[1]).abs().max() < 1e-3


def test_a_mask_of_zero_is_removal():
    """What stands for the multiplication here: log(mask) on the scores of the masked keys."""
    torch.manual_seed(0)
    pruner = LayerPrunerConfig(hidden_size=32, layers=[1], keep_tokens=[6], internal_size=16)
    model = PrunedVLM.from_base(tiny_vlm("llava"), None, pruner).eval()
    sharpened(model.layer_pruner)
    inputs = batch("llava")
    # So cold that every mask is 0 or 1.
    model.temperature = 1e-6
    with torch.no_grad():
        soft, hard, origin = (model(**inputs, pruning_mode=mode).logits[:, -1] for mode in ("soft", "hard", "origin"))
    kl = [
        F.kl_div(soft.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum")
        for other in (hard, origin)
    ]
    assert kl[0] < 1e-6 < 1e-3 < kl[1]


# ---------------------------------------------------------------------- Python by the documents
def test_documented_constructors_and_defaults():
    merger, pruner = LearnableTokenMerger(d_model=1024, merge_ratio=0.5), LayerSpecificPruner(d_model=4096)
    assert isinstance(merger, TokenMerger) and isinstance(pruner, LayerPruner)
    assert merger.temperature == 1.0 and pruner.temperature == 1.0
    assert merger.tokens_kept(576) == 288 and merger.config.merger_type == "simple"
    assert pruner.config.layers == [10, 20, 31] and pruner.config.internal_size == 512
    with torch.no_grad():
        assert merger(torch.randn(1, 576, 1024))["merged_features"].shape == (1, 288, 1024)
    for make in (LearnableTokenMerger, LayerSpecificPruner):
        with pytest.raises(TypeError, match="has no field 'merge_ration'"):
            make(merge_ration=0.4)


def test_debugging_snippets_run_on_our_objects(merger, capsys):
    vision_raw = torch.randn(1, 16, 16)
    merge_result = merger(vision_raw, use_gumbel=True)
    merged_vision = merge_result["merged_features"]
    original_vision_pos = (1, 16)
    embeddings_merged = torch.cat([torch.randn(1, 5, 16), merged_vision], 1)
    pruner = LayerSpecificPruner(d_model=16, layer_indices=[0], d_internal=8)
    soft_mask = pruner(0, merged_vision, torch.randn(1, 3, 16)).soft_mask
    current_kept_merge, target_merge_tokens = merge_result.kept_tokens.item(), merger.tokens_kept(16)
    critic = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=16, internal_size=8))
    answers = torch.ones(1, 4)
    real_pred, fake_pred = (critic([torch.randn(1, 4, 16)] * 3, answers).sigmoid() for _ in range(2))
    token_merger = merger

    print(f"Original vision tokens: {original_vision_pos[1] - original_vision_pos[0] + 1}")
    print(f"Merged vision tokens: {merged_vision.shape[1]}")
    print(f"New sequence length: {embeddings_merged.shape[1]}")
    print(f"Soft mask mean: {soft_mask.mean():.3f}")
    print(f"Soft mask std: {soft_mask.std():.3f}")
    print(f"Soft mask min/max: {soft_mask.min():.3f} / {soft_mask.max():.3f}")
    print(f"Current kept: {current_kept_merge:.1f}, Target: {target_merge_tokens}")
    print(f"Disc P(real): {real_pred.mean():.3f}, P(fake): {fake_pred.mean():.3f}")
    print(f"Current temperature: {token_merger.temperature:.3f}")
    said = capsys.readouterr().out
    for line in ("vision tokens: 16", "Merged vision tokens: 8", "length: 13", "Target: 8", "temperature: 1.000"):
        assert line in said
    assert "nan" not in said


# ---------------------------------------------------------------------- token numbers at LLaVA-1.5-7B's sizes
@pytest.fixture(scope="module")
def llava_7b():
    """LLaVA-1.5-7B's shape without weights, with the documented heads."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        merger = TokenMergerConfig(architecture="documented", merger_type="simple", target_merge_tokens=288)
        return PrunedVLM.from_base(base, merger, LayerPrunerConfig(architecture="documented"))


def test_token_numbers_of_the_documents(llava_7b):
    """676 -> 388 -> ~300 -> ~250 -> ~200 tokens, and what they cost."""
    assert LearnableTokenMerger(1024).tokens_kept(576) + 100 == 388
    seen = [288] * 10 + [200] * 10 + [150] * 11 + [100]
    report = predicted_report(llava_7b, 576, 100, seen)
    tokens = report["tokens_per_layer"]
    assert report["vision_tokens"] + report["text_tokens"] == 676
    assert [tokens[layer] for layer in (0, 10, 20, 31)] == [388, 300, 250, 200]
    # 576 / 676 of the sequence is vision; the last layer holds 200 / 676 of it, the average layer 307 / 676.
    assert report["sequence_kept"] == pytest.approx(307.2 / 676, abs=1e-3)
    assert 1 - report["flops_ratio"] == pytest.approx(0.529, abs=0.005)  # documented: 60 to 70 %
    # Nor do halves, dropped at each of the three layers, reach it with 100 text tokens.
    halved = [288] * 10 + [144] * 10 + [72] * 11 + [36]
    assert 1 - predicted_report(llava_7b, 576, 100, halved)["flops_ratio"] == pytest.approx(0.594, abs=0.005)
    # The keep ratio of the merger is 0.5, not below 0.4.
    assert 288 / 576 == 0.5


def test_thirty_percent_sparsity_at_layer_10():
    """The documents' "~300 tokens (30 % sparsity)": 288 · 0.7 + 100."""
    assert round(288 * 0.7) + 100 == pytest.approx(300, abs=3)
