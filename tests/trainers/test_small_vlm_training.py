"""Muon with AdamW behaves as the two alone; a tower learns from its patches."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokcom_hf.small_models.dense_pretraining import TowerLesson, pretrain_tower
from tokcom_hf.small_models.small_vlm import scene_processor
from tokcom_hf.trainers.base import CompressionTrainer
from tokcom_hf.trainers.muon import MuonWithAdamW, split_for_muon


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def step(model, optimizers, number: int) -> None:
    torch.manual_seed(number)
    model(torch.randint(5, (4, 6))).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_one_optimizer_equals_the_two_and_resumes():
    one, two = network(), network()
    matrices, others = split_for_muon(one)
    assert {p.shape for p in matrices} == {(8, 8), (3, 8)} and len(others) == 5
    combined = MuonWithAdamW(matrices, others, 0.05, 1e-2)
    pair = [torch.optim.Muon(split_for_muon(two)[0], lr=0.05, weight_decay=0.01)]
    pair.append(torch.optim.AdamW(split_for_muon(two)[1], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01))
    for number in range(3):
        step(one, [combined], number)
        step(two, pair, number)
    # A run that goes on from the saved state, with the scheduler's hands on the restored groups.
    resumed = copy.deepcopy(one)
    restored = MuonWithAdamW(*split_for_muon(resumed), 0.05, 1e-2)
    restored.load_state_dict(copy.deepcopy(combined.state_dict()))
    for optimizer in (combined, restored, *pair):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    step(one, [combined], 3)
    step(two, pair, 3)
    step(resumed, [restored], 3)
    for a, b, c in zip(one.parameters(), two.parameters(), resumed.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


def teach(folder, steps, **options):
    """A small tower that was taught into `folder`, and what a probe reads of it."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    tower = CLIPVisionModel(config)
    lesson = TowerLesson(32, side=4, steps=steps, batch_size=32, scenes={"colours": ("red", "blue", "yellow")})
    correct = pretrain_tower(
        tower,
        lambda pixels: tower(pixels).last_hidden_state[:, 1:],
        scene_processor(32, 8).image_processor,
        lesson,
        folder,
        trainer_arguments={"report_to": "none", "disable_tqdm": True, "use_cpu": True},
        **options,
    )
    return tower, correct


@pytest.mark.slow
def test_tower_learns_what_patches_show(tmp_path):
    _, correct = teach(tmp_path, steps=60)
    # Chance is 1/3 for colours and 1/2 for sizes.
    assert correct["colour"] > 0.8 and correct["size"] > 0.7


def test_a_run_that_was_stopped_behind_its_towers_lesson_takes_no_step_of_it_again(tmp_path, monkeypatch):
    tower, correct = teach(tmp_path, steps=3)
    monkeypatch.setattr(CompressionTrainer, "training_step", None)
    again, read = teach(tmp_path, steps=3, resume=True)
    assert read == correct
    for name, value in tower.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
