"""All trainers keep what `Trainer` promises: its defaults work, metrics see predictions, the best model is chosen."""

import pytest
import torch

from tests.helpers.joint_lfq_run import make_trainer as joint_trainer
from tests.helpers.pruning_run import make_trainer as pruning_trainer
from tokcom_hf import (
    VQGAN,
    DenoiserTrainer,
    DenoiserTrainingArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    JointLFQTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAETrainer,
    TokComVAETrainingArguments,
    TokenPruningTrainingArguments,
    VQGANConfig,
    VQGANDiscriminator,
    VQGANDiscriminatorConfig,
    VQGANImageProcessor,
    VQGANTrainingArguments,
)
from tokcom_hf.data.images import ProceduralImages
from tokcom_hf.data.latent_rows import encode_rows
from tokcom_hf.trainers.base import CompressionTrainingArguments
from tokcom_hf.trainers.vqgan import VQGANTrainer

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
# Trainer's own default, which drops every column that no forward names.
COMMON = {"remove_unused_columns": True, "max_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
BATCH = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 12):
        self.ids = torch.randint(0, 50, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = torch.ones(16, dtype=torch.long)
        mask[16 - 4 * (index % 2) :] = 0
        return {"input_ids": self.ids[index], "attention_mask": mask, "document": f"number {index}"}


def tokcom(**changes) -> TokComModel:
    """Blocks of one chunk behind a context; with context=None the whole row at once."""
    torch.manual_seed(0)
    vae = {"vocab_size": 51, "latent_size": 16, "chunk_projection": "all", "fixed_norm": True, **SHAPE}
    flow = {"standardize_latents": True, "noise_std": 1.0, "mse_weight": 1.0, "cross_entropy_weight": 0.3}
    denoiser = {"self_conditioning": True, **SHAPE}
    blocks = {"context": SHAPE, "block_sizes": [1, 2, 0], "block_size": 1, "noise_draws": 2}
    rows = {"context": None, "clean_prefix": True}
    place = rows if "context" in changes else blocks
    return TokComModel(TokComConfig(vae=vae, denoiser=denoiser, eos_token_id=0, **flow | place | changes))


def vae_trainer(folder, compute_metrics=None, **changes):
    args = TokComVAETrainingArguments(str(folder), **COMMON | BATCH | {"sample_every": 0} | changes)
    return TokComVAETrainer(
        tokcom().vae, args, train_dataset=Rows(), eval_dataset=Rows(6), compute_metrics=compute_metrics
    )


def denoiser_trainer(folder, compute_metrics=None, model=None, **changes):
    model = model or tokcom()
    args = DenoiserTrainingArguments(str(folder), **COMMON | BATCH | {"sample_every": 0} | changes)
    return DenoiserTrainer(model, args, train_dataset=Rows(), eval_dataset=Rows(6), compute_metrics=compute_metrics)


def row_trainer(folder, compute_metrics=None, **changes):
    model = tokcom(context=None)
    latents, held_out = (encode_rows(model.vae, Rows(n), folder / f"{n}.npy") for n in (12, 6))
    model.fit_latents(latents.mean, latents.std)
    args = DenoiserTrainingArguments(str(folder), **COMMON | BATCH | {"sample_every": 0} | changes)
    return DenoiserTrainer(model, args, train_dataset=latents, eval_dataset=held_out, compute_metrics=compute_metrics)


def distillation_trainer(folder, **changes):
    args = DistillationTrainingArguments(str(folder), **COMMON | BATCH | {"sample_every": 0} | changes)
    return DistillationTrainer(args=args, teacher=tokcom(), train_dataset=Rows(), eval_dataset=Rows(6))


def vqgan_trainer(folder, compute_metrics=None, **changes):
    torch.manual_seed(0)
    config = {
        "image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "channel_multipliers": [1, 2],
        "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1, "mid_attention": False, "codebook_init": "kmeans",
    }  # fmt: skip
    settings = {"perceptual": "random", "init_images": 16, "num_pictures": 0}
    processor = VQGANImageProcessor(16, size_divisor=4)
    return VQGANTrainer(
        VQGAN(VQGANConfig(**config)),
        VQGANTrainingArguments(str(folder), **COMMON | BATCH | settings | changes),
        VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=1)),
        train_dataset=ProceduralImages(16, processor),
        eval_dataset=ProceduralImages(6, processor, first=1000),
        compute_metrics=compute_metrics,
    )


TRAINERS = {
    "vae": vae_trainer,
    "denoiser": denoiser_trainer,
    "rows": row_trainer,
    "vqgan": vqgan_trainer,
    "pruning": lambda folder, compute_metrics=None, **changes: with_metrics(
        pruning_trainer, folder, compute_metrics, changes
    ),
    "joint": lambda folder, compute_metrics=None, **changes: with_metrics(
        joint_trainer, folder, compute_metrics, changes
    ),
}


