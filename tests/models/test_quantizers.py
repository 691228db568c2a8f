"""The quantizers do what their settings say."""

import json
import math
import re

import pytest
import torch

from tests.helpers import recipes
from tests.helpers.house import RECIPES
from tokcom_hf.models.configuration_vqgan import READ_BY, REMOVED, VQGANConfig, default_fsq_levels
from tokcom_hf.models.vqgan_code_search import kmeans, nearest_codes
from tokcom_hf.models.vqgan_quantizers import EMAQuantizer, build_quantizer

QUIET = {"temperature": 0.0, "entropy_weight": 0.0, "reset_fraction": 0.0}


def make(size=16, width=8, update_in_forward=True, **settings) -> EMAQuantizer:
    torch.manual_seed(0)
    config = VQGANConfig(codebook_size=size, codebook_dim=width, **(QUIET | settings))
    quantizer = build_quantizer(config, width).train()
    quantizer.update_in_forward = update_in_forward
    return quantizer


def placed(quantizer, vectors):
    quantizer.initialize(vectors)
    return quantizer


def test_nearest_codes_agree_with_distances_whatever_the_chunk():
    vectors, codebook = torch.randn(257, 5), torch.randn(33, 5)
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_codes(vectors, codebook), expected)
    assert torch.equal(nearest_codes(vectors, codebook, max_scores=100), expected)
    penalty = torch.randn(33)
    dearer = torch.cdist(vectors.double(), codebook.double()).square() + penalty
    assert torch.equal(nearest_codes(vectors, codebook, penalty, max_scores=100), dearer.argmin(1))


@pytest.mark.parametrize("kind", ["ema", "fsq", "lfq"])
def test_lookup_of_codes_equals_forward(kind):
    quantizer = make(64, 8, quantizer=kind).eval()
    features = torch.randn(2, 4, 4, 8)
    output = quantizer(features)
    assert output.codes.shape == (2, 4, 4) and output.codes.max() < 64
    torch.testing.assert_close(quantizer.lookup(output.codes), output.embeddings, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_every_implicit_code_maps_to_itself(kind):
    config = VQGANConfig(codebook_size=64, quantizer=kind, **QUIET)
    quantizer = build_quantizer(config, 8)
    codes = torch.arange(64)
    vectors = quantizer.vectors_of(codes)
    if kind == "fsq":
        vectors = vectors * torch.tensor([level // 2 for level in quantizer.levels])
    assert torch.equal(quantizer.assign(vectors)[0], codes)


@pytest.mark.parametrize("kind", ["ema", "fsq", "lfq"])
def test_features_receive_a_gradient(kind):
    quantizer = make(64, 8, quantizer=kind)
    features = torch.randn(32, 8, requires_grad=True)
    quantizer(features).embeddings.square().sum().backward()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["ema", "fsq", "lfq"])
def test_codes_are_the_same_under_bf16_autocast(kind):
    quantizer = make(1024, 16, quantizer=kind).eval()
    features = torch.randn(512, 16)
    plain = quantizer(features).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(features).codes, plain)


def test_ema_codes_are_the_means_of_their_vectors_after_bias_correction():
    quantizer = make(2, 1, codebook_init="uniform", ema_decay=0.9)
    quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    quantizer(torch.tensor([[-3.0], [-5.0], [4.0]]))
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[-4.0], [4.0]]))


def test_temperature_changes_the_distribution_of_codes_in_training_only():
    vectors = torch.randn(4000, 8)
    spread = {}
    for temperature in (0.0, 0.05, 5.0):
        quantizer = make(16, 8, temperature=temperature, update_in_forward=False, codebook_init="uniform")
        quantizer.codebook.copy_(torch.randn(16, 8))
        nearest = nearest_codes(vectors, quantizer.codebook)
        spread[temperature] = (quantizer(vectors).codes != nearest).float().mean().item()
        assert torch.equal(quantizer.eval()(vectors).codes, nearest)
    assert spread[0.0] == 0 and 0 < spread[0.05] < spread[5.0] and spread[5.0] > 0.5


def test_sampled_codes_follow_the_softmax():
    quantizer = make(4, 2, temperature=1.0, update_in_forward=False)
    quantizer.codebook.copy_(torch.randn(4, 2))
    vector = torch.randn(1, 2)
    probability = (-torch.cdist(vector, quantizer.codebook).square() / math.sqrt(2)).softmax(1)[0]
    drawn = torch.bincount(quantizer.sample_codes(vector.expand(40000, 2)), minlength=4) / 40000
    torch.testing.assert_close(drawn, probability, atol=0.015, rtol=0)


