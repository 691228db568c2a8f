"""What the documented VQ-VAE settings do during training."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import load
from tokcom_hf import VQGAN, VQGANConfig, VQGANImageProcessor
from tokcom_hf.cli import parse_recipe, read_yaml
from tokcom_hf.data.images import ProceduralImages
from tokcom_hf.documented_names import TRAIN_VQGAN
from tokcom_hf.models.vqgan_quantizers import build_quantizer
from tokcom_hf.trainers.vqgan import VQGANTrainer, VQGANTrainingArguments

ROOT = Path(__file__).parents[2]
PAPER = read_yaml((ROOT / "recipes" / "configs" / "paper" / "train_vqgan.yaml").read_text())
NETWORK = {
    "image_size": 16,
    "downsample_factor": 4,
    "patch_size": 4,
    "base_channels": 8,
    "channel_multipliers": [1],
    "num_res_blocks": 1,
    "mid_attention": False,
}
SMALL = {
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "adversarial_weight": 0.0,
    "perceptual": "none",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "num_pictures": 0,
    "logging_steps": 1,
}


def trainer(folder, settings=None, number=32, **training) -> VQGANTrainer:
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**NETWORK | (settings or {})))
    processor = VQGANImageProcessor(16, size_divisor=4)
    return VQGANTrainer(
        model,
        VQGANTrainingArguments(output_dir=str(folder), **SMALL | training),
        train_dataset=ProceduralImages(number, processor),
        eval_dataset=ProceduralImages(8, processor, first=1000),
        processing_class=processor,
    )


QUIET = {"codebook_dim": 8, "temperature": 0.0, "entropy_weight": 0.0, "codebook_init": "kmeans"}


# ---------------------------------------------------------------- temperature and entropy
def test_the_documented_temperature_lasts_the_whole_run(tmp_path):
    run = trainer(tmp_path, PAPER["model"] | NETWORK | {"codebook_dim": 8}, temperature_schedule="constant")
    seen = []
    update = run.model.quantizer.update
    run.model.quantizer.update = lambda allow_reset: (
        seen.append(run.model.quantizer.temperature),
        update(allow_reset),
    )
    run.train()
    assert seen == [2.5] * 8
    assert PAPER["training"]["temperature_schedule"] == "constant"


def test_squared_distances_as_they_are_follow_the_features_own_size():
    config = VQGANConfig(
        codebook_size=8, codebook_dim=4, temperature=2.5, temperature_scale="none", entropy_weight=0.0
    )
    quantizer = build_quantizer(config, 4).train()
    torch.manual_seed(0)
    quantizer.codebook.copy_(torch.randn(8, 4))
    vectors = torch.randn(4000, 4)
    expected = (-torch.cdist(vectors[:1], quantizer.codebook).square() / 2.5).softmax(1)[0]
    drawn = torch.bincount(quantizer.sample_codes(vectors[:1].expand(20000, 4)), minlength=8) / 20000
    torch.testing.assert_close(drawn, expected, atol=0.02, rtol=0)
    nearest = quantizer.nearest(vectors)
    agree = (quantizer.sample_codes(vectors) == nearest).float().mean()
    quantizer.codebook.mul_(6)
    larger = (quantizer.sample_codes(6 * vectors) == nearest).float().mean()
    assert agree < 0.6 < 0.9 < larger


def test_distances_in_units_of_the_features_variance_do_not_depend_on_their_size():
    config = VQGANConfig(
        codebook_size=8, codebook_dim=64, temperature=2.5, temperature_scale="variance", entropy_weight=0.0
    )
    quantizer = build_quantizer(config, 64).train()
    torch.manual_seed(0)
    codebook, vectors = torch.randn(8, 64), 3 * torch.randn(4000, 64) + 1
    scale = vectors.var(0, unbiased=False).mean()
    shares = []
    for factor in (1.0, 100.0):
        quantizer.codebook.copy_(factor * codebook)
        torch.testing.assert_close(quantizer.distance_scale(factor * vectors), factor**2 * scale)
        drawn = quantizer.sample_codes(factor * vectors)
        shares.append(float((drawn == quantizer.nearest(factor * vectors)).float().mean()))
    expected = (-torch.cdist(vectors, codebook).square() / (2.5 * scale)).softmax(1).max(1).values.mean()
    assert shares == pytest.approx([float(expected)] * 2, abs=0.02)


def test_a_higher_temperature_draws_more_evenly():
    shares = []
    for temperature in (1.2, 2.5, 3.0, 6.0):
        config = VQGANConfig(codebook_size=8, codebook_dim=4, temperature=temperature, temperature_scale="none")
        quantizer = build_quantizer(config, 4).train()
        torch.manual_seed(0)
        quantizer.codebook.copy_(3 * torch.randn(8, 4))
        vectors = 3 * torch.randn(4000, 4)
        shares.append(float((quantizer.sample_codes(vectors) == quantizer.nearest(vectors)).float().mean()))
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] + 0.1


def entropy_gradient(settings: dict) -> float:
    """‖gradient of the weighted entropy term‖ / ‖gradient of the reconstruction‖ at the encoder's output."""
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**settings)).train()
    pixels = torch.rand(16, 3, 16, 16) * 2 - 1
    for _ in range(2):  # codes leave their arbitrary start
        model(pixels)
    features = model.features(pixels).detach().requires_grad_()
    quantized = model.quantizer(features, learns=False)
    losses = model.losses(model.decoder(quantized.embeddings.permute(0, 3, 1, 2)), pixels, quantized)
    parts = losses["reconstruction_loss"], model.config.entropy_weight * losses["entropy_loss"]
    first, second = (torch.autograd.grad(part, features, retain_graph=True)[0].norm() for part in parts)
    return float(second / first)


