"""Rows for a tiny Llama of the trainers' tests, the same in every process."""

import torch


class Rows(torch.utils.data.Dataset):
    """16 rows of 8 random ids from 3 on, below `vocab_size`; labels are the ids."""

    def __init__(self, vocab_size: int = 20):
        self.vocab_size = vocab_size

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, self.vocab_size, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}