@pytest.mark.parametrize("kind", ["ema", "lfq"])
def test_entropy_term_has_a_gradient_that_spreads_codes(kind):
    quantizer = make(16, 4, quantizer=kind, entropy_weight=1.0, update_in_forward=False)
    if kind == "ema":
        quantizer.codebook.copy_(torch.randn(16, 4))
    vectors = (torch.randn(64, quantizer.width) * 0.1 + 0.5).requires_grad_()
    before = quantizer.entropy_loss(vectors)
    (gradient,) = torch.autograd.grad(before, vectors)
    assert gradient.abs().sum() > 0
    after = quantizer.entropy_loss(vectors.detach() - 0.1 * gradient / gradient.norm())
    assert -1 <= after < before


@pytest.mark.parametrize("bits", [3, 6])
def test_lfq_entropy_equals_the_dense_table_in_float64(bits):
    quantizer = make(2**bits, bits, quantizer="lfq", entropy_weight=1.0, entropy_temperature=0.7)
    vectors = torch.randn(50, bits, requires_grad=True)
    codes = quantizer.vectors_of(torch.arange(2**bits)).double()
    p = (-torch.cdist(vectors.double(), codes).square() / 0.7).softmax(1)
    expected = (torch.special.entr(p).sum(1).mean() - torch.special.entr(p.mean(0)).sum()) / math.log(2**bits)
    loss = quantizer.entropy_loss(vectors)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    (gradient,), (wanted,) = (torch.autograd.grad(value, vectors) for value in (loss, expected))
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("kind", "scale"), [("ema", "dim"), ("ema", "mean"), ("ema", "variance"), ("lfq", "dim")])
def test_looking_ahead_gives_the_entropy_gradient_of_the_whole_batch(kind, scale):
    settings = {"entropy_weight": 1.0, "temperature_scale": scale}
    quantizer = make(16, 4, quantizer=kind, **settings, entropy_temperature=1.0 if scale == "dim" else 0.2)
    if kind == "ema":
        quantizer.codebook.copy_(torch.randn(16, 4))
    vectors = torch.randn(64, 4, requires_grad=True)
    (whole,) = torch.autograd.grad(quantizer.entropy_loss(vectors), vectors)
    # Micro-batches that differ, as sorted data does: the mean of their own entropies has another gradient.
    order = vectors.detach()[:, 0].argsort()
    parts = order.split(16)
    alone = sum(torch.autograd.grad(quantizer.entropy_loss(vectors[part]) / 4, vectors)[0] for part in parts)
    quantizer.look_ahead([vectors.detach()[part] for part in parts])
    ahead = sum(torch.autograd.grad(quantizer.entropy_loss(vectors[part]) / 4, vectors)[0] for part in parts)
    torch.testing.assert_close(ahead, whole, atol=1e-6, rtol=1e-4)
    assert (alone - whole).norm() > 0.1 * whole.norm()
    quantizer.update()
    torch.testing.assert_close(torch.autograd.grad(quantizer.entropy_loss(vectors), vectors)[0], whole)


def test_reset_never_touches_a_live_code_and_keeps_to_its_limit():
    quantizer = placed(
        make(64, 4, codebook_init="data", dead_code_unit="mean", reset_fraction=0.1), torch.randn(640, 4)
    )
    quantizer.code_share.fill_(1 / 64)
    quantizer.code_share[:20] = 1e-6
    quantizer.code_share[3] = 0.0
    before = quantizer.codebook.clone()
    pool = torch.randn(100, 4)
    quantizer.config.dead_code_threshold = 0.1
    assert quantizer.reset_dead_codes(pool, 640) == 6
    moved = (quantizer.codebook != before).any(1)
    assert moved.sum() == 6 and moved[3] and not moved[20:].any()
    rows = quantizer.codebook[moved]
    assert (rows[:, None] == pool[None]).all(2).any(1).all()
    assert len(rows.unique(dim=0)) == 6
    torch.testing.assert_close(quantizer.code_sum[moved], rows * quantizer.code_share[moved][:, None])


def test_resets_revive_a_collapsed_codebook():
    settings = {"codebook_init": "uniform", "dead_code_unit": "mean", "dead_code_threshold": 0.1, "ema_decay": 0.5}
    used = {}
    for fraction in (0.0, 0.3):
        quantizer = make(64, 8, **settings, reset_fraction=fraction, reset_interval=1)
        for step in range(30):
            torch.manual_seed(step)
            quantizer(3 + torch.randn(512, 8))
        used[fraction] = len(quantizer.eval()(3 + torch.randn(4096, 8)).codes.unique())
    assert used[0.0] < 32 and used[0.3] >= 62


