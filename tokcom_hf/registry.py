"""Registers every model of the package with the Auto classes and every pipeline with transformers.

One row per model in `MODELS`, one per pipeline in `PIPELINES`. A row whose module is listed here is registered when
`tokcom_hf` is imported, so `AutoModel.from_pretrained(folder)` works without `trust_remote_code`;
`register_for_auto_class` makes `save_pretrained` copy the model's code, so that the folder also loads, with
`trust_remote_code=True`, where the package is not installed.
"""

from importlib import import_module
from typing import NamedTuple

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY


class ModelRow(NamedTuple):
    """Where a model lives: `configuration_<stem>.py` and `modeling_<stem>.py` in `tokcom_hf.models`."""

    stem: str
    config: str
    model: str
    auto_classes: tuple[str, ...] = ("AutoModel",)


class PipelineRow(NamedTuple):
    """A pipeline task, its class in `tokcom_hf.models.pipeline_<stem>` and the model class it runs."""

    task: str
    stem: str
    pipeline: str
    model: str
    kind: str


class ProcessorRow(NamedTuple):
    """A processor-like class (`auto_class` may be AutoProcessor or AutoImageProcessor) and the config it belongs to."""

    stem: str
    processor: str
    config: str
    auto_class: str = "AutoProcessor"


MODELS: tuple[ModelRow, ...] = (
    ModelRow("tokcom_vae", "TokComVAEConfig", "TokComVAE"),
    ModelRow("tokcom_denoiser", "DenoisedModelConfig", "DenoisedModel"),
    ModelRow("tokcom", "TokComConfig", "TokComModel"),
    ModelRow("vqgan", "VQGANConfig", "VQGAN"),
    ModelRow("vqgan_discriminator", "VQGANDiscriminatorConfig", "VQGANDiscriminator"),
    ModelRow("token_merger", "TokenMergerConfig", "TokenMerger"),
    ModelRow("layer_pruner", "LayerPrunerConfig", "LayerPruner"),
    ModelRow("pruning_discriminator", "PruningDiscriminatorConfig", "PruningDiscriminator"),
    ModelRow("pruned_vlm", "PrunedVLMConfig", "PrunedVLM", ("AutoModel", "AutoModelForImageTextToText")),
    ModelRow("lfq", "LFQConfig", "LFQQuantizer"),
    ModelRow(
        "lfq_expanded",
        "LFQExpandedConfig",
        "LFQExpandedModel",
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    ),
)
PIPELINES: tuple[PipelineRow, ...] = (
    PipelineRow("tokcom-generation", "tokcom", "TokComGenerationPipeline", "TokComModel", "text"),
    PipelineRow("vq-reconstruction", "vqgan", "VQReconstructionPipeline", "VQGAN", "image"),
    PipelineRow("vq-tokenize", "vqgan", "VQTokenizePipeline", "VQGAN", "image"),
    PipelineRow("lfq-image-text", "lfq", "LFQImageTextPipeline", "LFQExpandedModel", "multimodal"),
    PipelineRow("pruned-image-text-to-text", "pruned_vlm", "PrunedImageTextToTextPipeline", "PrunedVLM", "multimodal"),
)
PROCESSORS: tuple[ProcessorRow, ...] = (
    ProcessorRow("image_processing_vqgan", "VQGANImageProcessor", "VQGANConfig", "AutoImageProcessor"),
    ProcessorRow("processing_lfq", "LFQProcessor", "LFQExpandedConfig"),
)


def load(module: str, name: str):
    """Returns attribute `name` of `tokcom_hf.models.<module>`."""
    return getattr(import_module(f"tokcom_hf.models.{module}"), name)


def register_all() -> None:
    """Registers models, processors and pipelines; safe to call twice."""
    configs, auto_classes = {}, {}
    for row in MODELS:
        config_class = configs[row.config] = load(f"configuration_{row.stem}", row.config)
        model_class = load(f"modeling_{row.stem}", row.model)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        auto_classes[row.model] = tuple(getattr(transformers, name) for name in row.auto_classes)
        for auto_class in auto_classes[row.model]:
            auto_class.register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(row.auto_classes[0])
    for processor in PROCESSORS:
        processor_class = load(processor.stem, processor.processor)
        if processor.auto_class == "AutoImageProcessor":
            # The keyword was renamed between 5.x releases; the positional slot is the processor class in all of them.
            transformers.AutoImageProcessor.register(configs[processor.config], processor_class, exist_ok=True)
        else:
            AutoProcessor.register(configs[processor.config], processor_class, exist_ok=True)
        processor_class.register_for_auto_class(processor.auto_class)
    for task in PIPELINES:
        if task.task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(
                task.task,
                pipeline_class=load(f"pipeline_{task.stem}", task.pipeline),
                # A pipeline saved with its code names Auto classes: transformers looks the names up in itself.
                pt_model=auto_classes[task.model],
                type=task.kind,
            )
