"""tokcom_hf: Hugging Face models that need fewer tokens for text, images, and vision-language prompts.

Importing the package registers its models with the Auto classes and its pipelines with `pipeline()`. Models, pipelines and
trainers are imported at their first use.
"""

from importlib import import_module

from .former_names import install
from .registry import MODELS, register_all

__version__ = "0.3.0"

# Public name -> submodule. Models are added from the registry, so a new model needs a row only there.
_LAZY = {name: f"models.configuration_{row.stem}" for row in MODELS for name in [row.config]}
_LAZY |= {row.model: f"models.modeling_{row.stem}" for row in MODELS}
_LAZY |= {
    "TokComVAETrainer": "trainers.tokcom",
    "TokComVAETrainingArguments": "trainers.tokcom",
    "DenoiserTrainer": "trainers.tokcom",
    "DenoiserTrainingArguments": "trainers.tokcom",
    "DistillationTrainer": "trainers.tokcom_distillation",
    "DistillationTrainingArguments": "trainers.tokcom_distillation",
    "VQGANTrainer": "trainers.vqgan",
    "VQGANTrainingArguments": "trainers.vqgan",
    "VQGANImageProcessor": "models.image_processing_vqgan",
    "expand_vocab_for_lfq": "lfq_vocabulary",
    "get_lfq_token_range": "lfq_vocabulary",
    "encode_lfq_codes_to_tokens": "models.lfq_tokens",
    "decode_tokens_to_lfq_codes": "models.lfq_tokens",
    "LFQProcessor": "models.processing_lfq",
    "equip_internvl": "trainers.lfq_joint_equipment",
    "JointLFQModel": "trainers.lfq_joint_model",
    "JointLFQTrainer": "trainers.lfq_joint",
    "JointLFQTrainingArguments": "trainers.lfq_joint",
    "load_checkpoint": "tokcom_inference",
    "ModelArgs": "tokcom_inference",
    "LearnableTokenMerger": "models.pruning_constructors",
    "LayerSpecificPruner": "models.pruning_constructors",
    "TokenPruningTrainer": "trainers.pruning",
    "TokenPruningTrainingArguments": "trainers.pruning_arguments",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


register_all()
install()
