"""200 AdamW steps with weight decay and momentum leave every old row bitwise as it was, however the model is trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tokcom_hf import LFQExpandedModel
from tokcom_hf.cli import leave_together
from tokcom_hf.models.lfq_rows import vocabulary_of

OLD, BITS = 40, 5


class Rows(Dataset):
    """Text, then LFQ ids."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(OLD, (4,), generator=generator)
        ids = torch.cat([text, torch.randint(OLD, OLD + 2**BITS, (4,), generator=generator)])
        return {"input_ids": ids, "labels": ids.clone()}


def expanded(tied: bool = False) -> LFQExpandedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=OLD,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LFQExpandedModel.from_base(LlamaForCausalLM(config), output_dim=BITS)


def trainer(model, folder, **changes) -> Trainer:
    values = {
        "max_steps": 200,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.05,
        "adam_beta1": 0.9,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1000,
    }
    args = TrainingArguments(output_dir=str(folder), **values | changes)
    return Trainer(model=model, args=args, train_dataset=Rows())


def tables(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for module in vocabulary_of(model.base) for parameter in module.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_old_rows_stay_bitwise(tmp_path, tied, changes):
    model = expanded(tied)
    before, rows = tables(model), model.lfq_rows.embedding.detach().clone()
    with torch.no_grad():
        logits = model.base(torch.arange(OLD)[None]).logits
    run = trainer(model, tmp_path, **changes)
    run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, tables(model), strict=True))
    assert not torch.equal(rows, model.lfq_rows.embedding)
    embedding, head = vocabulary_of(model.base)
    assert (embedding.weight is head.weight) == tied
    # No optimizer state for an old row.
    sizes = {tuple(p.shape) for p in run.optimizer.state}
    assert (OLD, 16) not in sizes and (2**BITS, 16) in sizes
    with torch.no_grad():
        assert not torch.equal(model.base(torch.arange(OLD)[None]).logits, logits), "the body trains here"


@pytest.mark.slow
def test_frozen_in_the_middle_of_training(tmp_path):
    model = expanded()
    model.freeze_original_rows(False)
    before = tables(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    batch = torch.stack([Rows()[i]["input_ids"] for i in range(8)])

    def steps(count):
        for _ in range(count):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(20)
    middle = tables(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, middle, strict=True))
    # With a gradient at hand and momentum in the optimizer, which holds the old rows on.
    model(input_ids=batch, labels=batch).loss.backward()
    model.freeze_original_rows()
    optimizer.step()
    optimizer.zero_grad()
    steps(180)
    assert all(torch.equal(a, b) for a, b in zip(middle, tables(model), strict=True))


@pytest.mark.slow
def test_two_ranks_keep_old_rows_and_agree_with_one_process(tmp_path):
    def start(name, batch, *launcher):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *launcher, __file__, str(tmp_path / name), str(batch)]
        return subprocess.Popen(command, env=environment)

    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2")
    runs = [start("one", 4), start("two", 2, *launcher)]
    assert [run.wait(240) for run in runs] == [0, 0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start_state = expanded().state_dict()
    for name in ("base.model.embed_tokens.weight", "base.lm_head.weight"):
        assert torch.equal(two[name], start_state[name]) and torch.equal(one[name], start_state[name])
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0, msg=name)
    assert not torch.equal(two["lfq_rows.head"], start_state["lfq_rows.head"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    launched = trainer(
        expanded(), Path(sys.argv[1]), per_device_train_batch_size=int(sys.argv[2]), max_steps=200, learning_rate=1e-3
    )
    launched.train()
    launched.save_model()
    del launched
    leave_together()