def skewed(number: int, seed: int, width: float, share: float) -> torch.Tensor:
    """Normal vectors, but a `share` of them in a cloud of standard deviation `width`."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(number, 8, generator=generator)
    return torch.where(torch.rand(number, 1, generator=generator) < share, width * vectors + 1, vectors)


def usage_entropy(codes: torch.Tensor, size: int) -> float:
    share = torch.bincount(codes.flatten(), minlength=size) / codes.numel()
    return float(-(share * share.clamp_min(1e-12).log()).sum() / math.log(size))


@pytest.mark.parametrize(("width", "share", "least"), [(0.4, 0.5, 0.99), (0.1, 0.7, 0.9)])
def test_balanced_codes_are_used_equally_in_training_and_in_inference(width, share, least):
    """In a moderately dense cloud use becomes equal; one far denser than the rest does not make codes oscillate."""
    settings = {"codebook_init": "kmeans", "ema_decay": 0.97, "reset_fraction": 0.3, "reset_interval": 1}
    settings |= {"dead_code_threshold": 0.4, "dead_code_unit": "mean"}
    entropy = {}
    for rate in (0.0, 0.05):
        quantizer = make(32, 8, **settings, balance_rate=rate)
        for step in range(300):
            quantizer(skewed(1024, step, width, share))
        entropy[rate] = usage_entropy(quantizer.eval()(skewed(8192, 999, width, share)).codes, 32)
    assert entropy[0.0] < 0.975 and entropy[0.05] > least


def test_penalties_are_saved_and_grow_with_the_codebook():
    quantizer = placed(make(32, 8, codebook_init="kmeans", balance_rate=0.05), torch.randn(256, 8))
    for _ in range(5):
        quantizer(torch.randn(256, 8))
    # The penalties are part of the model, and only of one that has them.
    assert "penalty" in quantizer.state_dict() and "penalty" not in make(32, 8).state_dict()
    copy = make(32, 8, balance_rate=0.05).eval()
    copy.load_state_dict(quantizer.state_dict())
    features = torch.randn(64, 8)
    assert torch.equal(copy(features).codes, quantizer.eval()(features).codes)
    dearer = torch.cdist(features, quantizer.codebook).square() + quantizer.penalty
    assert torch.equal(quantizer(features).codes, dearer.argmin(1)) and quantizer.penalty.std() > 0
    before = quantizer.penalty.clone()
    quantizer.expand(40)
    assert torch.equal(quantizer.penalty[:32], before) and quantizer.penalty.shape == (40,)


def test_a_balancing_step_moves_penalties_by_the_excess_use():
    quantizer = placed(make(4, 8, codebook_init="data", balance_rate=0.1), torch.eye(4, 8))
    quantizer.codebook.copy_(torch.eye(4, 8))
    quantizer.code_sum.copy_(quantizer.codebook * quantizer.code_share[:, None])
    vectors = torch.eye(4, 8)[[0, 0, 0, 1]] * torch.tensor([[1.5], [1.5], [1.5], [2.5]])
    quantizer(vectors)
    # Mean squared distances are 0.25, 2.25 and, over all, 0.75; the uses are 3, 1, 0 and 0 of a fair share of 1.
    torch.testing.assert_close(quantizer.penalty, 0.1 * torch.tensor([0.25, 0.0, -0.75, -0.75]))
    quantizer.config.dead_code_threshold, quantizer.config.dead_code_unit = 0.9, "mean"
    quantizer.config.reset_fraction = 1.0
    quantizer.code_share.copy_(torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)
    # A code that moves to the first cluster is as dear as the one that is there.
    assert quantizer.reset_dead_codes(vectors[:1], 4) == 1 and quantizer.penalty[3] == quantizer.penalty[0]


def test_one_update_per_step_whatever_the_accumulation():
    vectors = torch.randn(32, 8)
    settings = {"codebook_init": "data", "reset_fraction": 0.5, "dead_code_threshold": 3.0, "balance_rate": 0.05}
    whole, parts = (placed(make(8, 8, **settings), vectors) for _ in "ab")
    for quantizer, pieces in ((whole, [vectors]), (parts, vectors.split(8))):
        quantizer.update_in_forward = False
        for _ in range(3):
            for piece in pieces:
                quantizer(piece)
            quantizer.update()
    assert int(whole.num_updates) == int(parts.num_updates) == 3
    torch.testing.assert_close(whole.codebook, parts.codebook, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.penalty, parts.penalty, atol=1e-6, rtol=0)


def test_expansion_keeps_old_codes():
    quantizer = placed(make(16, 8, codebook_init="kmeans"), torch.randn(256, 8))
    before = quantizer.codebook.clone()
    quantizer.expand(40)
    assert quantizer.codebook.shape == (40, 8) and torch.equal(quantizer.codebook[:16], before)
    assert len(quantizer.codebook.unique(dim=0)) == 40
    quantizer(torch.randn(64, 8))


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_codes_start_on_the_data_on_the_first_batch(init):
    quantizer = make(32, 8, codebook_init=init)
    codes = quantizer(50 + torch.randn(512, 8)).codes
    assert len(codes.unique()) == 32 and (quantizer.codebook.mean() - 50).abs() < 1


def test_kmeans_finds_separate_clusters_and_more_codes_than_vectors_work():
    centres = 10 * torch.randn(6, 3)
    vectors = centres.repeat_interleave(20, 0) + 0.01 * torch.randn(120, 3)
    found, count = kmeans(vectors, 6, iterations=20)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1 and count.sum() == 120
    assert kmeans(torch.randn(3, 2), 8)[0].shape == (8, 2)


def test_wrong_codes_are_refused():
    quantizer = make()
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        quantizer.lookup(torch.tensor([16]))
    with pytest.raises(TypeError, match="integers"):
        quantizer.lookup(torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantizer": "lfq", "codebook_size": 48}, "power of two"),
        ({"quantizer": "fsq", "codebook_size": 48}, "power of two"),
        ({"quantizer": "fsq", "codebook_size": 2}, "at least 4"),
        ({"quantizer": "fsq", "codebook_size": 1000, "fsq_levels": [8, 5, 5]}, "as their product"),
        ({"quantizer": "fsq", "codebook_size": 8, "fsq_levels": [8, 1]}, "at least 2 each"),
        ({"codebook_init": "pca"}, "codebook_init"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"image_size": 100}, "multiple"),
        ({"channel_multipliers": [1, 2]}, "4 entries"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**settings)


def test_fsq_takes_levels_of_its_paper():
    config = VQGANConfig(quantizer="fsq", codebook_size=1000, fsq_levels=[8, 5, 5, 5], **QUIET)
    quantizer, codes = build_quantizer(config, 8), torch.arange(1000)
    vectors = quantizer.vectors_of(codes)
    assert vectors.shape == (1000, 4) and len(vectors.unique(dim=0)) == 1000
    levels = torch.tensor([level // 2 for level in config.fsq_levels])
    assert torch.equal(quantizer.assign(vectors * levels)[0], codes)


def test_default_fsq_levels():
    assert math.prod(default_fsq_levels(8192)) == 8192
    assert default_fsq_levels(64) == [4, 4, 4] and default_fsq_levels(32) == [8, 4]


@pytest.mark.parametrize("quantizer", ["ema", "fsq", "lfq"])
def test_an_option_is_read_by_the_quantizer_or_refused(quantizer, tmp_path):
    """Default and off are fine with any quantizer; saved folders of before, whose idle options never acted, load."""
    other = {
        "entropy_weight": 0.5, "entropy_temperature": 0.3, "entropy_term": "use", "diversity_weight": 1.0,
        "codebook_similarity": "cosine", "codebook_init": "kmeans", "ema_decay": 0.9, "temperature": 1.0,
        "temperature_scale": "mean", "dead_code_threshold": 0.5, "dead_code_unit": "mean", "reset_fraction": 0.1,
        "reset_interval": 3, "balance_rate": 0.1, "fsq_levels": [16, 4],
    }  # fmt: skip
    assert other.keys() == READ_BY.keys()
    VQGANConfig(quantizer=quantizer, entropy_weight=0.0, temperature=0.0, reset_fraction=0.0)
    defaults = VQGANConfig(quantizer=quantizer)
    if quantizer != "ema":
        assert VQGANConfig(quantizer=quantizer, codebook_dim=8).latent_channels == 8
        with pytest.raises(ValueError, match=r"does not read codebook_dim=16 \(default 256\)"):
            VQGANConfig(quantizer=quantizer, codebook_dim=16, latent_channels=8)
    for name, value in other.items():
        if quantizer in READ_BY[name]:
            config = VQGANConfig(quantizer=quantizer, **{name: value})
            config.save_pretrained(tmp_path)
            assert getattr(VQGANConfig.from_pretrained(tmp_path), name) == value
            continue
        with pytest.raises(ValueError, match=re.escape(f"'{quantizer}' does not read {name}={value!r} (default")):
            VQGANConfig(quantizer=quantizer, **{name: value})
        stored = defaults.to_dict() | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert getattr(VQGANConfig.from_pretrained(tmp_path), name) == getattr(defaults, name)


FORMER = {
    "dropout": 0.1, "codebook_projection": True, "kmeans_iterations": 3, "codebook_seed": 1, "ema_bias_correction": False,
    "gradient_estimator": "rotation", "reset_pool": 10, "freeze_codebook": True, "usage_decay": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FORMER.items())
def test_removed_fields_are_passed_over_at_their_default_and_refused_elsewhere(name, value):
    assert FORMER.keys() == REMOVED.keys()
    assert not FORMER.keys() & VQGANConfig(quantizer="fsq", **REMOVED).to_dict().keys()
    with pytest.raises(ValueError, match=rf"{name}=.* was removed; the last version .* is 0\.2\.0"):
        VQGANConfig(quantizer="fsq", **{name: value})


@pytest.mark.parametrize("kind", ["ema", "fsq", "lfq"])
@pytest.mark.parametrize("name", ["tiny", "base", "paper"])
def test_a_quantizer_named_on_the_command_line_takes_no_option_of_another_from_the_file(name, kind):
    file = RECIPES / "configs" / name / "train_vqgan.yaml"
    recipe = recipes.load("train_vqgan")
    arguments = ["--config", str(file), "--model.quantizer", kind]
    given = recipe.parse_recipe("", recipe.SECTIONS, None, arguments, recipe.TRAIN_VQGAN)["model"]
    plain = recipe.parse_recipe("", recipe.SECTIONS, file, [], recipe.TRAIN_VQGAN)["model"]
    config = VQGANConfig(**given)
    assert config.quantizer == kind and config.base_channels == plain.get("base_channels", config.base_channels)
    if kind == "ema":
        assert given == plain | {"quantizer": "ema"}
    typed = [*arguments, "--model.ema_decay", "0.5"]
    given = recipe.parse_recipe("", recipe.SECTIONS, None, typed, recipe.TRAIN_VQGAN)["model"]
    if kind != "ema":
        with pytest.raises(ValueError, match=f"{kind}' does not read ema_decay=0.5"):
            VQGANConfig(**given)


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "overflowing": 1e25}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_kmeans_refuses_vectors_without_distances(value):
    vectors = torch.randn(64, 4)
    vectors[5:8, 2] = value
    with pytest.raises(ValueError, match=r"k-means needs finite features.* 3 of 64"):
        kmeans(vectors, 16)


@pytest.mark.parametrize("vectors", [torch.ones(50, 4), torch.zeros(50, 4), torch.ones(1, 4), torch.ones(1, 1)])
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_ends_on_equal_vectors_and_on_fewer_vectors_than_codes(vectors, spherical):
    centres, count = kmeans(vectors, 16, spherical=spherical)
    assert centres.shape == (16, vectors.shape[1]) and centres.isfinite().all() and count.sum() == len(vectors)


def test_kmeans_without_vectors_says_so():
    with pytest.raises(ValueError, match="at least one vector"):
        kmeans(torch.ones(0, 4), 16)


def refused_in_training(quantizer, value):
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    features = torch.randn(64, 8)
    features[3] = value
    with pytest.raises(ValueError, match="finite features"):
        quantizer(features)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    with pytest.raises(ValueError, match="finite features"):
        quantizer.encode(features)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("init", ["uniform", "data", "kmeans"])
def test_training_refuses_features_that_are_not_finite_and_keeps_the_codebook(init, value):
    refused_in_training(make(16, 8, codebook_init=init), value)


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_training_refuses_nan_whatever_the_quantizer(kind):
    refused_in_training(make(16, 8, quantizer=kind), float("nan"))


def test_dead_codes_do_not_move_onto_features_that_are_not_finite():
    quantizer = placed(make(16, 8, reset_fraction=1.0, dead_code_threshold=1e6), torch.randn(64, 8))
    before, pool = quantizer.codebook.clone(), torch.full((64, 8), float("nan"))
    with pytest.raises(ValueError, match="reset of dead codes needs finite features"):
        quantizer.reset_dead_codes(pool, 64)
    assert torch.equal(quantizer.codebook, before)


def test_codes_are_those_of_inference_while_other_threads_train_the_same_module():
    quantizer = placed(make(16, 8, temperature=50.0, update_in_forward=False), torch.randn(64, 8))
    features = torch.randn(512, 8)
    codes = quantizer.encode(features)
    assert quantizer.training and torch.equal(codes, quantizer.eval()(features).codes)
    assert not torch.equal(codes, quantizer.train()(features).codes)
