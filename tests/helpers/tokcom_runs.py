"""Small TokCom models, toy text and trainers of every stage, for the tests of the trainers."""

import torch

from tokcom_hf import (
    DenoiserTrainer,
    DenoiserTrainingArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    TokComConfig,
    TokComModel,
    TokComVAETrainer,
    TokComVAETrainingArguments,
)
from tokcom_hf.data.latent_rows import encode_rows, latent_statistics
from tokcom_hf.trainers.tokcom_stages import some_chunks

SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
VAE = {"vocab_size": 51, "latent_size": 16, "chunk_projection": "all", "fixed_norm": True, **SHAPE}
FLOW = {"standardize_latents": True, "noise_std": 1.0, "mse_weight": 1.0, "eos_token_id": 0}
# Every draw that training makes: sizes and places of blocks, noise, times, hidden contexts, self-conditioning.
BLOCKS = {"noise_draws": 2, "block_sizes": [1, 2, 0], "block_size": 1, "context_dropout": 0.2, "num_steps": 8}


class Rows(torch.utils.data.Dataset):
    """Seeded rows of ids below 50: random ones, or such that count up and are easily learned."""

    def __init__(self, count: int = 24, length: int = 16, counting: bool = False):
        generator = torch.Generator().manual_seed(0)
        if counting:
            self.ids = (torch.randint(0, 50, (count, 1), generator=generator) + torch.arange(length)) % 50
        else:
            self.ids = torch.randint(0, 50, (count, length), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "attention_mask": torch.ones_like(self.ids[index])}


def block_model(self_conditioning: bool = True, vae: dict | None = None, **flow) -> TokComModel:
    """With a context: blocks of any size."""
    torch.manual_seed(0)
    denoiser = {"self_conditioning": self_conditioning, **SHAPE}
    return TokComModel(TokComConfig(vae=VAE | (vae or {}), denoiser=denoiser, context=SHAPE, **FLOW | BLOCKS | flow))


def posterior_model(**flow) -> TokComModel:
    """With a context, and latents by way of their tokens, as the default of the recipe."""
    own = {"told_weight": 1.0, "heads_first": True, "token_order": 0.7, "recent_size": 8, "sampler": "multirate"}
    return block_model(self_conditioning=False, token_posterior=True, **own | flow)


def row_model(self_conditioning: bool = True, **flow) -> TokComModel:
    """Without a context: the whole row is one block, whose latents are encoded once."""
    torch.manual_seed(0)
    denoiser = {"self_conditioning": self_conditioning, **SHAPE}
    return TokComModel(TokComConfig(vae=VAE, denoiser=denoiser, **FLOW | {"clean_prefix": True} | flow))


def settings(folder, **changes) -> dict:
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "sample_every": 0,
        "remove_unused_columns": False, "use_cpu": True, "seed": 1, "report_to": "none",
    }  # fmt: skip
    return defaults | changes


def vae_trainer(folder, vae=None, rows=None, **changes) -> TokComVAETrainer:
    return TokComVAETrainer(
        model=vae or block_model(vae={"latent_noise": 0.5, "token_dropout": 0.1}).vae,
        args=TokComVAETrainingArguments(**settings(folder, **changes)),
        train_dataset=rows or Rows(),
        eval_dataset=Rows(6),
    )


def denoiser_trainer(folder, tokcom=None, rows=None, **changes) -> DenoiserTrainer:
    tokcom, rows = tokcom or block_model(), rows or Rows()
    if tokcom.context is None:
        rows = encode_rows(tokcom.vae, rows, folder / "latents.npy")
        tokcom.fit_latents(rows.mean, rows.std)
    else:
        tokcom.fit_latents(*latent_statistics(tokcom.vae, rows))
    if tokcom.posterior is not None:
        tokcom.posterior.fit(tokcom, some_chunks(rows, 4))
    arguments = DenoiserTrainingArguments(**settings(folder, **changes))
    return DenoiserTrainer(model=tokcom, args=arguments, train_dataset=rows, eval_dataset=rows)


def posterior_trainer(folder, tokcom=None, rows=None, **changes) -> DenoiserTrainer:
    return denoiser_trainer(folder, tokcom or posterior_model(), rows, **changes)


def row_trainer(folder, tokcom=None, rows=None, **changes) -> DenoiserTrainer:
    return denoiser_trainer(folder, tokcom or row_model(), rows, **changes)


def distillation_trainer(folder, teacher=None, rows=None, **changes) -> DistillationTrainer:
    if teacher is None:
        teacher = block_model()
        teacher.fit_latents(*latent_statistics(teacher.vae, Rows()))
        with torch.no_grad():
            # A new denoiser does not listen to time and context (adaLN-Zero): one step would be as good as eight.
            for parameter in teacher.denoiser.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    arguments = DistillationTrainingArguments(**settings(folder, **changes))
    return DistillationTrainer(args=arguments, teacher=teacher, train_dataset=rows or Rows(), eval_dataset=Rows(6))


# Stage -> its trainer; "rows" is the denoiser's stage of a model without a context.
STAGES = {
    "vae": vae_trainer, "denoiser": denoiser_trainer, "posterior": posterior_trainer, "rows": row_trainer,
    "distill": distillation_trainer,
}  # fmt: skip


def losses(trainer) -> list[float]:
    """Training losses as they were logged."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