def test_the_entropy_term_of_the_paper_configuration_has_a_gradient_that_acts():
    paper = PAPER["model"] | NETWORK
    assert entropy_gradient(paper) > 0.01
    assert entropy_gradient(paper | {"entropy_temperature": 25.0, "temperature_scale": "mean"}) < 0.01


def test_diversity_alone_spreads_codes_without_asking_for_sure_choices():
    config = VQGANConfig(
        **NETWORK, **QUIET | {"entropy_temperature": 1.0, "codebook_init": "uniform"}, diversity_weight=2.0
    )
    torch.manual_seed(0)
    model = VQGAN(config).train()
    model.quantizer.codebook.copy_(torch.randn(64, 8))
    output = model(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert 0 < output.diversity_loss <= 1
    parts = output.reconstruction_loss + config.commitment_weight * output.commitment_loss + 2 * output.diversity_loss
    torch.testing.assert_close(output.loss, parts)
    vectors = (torch.randn(64, 8) * 0.1 + 0.5).requires_grad_()
    before = model.quantizer.entropy_losses(vectors)[1]
    (gradient,) = torch.autograd.grad(before, vectors)
    after = model.quantizer.entropy_losses(vectors.detach() - 0.1 * gradient / gradient.norm())[1]
    assert 0 <= after < before <= 1
    with pytest.raises(ValueError, match=r"'lfq' does not read diversity_weight=1\.0 \(default 0\.0\)"):
        VQGANConfig(quantizer="lfq", diversity_weight=1.0)
    assert VQGAN(VQGANConfig(**NETWORK, **QUIET))(torch.zeros(1, 3, 16, 16)).diversity_loss is None


# ---------------------------------------------------------------- resets, warm-up, expansion, early stopping
def test_resets_come_every_so_many_epochs(tmp_path):
    run = trainer(tmp_path, QUIET, reset_epochs=0.5, reset_stop=1.0)  # 4 steps an epoch
    allowed = []
    update = run.model.quantizer.update
    run.model.quantizer.update = lambda allow_reset: (allowed.append(allow_reset), update(allow_reset))
    run.train()
    assert allowed == [False, True] * 4
    with pytest.raises(ValueError, match="reset_epochs must be positive"):
        VQGANTrainingArguments(output_dir=str(tmp_path), reset_epochs=0)


def test_the_share_and_the_threshold_of_resets():
    config = VQGANConfig(codebook_size=10, codebook_dim=2, reset_fraction=0.3, dead_code_threshold=1, temperature=0.0)
    quantizer = build_quantizer(config, 2)
    quantizer.ema_weight.fill_(1.0)
    # Of 100 vectors a step, five codes have two hits or more and five less than one.
    quantizer.code_share.copy_(torch.tensor([0.5, 0.3, 0.1, 0.06, 0.02, 0.009, 0.005, 0.003, 0.002, 0.001]))
    assert quantizer.dead_codes(100).tolist() == [False] * 5 + [True] * 5
    before = quantizer.codebook.clone()
    assert quantizer.reset_dead_codes(torch.randn(50, 2) + 9, 100) == 3
    assert (quantizer.codebook != before).any(1).nonzero().flatten().tolist() == [7, 8, 9]


def test_the_commitment_weight_grows_over_its_warm_up(tmp_path):
    run = trainer(tmp_path, QUIET, commitment_warmup_epochs=2.0)  # 4 steps an epoch
    seen = []
    update = run.model.quantizer.update
    run.model.quantizer.update = lambda allow_reset: (seen.append(run.model.commitment_scale), update(allow_reset))
    run.train()
    assert seen == [step / 8 for step in range(8)]


def test_a_codebook_expands_when_it_is_used_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    settings = {"codebook_size": 8} | QUIET
    expanding = {"codebook_expansion": True, "codebook_expansion_limit": 32, "codebook_expansion_utilization": 0.6}
    expanding |= {"save_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.9, "monitor_window": 2}
    run = trainer(tmp_path / "run", settings, **expanding)  # 4 steps an epoch
    run.train()
    sizes = [
        round(row["eval_active"] / row["eval_utilization"]) for row in run.state.log_history if "eval_active" in row
    ]
    assert sizes[:2] == [8, 16] and sizes[-1] >= 16
    assert run.model.config.codebook_size == run.model.quantizer.codebook.shape[0] == sizes[-1]
    assert run.monitor.report()["cumulative_active"] > 8
    run.save_model(str(tmp_path / "saved"))
    assert VQGAN.from_pretrained(tmp_path / "saved").quantizer.codebook.shape[0] == sizes[-1]
    again = trainer(tmp_path / "again", settings, **expanding)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    torch.testing.assert_close(again.model.quantizer.codebook, run.model.quantizer.codebook)
    still = trainer(tmp_path / "still", settings, **expanding | {"codebook_expansion": False})
    still.train()
    assert still.model.config.codebook_size == 8
    with pytest.raises(ValueError, match="needs quantizer 'ema'"):
        trainer(tmp_path / "fsq", {"quantizer": "fsq", "temperature": 0.0}, codebook_expansion=True)


def test_the_best_model_may_have_fewer_codes_than_the_last(tmp_path):
    run = trainer(
        tmp_path, {"codebook_size": 8} | QUIET, codebook_expansion=True, codebook_expansion_utilization=0.1,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_active",
        greater_is_better=False,
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step == 4
    saved = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["codebook_size"]
    assert run.model.config.codebook_size == run.model.quantizer.codebook.shape[0] == saved


def recipe():
    return load("train_vqgan")


def test_early_stopping_works_with_the_default_configuration(tmp_path):
    # A learning rate of zero never improves: one evaluation sets the best value and the next two end the run.
    command = (
        "--early_stopping_patience 2 --image_size 16 --num_train 32 --num_eval 8 --per_device_train_batch_size 8 "
    )
    command += (
        "--model.base_channels 8 --max_steps 40 --eval_steps 2 --autoencoder_steps 3 --report_to none --init_images 8 "
    )
    command += (
        "--disable_tqdm true --use_cpu true --num_pictures 0 --threads 1 --adversarial_weight 0 --learning_rate 0 "
    )
    results = recipe().main([*command.split(), "--model.ema_decay", "0.999", "--output_dir", str(tmp_path / "run")])
    assert 8 <= results["steps"] < 40
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    # Step 2 was evaluated without quantization, which no codes can equal.
    assert best["step"] >= 4 and best["metric"] == "loss"


def test_steps_without_quantization_may_be_a_share(tmp_path):
    arguments = VQGANTrainingArguments(output_dir=str(tmp_path), autoencoder_steps=0.2, use_cpu=True)
    assert [arguments.autoencoder_stage(steps) for steps in (600, 10, 1)] == [120, 2, 1]
    tiny = parse_recipe("", recipe().SECTIONS, ROOT / "recipes/configs/tiny/train_vqgan.yaml", [], TRAIN_VQGAN)[
        "training"
    ]
    arguments = VQGANTrainingArguments(output_dir=str(tmp_path), **tiny)
    assert arguments.autoencoder_stage(600) == 120 and arguments.get_warmup_steps(600) == 30


def test_bf16_is_what_use_amp_says(tmp_path):
    run = trainer(tmp_path, QUIET, bf16=True, max_steps=1)
    seen = []
    run.model.encoder.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.train()
    assert seen[-1] == torch.bfloat16 and run.model.encoder.conv_out.weight.dtype == torch.float32


def test_uniform_codes_start_within_one_over_their_number():
    codebook = build_quantizer(VQGANConfig(**PAPER["model"]), 256).codebook
    assert codebook.shape == (64, 256)
    assert codebook.abs().max() <= 1 / 64 and codebook.std() == pytest.approx(1 / 64 / 3**0.5, rel=0.05)


def test_the_measured_effects_are_those_that_are_told():
    rows = json.loads((ROOT / "docs" / "results" / "vq_documented.json").read_text())["rows"]
    by_name = {row["row"]: row for row in rows}
    documented, without = by_name["documented"], by_name["no_remedies"]
    assert documented["split"] == without["split"] == "held_out" and documented["changes"] == {}
    assert documented["steps"] == without["steps"] and documented["seed"] == without["seed"]
    assert documented["utilization"] >= 0.5 and documented["normalized_entropy"] > 0.7
    assert documented["least_temperature"] == PAPER["model"]["temperature"] == 2.5
    assert documented["least_gradient_share"] >= 0.01
    assert documented["normalized_entropy"] > without["normalized_entropy"]
    # The nearest setting that keeps the reconstruction.
    nearest = by_name["entropy_weight_0.1"]
    assert nearest["psnr"] > without["psnr"] - 0.1 and nearest["least_gradient_share"] >= 0.01
    assert nearest["utilization"] >= 0.5 and nearest["normalized_entropy"] > 0.7
    assert nearest["least_temperature"] == 2.5 and nearest["changes"] == {"model": {"entropy_weight": 0.1}}
    page = (ROOT / "docs" / "documents.md").read_text()
    told = next(line for line in page.splitlines() if "reconstruction as good as without the remedies" in line)
    for row in rows:
        assert f"{row['psnr']:.2f} dB" in told
