"""Loads every row's folder by Auto classes in a process of its own: `fresh.py package|remote FOLDERS.json OUT`.

`remote`: the package cannot be imported; everything comes from the folders with `trust_remote_code=True`.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers
from parts import use_part
from rows import ROWS, loss_of, outputs

mode, folders, out = sys.argv[1:]
options: dict = {}
if mode == "remote":
    sys.modules["tokcom_hf"] = None  # type: ignore[assignment]  # importing it raises ImportError
    options = {"trust_remote_code": True}
else:
    import tokcom_hf  # noqa: F401  # registers the Auto classes

torch.set_num_threads(1)


def look(row, folder: str) -> dict:
    found: dict = {}
    for auto_class in dict.fromkeys(("AutoModel", row.auto_class)):
        model = getattr(transformers, auto_class).from_pretrained(folder, **options).eval()
        found[auto_class] = {"outputs": outputs(row, model), "module": type(model).__module__}
    if row.generate is not None:
        found["generated"] = row.generate(model)
    found["losses"] = steps(row, model)
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    found["config"] = {
        "class": type(config).__name__,
        "module": type(config).__module__,
        "values": json.loads(config.to_json_string(use_diff=False)),
    }
    found["parts"] = {}
    for part in row.parts:
        loaded = getattr(transformers, part).from_pretrained(folder, **options)
        found["parts"][part] = {"made": use_part(loaded), "class": type(loaded).__name__}
    return found


def steps(row, model) -> list[float]:
    """The loss before and after two training steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        loss = loss_of(row, model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


results = {}
for row in ROWS:
    try:
        results[row.name] = look(row, json.loads(Path(folders).read_text())[row.name])
    except Exception:
        results[row.name] = {"error": traceback.format_exc()}
torch.save(results, out)
