"""The pipeline tasks of a model folder, and `save_pipeline`, which saves a pipeline with its code."""

import copy
import os
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save

# `pipeline(model=folder)` without a task runs the first task of the family. transformers looks up the classes under "pt" in
# its own namespace, so they must be Auto classes.
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "tokcom": {
        "tokcom-generation": {
            "impl": "pipeline_tokcom.TokComGenerationPipeline",
            "pt": ["AutoModel"],
            "type": "text",
        },
    },
    "vqgan": {
        "vq-reconstruction": {
            "impl": "pipeline_vqgan.VQReconstructionPipeline",
            "pt": ["AutoModel"],
            "type": "image",
        },
        "vq-tokenize": {"impl": "pipeline_vqgan.VQTokenizePipeline", "pt": ["AutoModel"], "type": "image"},
    },
    "lfq": {
        "lfq-image-text": {"impl": "pipeline_lfq.LFQImageTextPipeline", "pt": ["AutoModel"], "type": "multimodal"},
    },
    "pruned_vlm": {
        "pruned-image-text-to-text": {
            "impl": "pipeline_pruned_vlm.PrunedImageTextToTextPipeline",
            "pt": ["AutoModel"],
            "type": "multimodal",
        },
    },
}


class PipelineTasks(dict):
    """`config.custom_pipelines`, as `pipeline()` reads it.

    Iteration gives one task, which `pipeline(model=folder)` runs; every task of the family is found by name. In the
    installed package no task is found, so that `pipeline()` takes the registered class: the folder's copy of the code would
    need `trust_remote_code`.

    Args:
        family: key of `TASKS`.
        default: value in config.json, or name of the task to list; None lists the family's first task.
    """

    def __init__(self, family: str, default: str | dict | None = None):
        name = next(iter(default), None) if isinstance(default, dict) else default
        self.family = family
        self.default = name if name in TASKS[family] else next(iter(TASKS[family]))
        super().__init__({self.default: self[self.default]})

    def __contains__(self, task: object) -> bool:
        return __name__.startswith("transformers_modules.") and task in TASKS[self.family]

    def __getitem__(self, task: str) -> dict[str, Any]:
        # A copy, because `pipeline()` writes into it.
        return copy.deepcopy(TASKS[self.family][task])

    def __reduce__(self):
        return PipelineTasks, (self.family, self.default)


def save_pipeline(pipe, folder: str | os.PathLike, family: str, push_to_hub: bool = False, **kwargs) -> None:
    """Saves model, tokenizer, processors and code of `pipe`, and makes its task the folder's default.

    Args:
        family: key of `TASKS`.
        kwargs: passed to the model's `save_pretrained`.

    Raises:
        NotADirectoryError: `folder` is a file.
        ValueError: `push_to_hub=True`, which would upload before all files are written.
    """
    if os.path.isfile(folder):
        raise NotADirectoryError(f"{str(folder)!r} is a file; a pipeline is saved in a folder.")
    if push_to_hub:
        raise ValueError("save_pretrained only writes the folder; upload it with pipe.push_to_hub('user/name').")
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = pipe.model.config
    before = config.custom_pipelines
    config.custom_pipelines = PipelineTasks(family, pipe.task)
    try:
        pipe.model.save_pretrained(folder, **kwargs)
    finally:
        config.custom_pipelines = before
    for name in ("tokenizer", "image_processor") if pipe.processor is None else ("processor",):
        part = getattr(pipe, name)
        if part is not None:
            part.save_pretrained(folder)
    custom_object_save(pipe, folder)
