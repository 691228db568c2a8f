"""Trains a small Llama on captions: the base model of recipes that expand a vocabulary, if none is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM

from ..checkpoints import choose_checkpoint
from ..trainers.base import CompressionTrainer, CompressionTrainingArguments
from .small_internvl import scene_tile_processor


class _Captions(Dataset):
    def __init__(self, captions: list[str], tokenizer):
        eos = tokenizer.eos_token_id
        self.rows = [[*ids, eos] for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index]}


def train_caption_llama(
    captions: list[str], text: dict[str, Any], steps: int, folder: str | Path, seed: int, resume: bool = False
):
    """Trains a Llama on captions of procedural scenes.

    Args:
        captions: training texts.
        text: fields of `LlamaConfig`, except those of the vocabulary. The embedding table is padded to a multiple of 64
            rows, as in large models.
        steps: number of optimizer steps, with batches of 64.
        folder: output folder of the trainer.
        seed: seed of the weights and of the order of captions.
        resume: resume from the newest checkpoint in `folder`, if there is one.

    Returns:
        the model and its word-level tokenizer.
    """
    tokenizer = scene_tile_processor(16, 1).tokenizer
    torch.manual_seed(seed)
    config = LlamaConfig(
        **text
        | {
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    model = LlamaForCausalLM(config)
    args = CompressionTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        # The checkpoint of the last step is needed if the run is stopped before the model is saved.
        save_steps=max(1, steps),
        save_total_limit=1,
        report_to="none",
        logging_steps=50,
        seed=seed,
    )
    if steps:
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = _Captions(captions, tokenizer)
        trainer = CompressionTrainer(model, args, data_collator=collator, train_dataset=rows)
        trainer.train(choose_checkpoint(folder, resume, trainer.checkpoint_files()))
    return model.eval(), tokenizer
