"""Registers all models with the Auto classes and all pipelines with transformers, without importing them.

`MODELS` has one row per model, `PIPELINES` one per pipeline. After `import tokcom_hf`, `AutoModel.from_pretrained(folder)`
works without `trust_remote_code` and imports only the model it needs. `register_for_auto_class` makes `save_pretrained` copy
the model's code, so that the folder also loads with `trust_remote_code=True` where the package is not installed.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

# If several threads import transformers for the first time at once, all but one fail; this import is serialised by the
# import lock of this package.
import transformers  # noqa: F401

from .lazy import LazyMapping, when_imported

AUTO = "transformers.models.auto"
PACKAGE = "tokcom_hf.models"


class ModelRow(NamedTuple):
    """Where a model lives: `configuration_<stem>.py` and `modeling_<stem>.py` in `tokcom_hf.models`."""

    stem: str
    model_type: str
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
    """A processor or image processor (`auto_class` is AutoProcessor or AutoImageProcessor) and its model's config class."""

    stem: str
    processor: str
    config: str
    auto_class: str = "AutoProcessor"


MODELS: tuple[ModelRow, ...] = (
    ModelRow("tokcom_vae", "tokcom_vae", "TokComVAEConfig", "TokComVAE"),
    ModelRow("tokcom_denoiser", "tokcom_denoiser", "DenoisedModelConfig", "DenoisedModel"),
    ModelRow("tokcom", "tokcom", "TokComConfig", "TokComModel"),
    ModelRow("vqgan", "tokcom_vqgan", "VQGANConfig", "VQGAN"),
    ModelRow("vqgan_discriminator", "tokcom_vqgan_discriminator", "VQGANDiscriminatorConfig", "VQGANDiscriminator"),
    ModelRow("pruning_token_merger", "tokcom_token_merger", "TokenMergerConfig", "TokenMerger"),
    ModelRow("pruning_layer_pruner", "tokcom_layer_pruner", "LayerPrunerConfig", "LayerPruner"),
    ModelRow(
        "pruning_discriminator", "tokcom_pruning_discriminator", "PruningDiscriminatorConfig", "PruningDiscriminator"
    ),
    ModelRow(
        "pruned_vlm", "tokcom_pruned_vlm", "PrunedVLMConfig", "PrunedVLM", ("AutoModel", "AutoModelForImageTextToText")
    ),
    ModelRow("lfq_quantizer", "tokcom_lfq", "LFQConfig", "LFQQuantizer"),
    ModelRow(
        "lfq_expanded",
        "tokcom_lfq_expanded",
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
    return getattr(import_module(f"{PACKAGE}.{module}"), name)


def register_all() -> None:
    """Registers models, processors and pipelines; safe to call twice.

    The registration runs when the module of an Auto class is imported; a class of this package is imported when an Auto
    class first needs it.
    """
    for row in MODELS:
        when_imported(f"{PACKAGE}.configuration_{row.stem}", _travels(row.config, "AutoConfig"))
        when_imported(f"{PACKAGE}.modeling_{row.stem}", _travels(row.model, row.auto_classes[0]))
    for processor in PROCESSORS:
        when_imported(f"{PACKAGE}.{processor.stem}", _travels(processor.processor, processor.auto_class))
    when_imported(f"{AUTO}.configuration_auto", _register_configs)
    when_imported(f"{AUTO}.modeling_auto", _register_models)
    when_imported(f"{AUTO}.image_processing_auto", _register_image_processors)
    when_imported(f"{AUTO}.processing_auto", _register_processors)
    when_imported("transformers.pipelines", _register_pipelines)


def _travels(name: str, auto_class: str) -> Callable[[ModuleType], None]:
    """Returns a callback that makes `save_pretrained` of class `name` copy its code into the folder."""
    return lambda module: getattr(module, name).register_for_auto_class(auto_class)


def _extra(mapping) -> LazyMapping:
    """Returns the `_extra_content` of an Auto mapping, which `register` fills, as one that can hold deferred classes."""
    if not isinstance(mapping._extra_content, LazyMapping):
        mapping._extra_content = LazyMapping(mapping._extra_content)
    return mapping._extra_content


def _register_configs(module: ModuleType) -> None:
    extra = _extra(module.CONFIG_MAPPING)
    for row in MODELS:
        extra.defer(row.model_type, partial(_entry, row.model_type, f"configuration_{row.stem}", row.config))


def _entry(key: str, module: str, name: str) -> tuple[str, type]:
    return key, load(module, name)


def _register_for_config(mapping, config: str, module: str, name: str, backend: str | None = None) -> None:
    """Defers the entry config class → class `name`, or config class → {backend: class} if the mapping has backends."""
    stem = next(row.stem for row in MODELS if row.config == config)

    def entry() -> tuple[type, Any]:
        value = load(module, name)
        return load(f"configuration_{stem}", config), value if backend is None else {backend: value}

    _extra(mapping).defer(f"{PACKAGE}.configuration_{stem}.{config}", entry)


def _register_models(module: ModuleType) -> None:
    for row in MODELS:
        for auto_class in row.auto_classes:
            mapping = getattr(module, auto_class)._model_mapping
            _register_for_config(mapping, row.config, f"modeling_{row.stem}", row.model)


def _register_image_processors(module: ModuleType) -> None:
    for row in PROCESSORS:
        if row.auto_class == "AutoImageProcessor":
            _register_for_config(module.IMAGE_PROCESSOR_MAPPING, row.config, row.stem, row.processor, backend="pil")


def _register_processors(module: ModuleType) -> None:
    for row in PROCESSORS:
        if row.auto_class == "AutoProcessor":
            _register_for_config(module.PROCESSOR_MAPPING, row.config, row.stem, row.processor)


def _register_pipelines(module: ModuleType) -> None:
    for row in PIPELINES:
        auto_classes = next(model.auto_classes for model in MODELS if model.model == row.model)
        # Auto classes, not model classes: a saved pipeline names them, and transformers looks these names up in itself.
        task = LazyMapping({"pt": tuple(getattr(module, name) for name in auto_classes), "type": row.kind})
        task.defer("impl", partial(_entry, "impl", f"pipeline_{row.stem}", row.pipeline))
        module.PIPELINE_REGISTRY.supported_tasks[row.task] = task
