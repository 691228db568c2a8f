"""Two ranks and awkward data: `python -m tests.helpers.rank_data FOLDER` writes what each rank and one process told.

`--killed FOLDER`: one rank ends without a goodbye once two steps are done; start it under a launcher.
"""

import os
import sys
from pathlib import Path

import torch

from tests.helpers.forks import start, wait
from tests.helpers.processes import Kill
from tests.helpers.rank_worker import apart, quiet_vae, states
from tests.helpers.tokcom_runs import Rows, losses
from tokcom_hf.cli import leave_together


class Stream(torch.utils.data.IterableDataset):
    """`count` rows without a length, told apart by their first token."""

    def __init__(self, count: int = 24):
        self.count = count

    def __iter__(self):
        for row in range(self.count):
            yield {"input_ids": (torch.arange(16) + row) % 50, "attention_mask": torch.ones(16, dtype=torch.long)}


def trainer_of(folder: Path, world: int, rows, **changes):
    defaults = {"per_device_train_batch_size": 8 // world, "max_steps": -1, "num_train_epochs": 2}
    folder.mkdir(parents=True, exist_ok=True)
    trainer = quiet_vae(folder, rows=rows, **defaults | changes)
    trainer.seen = []  # first tokens of this rank's rows, step by step
    compute = trainer.compute_loss

    def remember(model, inputs, *args, **kwargs):
        trainer.seen.append(inputs["input_ids"][:, 0].tolist())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = remember
    return trainer


def told_of(trainer) -> dict:
    gap = apart(states(trainer)) if trainer.args.world_size > 1 else 0.0
    return {"losses": losses(trainer), "steps": trainer.state.global_step, "apart": gap, "seen": trainer.seen}


def run(work: Path, world: int, rank: int) -> None:
    told = {}
    for name, rows, changes in (
        ("uneven", Rows(22), {}),
        ("dropped", Rows(22), {"dataloader_drop_last": True}),
        ("one_row", Rows(1), {}),
        ("stream", Stream(), {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}),
    ):
        trainer = trainer_of(work / f"{name}-{world}", world, rows, **changes)
        trainer.train()
        told[name] = told_of(trainer)
    trainer = trainer_of(work / f"again-{world}", world, Stream(), max_steps=5)
    trainer.train(resume_from_checkpoint=str(work / f"stream-{world}" / "checkpoint-2"))
    told["stream_again"] = told_of(trainer)
    try:
        trainer_of(work / "none", world, Rows(3), dataloader_drop_last=True).train()
    except ValueError as error:
        told["none"] = str(error)
    torch.save(told, work / (f"told-{rank}.pt" if world > 1 else "told.pt"))
    del trainer
    leave_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--killed":
        # Ranks that are not told to use the CPU: each must not train alone.
        trainer = trainer_of(Path(sys.argv[2]), 2, Rows(), num_train_epochs=1000, use_cpu=False)
        assert trainer.accelerator.num_processes == 2
        if os.environ["RANK"] == "1":
            trainer.add_callback(Kill(2))
        trainer.train()
    else:
        work = Path(sys.argv[1])
        wait(*start(lambda rank: run(work, 1, rank)))
        wait(*start(lambda rank: run(work, 2, rank), 2))