def with_metrics(make, folder, compute_metrics, changes):
    trainer = make(folder, **COMMON | BATCH | changes)
    trainer.compute_metrics = compute_metrics
    return trainer


@pytest.fixture(params=TRAINERS)
def make(request):
    return request.param, TRAINERS[request.param]


def test_trainers_defaults_work_and_metrics_see_predictions_and_labels(tmp_path, make):
    name, build = make
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.predictions)}

    trainer = build(tmp_path, compute_metrics)
    trainer.train()
    count = len(trainer.eval_dataset)
    assert trainer.evaluate()["eval_rows"] == count
    predictions, labels = seen["predictions"], seen["labels"]
    assert len(predictions) == len(labels) == count
    if name == "vqgan":
        assert predictions.shape == labels.shape == (count, 3, 16, 16)
        assert abs(((predictions - labels) ** 2).mean() - trainer.evaluate()["eval_mse"]) < 1e-5
    else:
        assert predictions.shape[:2] == labels.shape and predictions.ndim == 3 and (labels >= 0).any()
    told = trainer.predict(trainer.eval_dataset)
    assert told.predictions is not None and told.label_ids is not None and told.metrics["test_rows"] == count
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.flatten(1).argmax(-1)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (count,)


def test_predictions_of_the_vae_are_its_reconstructions(tmp_path):
    trainer = vae_trainer(tmp_path)
    rows = [trainer.eval_dataset[index] for index in range(6)]
    ids = torch.stack([row["input_ids"] for row in rows])
    model = trainer.model.eval()
    told = trainer.predict(trainer.eval_dataset)
    assert torch.equal(torch.as_tensor(told.predictions).argmax(-1), model.decode(model.encode(ids)))
    padded = torch.stack([row["attention_mask"] for row in rows]) == 0
    assert (torch.as_tensor(told.label_ids)[padded] == -100).all()
    assert torch.equal(torch.as_tensor(told.label_ids)[~padded], ids[~padded])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_predictions_stand_at_their_labels_whatever_the_block_size(tmp_path, size):
    # Rows of four chunks: blocks of three leave one chunk, blocks of eight are longer than the row.
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {}

    denoiser_trainer(tmp_path, compute_metrics, tokcom(block_size=size)).evaluate()
    assert seen["shapes"] == ((6, 16, 51), (6, 16))


@pytest.mark.parametrize("name", [*TRAINERS, "distill"])
def test_the_best_model_by_the_default_metric_and_early_stopping(tmp_path, name):
    build = TRAINERS.get(name, distillation_trainer)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, load_best_model_at_end=True, early_stopping_patience=3, **evaluated)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) == 2 and trainer.state.best_metric == pytest.approx(min(losses))
    assert trainer.state.best_model_checkpoint is not None


def test_early_stopping_without_a_default_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match=r"early_stopping_patience 2 counts evaluations.*--eval_strategy steps"):
        VQGANTrainingArguments(str(tmp_path), early_stopping_patience=2)
    args = CompressionTrainingArguments(str(tmp_path), early_stopping_patience=2, eval_strategy="epoch", use_cpu=True)
    assert args.metric_for_best_model == "loss" and args.greater_is_better is False


def test_an_optimizer_that_would_not_be_used_is_refused(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True}
    assert CompressionTrainingArguments(**common, optim="adafactor").optim == "adafactor"
    with pytest.raises(ValueError, match=r"--optim .*adafactor would do nothing.*--muon_learning_rate 0"):
        CompressionTrainingArguments(**common, optim="adafactor", muon_learning_rate=0.1)
    for cls in (TokenPruningTrainingArguments, JointLFQTrainingArguments):
        with pytest.raises(ValueError, match="own optimizer"):
            cls(**common, optim="adafactor")
        with pytest.raises(ValueError, match=r"muon_learning_rate 0\.1 would do nothing"):
            cls(**common, muon_learning_rate=0.1)


def test_other_arguments_are_refused_and_none_are_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(TokComVAETrainer(tokcom().vae).args, TokComVAETrainingArguments)
    args = CompressionTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"needs args of class TokComVAETrainingArguments, got Compression"):
        TokComVAETrainer(tokcom().vae, args)


@pytest.mark.parametrize("name", ["vae", "denoiser", "rows", "distill", "vqgan"])
def test_bf16_trains_and_evaluates(tmp_path, name):
    build = TRAINERS.get(name, distillation_trainer)
    trainer = build(tmp_path, bf16=True, eval_strategy="steps", eval_steps=1, logging_steps=1)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(value.dtype == before[key].dtype for key, value in trainer.model.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert name == "distill" or trainer.predict(trainer.eval_dataset).predictions is not None
