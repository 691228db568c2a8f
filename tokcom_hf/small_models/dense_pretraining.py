"""Pretrains a vision tower on dense patch labels, before a language model is attached.

If a small VLM is trained from scratch on answers alone, its tower takes most of the training time to learn to distinguish
shapes. With a linear probe that predicts labels of every patch (shape, colour, size, dot, row, column), it takes less than a
minute on one core. The probe is discarded afterwards.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from ..checkpoints import choose_checkpoint
from ..data.scene_patches import ScenePatchDataset, patch_label_sizes
from ..trainers.base import CompressionTrainer, CompressionTrainingArguments
from ..whole_files import write_text

SAVE_STEPS = 200  # checkpoint interval; the last step also saves, so the pretrained tower survives a later stop
EMPTY_WEIGHT = 0.3  # loss weight of patches without an object, which are frequent and easy


class PatchProbe(nn.Module):
    """A linear probe on the patch features of a tower.

    Args:
        tower: the modules to train.
        features: function from pixel values `(batch, 3, h, w)` to features `(batch, side², size)`, computed by `tower`.
        size: size of a feature.
        side: features per side.
    """

    accepts_loss_kwargs = False  # the loss is a mean over patches; Trainer then divides by the accumulation steps

    def __init__(self, tower: nn.Module, features: Callable[[torch.Tensor], torch.Tensor], size: int, side: int):
        super().__init__()
        self.tower, self.features = tower, features
        self.sizes = list(patch_label_sizes(side).values())
        self.head = nn.Linear(size, sum(self.sizes))

    def forward(self, pixel_values: torch.Tensor, patch_labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes `loss`, and `correct`: the accuracy of each label on patches with an object.

        Args:
            pixel_values: `(batch, 3, h, w)`.
            patch_labels: classes `(batch, side², labels)`, see `data.scene_patches.patch_labels`.
        """
        logits = self.head(self.features(pixel_values)).split(self.sizes, -1)
        has_object = patch_labels[..., 0] > 0
        loss, correct = pixel_values.new_zeros(()), []
        for number, scores in enumerate(logits):
            targets = patch_labels[..., number]
            loss = loss + F.cross_entropy(scores[has_object], targets[has_object])
            loss = loss + EMPTY_WEIGHT * F.cross_entropy(scores[~has_object], targets[~has_object])
            correct.append((scores.argmax(-1) == targets)[has_object].float().mean())
        return {"loss": loss, "correct": torch.stack(correct).detach()}


@dataclass(frozen=True)
class TowerLesson:
    """Data and hyperparameters of a tower's pretraining.

    Args:
        image_size: pixels per side of the drawn scenes.
        side: features per side that the tower returns.
        steps, batch_size, learning_rate, seed: hyperparameters of the training.
        scenes: arguments of `data.scenes.sample_scene`.
    """

    image_size: int
    side: int
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 4e-3
    seed: int = 0
    scenes: Mapping[str, Any] = field(default_factory=dict)

    def drawn(self, count: int, seed: int, image_processor) -> ScenePatchDataset:
        """Returns `count` labelled scenes, normalised as by the tower's image processor."""
        return ScenePatchDataset(count, seed, image_processor, self.image_size, self.side, **self.scenes)


def pretrain_tower(
    tower: nn.Module,
    features: Callable[[torch.Tensor], torch.Tensor],
    image_processor,
    lesson: TowerLesson,
    output_dir: str | Path,
    extra_modules: Sequence[nn.Module] = (),
    trainer_arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Trains `tower` in place on scenes drawn on the fly.

    Args:
        tower: module to train.
        features: function from pixel values to features `(batch, side², size)`, one per patch in reading order.
        image_processor: the VLM's image processor.
        lesson: scenes, steps and learning rate.
        output_dir: folder of `Trainer`'s files and of `results.json`.
        extra_modules: further modules that `features` uses and that are trained, too.
        trainer_arguments: further fields of `CompressionTrainingArguments`.
        resume: resume from the newest checkpoint in `output_dir`, if there is one.

    Returns:
        label -> accuracy of the probe on patches with an object, on held-out scenes.
    """
    data = lesson.drawn(lesson.steps * lesson.batch_size, lesson.seed, image_processor)
    with torch.no_grad():
        size = features(data[0]["pixel_values"][None]).shape[-1]
    part = nn.ModuleList([tower, *extra_modules]) if extra_modules else tower
    probe = PatchProbe(part, features, size, lesson.side)
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": lesson.steps,
        "per_device_train_batch_size": lesson.batch_size,
        "learning_rate": lesson.learning_rate,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "warmup_steps": min(50, lesson.steps // 4),
        "lr_scheduler_type": "cosine",
        "logging_steps": 100,
        "save_steps": min(SAVE_STEPS, max(1, lesson.steps)),
        "save_total_limit": 1,
        "remove_unused_columns": False,
        "seed": lesson.seed,
    }
    args = CompressionTrainingArguments(**arguments | dict(trainer_arguments or {}))
    with _only_what_is_used(probe, data):
        trainer = CompressionTrainer(model=probe, args=args, train_dataset=data)
        trainer.train(choose_checkpoint(output_dir, resume, trainer.checkpoint_files()))
    correct = probe_accuracy(probe, lesson.drawn(128, lesson.seed + 1, image_processor))
    if PartialState().is_main_process:
        write_text(Path(output_dir) / "results.json", json.dumps(correct) + "\n")
    return correct


def earlier_accuracy(output_dir: str | Path) -> dict[str, float]:
    """Reads the result of an earlier `pretrain_tower` in `output_dir`; an empty dictionary if there is none."""
    file = Path(output_dir) / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@contextlib.contextmanager
def _only_what_is_used(probe: PatchProbe, data: ScenePatchDataset):
    """Freezes parameters that get no gradient (a CLIP tower's last norm), because DDP waits for every gradient."""
    probe(**{name: value[None] for name, value in data[0].items()})["loss"].backward()
    unused = [p for p in probe.parameters() if p.requires_grad and p.grad is None]
    probe.zero_grad()
    for parameter in unused:
        parameter.requires_grad_(False)
    yield
    for parameter in unused:
        parameter.requires_grad_(True)


@torch.no_grad()
def probe_accuracy(probe: PatchProbe, data: ScenePatchDataset) -> dict[str, float]:
    """Returns label -> accuracy of the probe on patches with an object."""
    device = next(probe.parameters()).device
    items = [data[i] for i in range(len(data))]
    batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
    probe.eval()
    correct = probe(**batch)["correct"].tolist()
    probe.train()
    return dict(zip(patch_label_sizes(data.side), correct))
