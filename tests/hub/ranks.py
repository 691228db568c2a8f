"""Two gloo ranks train every row: `torchrun --nproc_per_node 2 ranks.py FOLDERS.json OUT`.

Each rank has one row of the batch. The gradients of both must be the mean of what one process computes for each row, and
after a training step both must hold the same weights and buffers.
"""

import copy
import sys
import traceback

import torch
import torch.distributed as dist
from rows import ROWS, tensors
from torch.nn.parallel import DistributedDataParallel

from tokcom_hf.endings import leave_together

torch.set_num_threads(1)
dist.init_process_group("gloo")
RANK = dist.get_rank()
assert dist.get_world_size() == 2


def part_of(inputs: dict, rank: int) -> dict:
    """One row of the batch."""

    def cut(value):
        if isinstance(value, list):
            return [cut(one) for one in value]
        return value[rank : rank + 1] if torch.is_tensor(value) and value.dim() else value

    return {name: cut(value) for name, value in inputs.items()}


def loss_on(row, model, rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = row.inputs()
    inputs |= row.labels(inputs) if row.labels is not None else {}
    output = model(**part_of(inputs, rank))
    if row.labels is not None:
        return output.loss
    return sum(value.float().square().mean() for value in tensors(output).values() if value.requires_grad)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def look(row) -> dict:
    alone = []
    for rank in range(2):
        model = row.build()
        loss_on(row, model, rank).backward()
        alone.append(gradients(model))
    model = row.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in alone[0])  # DDP waits for every gradient that it expects
    wrapped = DistributedDataParallel(model)
    loss_on(row, wrapped, RANK).backward()
    together = gradients(model)
    gap = max(
        float((together[n] - (alone[0][n] + alone[1][n]) / 2).abs().max() / alone[0][n].abs().max().clamp(min=1e-3))
        for n in together
    )
    # A training step, with whatever a model shares between ranks in training mode.
    wrapped.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        loss_on(row, wrapped, RANK).backward()
        optimizer.step()
    moved, apart = 0, 0.0
    for name, value in model.state_dict().items():
        moved += int(not torch.equal(value, before[name]))
        mine = value.detach().double()
        first = mine.clone()
        dist.broadcast(first, 0)
        largest = (mine - first).abs().max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        apart = max(apart, float(largest))
    return {"gap": gap, "moved": moved, "apart": apart, "trained": len(together)}


results = {}
for row in ROWS:
    try:
        results[row.name] = look(row)
    except Exception:
        results[row.name] = {"error": traceback.format_exc()}
if RANK == 0:
    torch.save(results, sys.argv[-1])
# It collects wrapped models first: a rank that exits while one still holds the process group may abort.
leave_together()
