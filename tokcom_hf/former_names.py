"""Keeps former import paths working: `tokcom_hf.models.vector_search` is `tokcom_hf.models.vqgan_code_search`.

Scripts may still import modules by their paths of before November 2026. Saved model folders do not need this, because they
contain their own code.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

PACKAGE = __package__
# Former -> present path inside the package.
FORMER = {
    "data.scene_tokenizer": "small_models.scene_tokenizer",
    "data.small_internvl": "small_models.small_internvl",
    "data.small_llama": "small_models.small_llama",
    "data.small_vlm": "small_models.small_vlm",
    "data.tokcom_checkpoint": "tokcom_checkpoint",
    "metrics.denoising": "evaluation.tokcom_denoising",
    "metrics.flops": "models.pruning_report",
    "metrics.language_model_judge": "evaluation.language_model_judge",
    "metrics.latent_path": "evaluation.tokcom_latent_path",
    "metrics.prefill": "evaluation.pruning_prefill",
    "metrics.reconstruction": "evaluation.tokcom_reconstruction",
    "metrics.scene_reader": "evaluation.scene_reader",
    "metrics.text_comparison": "evaluation.text_comparison",
    "metrics.text_generation": "evaluation.text_generation",
    "metrics.text_likelihood": "evaluation.text_likelihood",
    "metrics.text_protocol": "evaluation.text_protocol",
    "metrics.text_report": "evaluation.text_report",
    "metrics.tokcom_report": "evaluation.tokcom_report",
    "models.cache_name": "models.shared_cache_name",
    "models.chunked_cross_entropy": "models.shared_cross_entropy",
    "models.configuration_layer_pruner": "models.configuration_pruning_layer_pruner",
    "models.configuration_lfq": "models.configuration_lfq_quantizer",
    "models.configuration_token_merger": "models.configuration_pruning_token_merger",
    "models.eager_copy": "models.pruning_eager_copy",
    "models.flow_matching": "models.tokcom_flow_matching",
    "models.generation_settings": "models.tokcom_generation_settings",
    "models.image_files": "models.shared_image_files",
    "models.image_pixels": "models.shared_image_pixels",
    "models.layer_outputs": "models.shared_layer_outputs",
    "models.layers": "models.shared_layers",
    "models.lfq_entropy": "models.shared_bit_entropy",
    "models.lfq_expanded_files": "models.lfq_files",
    "models.lfq_vocabulary": "lfq_vocabulary",
    "models.modeling_layer_pruner": "models.modeling_pruning_layer_pruner",
    "models.modeling_lfq": "models.modeling_lfq_quantizer",
    "models.modeling_token_merger": "models.modeling_pruning_token_merger",
    "models.private_sampling": "models.shared_private_sampling",
    "models.pruned_decoder": "models.pruning_decoder",
    "models.pruned_vlm_checks": "models.pruning_checks",
    "models.pruned_vlm_files": "models.pruning_files",
    "models.pruned_vlm_output": "models.pruning_output",
    "models.quantizer_base": "models.vqgan_quantizer_base",
    "models.quantizer_ema": "models.vqgan_quantizer_ema",
    "models.quantizer_fsq": "models.vqgan_quantizer_fsq",
    "models.quantizer_lfq": "models.vqgan_quantizer_lfq",
    "models.quantizers": "models.vqgan_quantizers",
    "models.question_attention": "models.pruning_question_attention",
    "models.strict_loading": "models.shared_strict_loading",
    "models.tokcom_context": "models.tokcom_context_encoder",
    "models.token_removal": "models.pruning_stream",
    "models.token_report": "models.pruning_report",
    "models.token_selection": "models.pruning_strategies",
    "models.token_stream": "models.tokcom_token_stream",
    "models.tokenizer_size": "models.shared_tokenizer_size",
    "models.vector_search": "models.vqgan_code_search",
    "models.vision_reduction": "models.pruning_prompt",
    "models.vlm_adapters": "models.pruning_families",
    "models.vlm_flops": "models.pruning_flops",
    "models.wrapped_base": "models.shared_wrapped_base",
    "plots_lfq": "plots.lfq",
    "plots_pruning": "plots.pruning",
    "plots_text": "plots.text",
    "plots_vqgan": "plots.vqgan",
    "trainers.adversary": "trainers.vqgan_adversary",
    "trainers.attention_guidance": "trainers.pruning_attention_guidance",
    "trainers.caption_images": "evaluation.lfq_drawing",
    "trainers.dense_pretraining": "small_models.dense_pretraining",
    "trainers.distillation": "trainers.tokcom_distillation",
    "trainers.joint_lfq": "trainers.lfq_joint",
    "trainers.joint_lfq_evaluation": "evaluation.lfq_joint",
    "trainers.joint_lfq_model": "trainers.lfq_joint_model",
    "trainers.perceptual": "trainers.vqgan_perceptual",
    "trainers.pruning_evaluation": "evaluation.pruning_answers",
    "trainers.quantizer_start": "trainers.lfq_quantizer_start",
    "trainers.samples": "trainers.tokcom_samples",
    "trainers.small_vlm": "small_models.vlm_training",
    "trainers.token_pruning": "trainers.pruning",
    "trainers.vqa_generation": "evaluation.vqa_generation",
}


class FormerNames(MetaPathFinder, Loader):
    """Import finder and loader of former paths: it warns, and returns the module of the present path itself."""

    def find_spec(self, name, path=None, target=None):
        present = FORMER.get(name.removeprefix(f"{PACKAGE}."))
        if present is None or not name.startswith(f"{PACKAGE}."):
            return None
        return ModuleSpec(name, self, loader_state=f"{PACKAGE}.{present}")

    def create_module(self, spec):
        present = spec.loader_state
        warnings.warn(f"{spec.name} is now {present}; import it from there.", FutureWarning, stacklevel=2)
        module = import_module(present)
        # The import system now replaces the module's spec by that of the former path; `exec_module` restores it.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Adds the finder after all other import finders; safe to call twice."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
