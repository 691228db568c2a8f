"""LoRA adapters in the language model of a `PrunedVLM`; the model keeps its class."""

import contextlib

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(model, rank: int) -> None:
    """Adds trainable adapters of `rank`, in float32, to every attention and MLP projection of the language model."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, bias="none")
    inject_adapter_in_model(config, model.family.text_model)
    for name, parameter in model.family.text_model.named_parameters():
        if ".lora_" in name:
            # peft creates them in the base's dtype; bfloat16 would round most small updates away.
            parameter.data = parameter.data.float()


def lora_layers(model) -> list[tuple[str, BaseTunerLayer]]:
    """The layers with adapters, by their names in the language model."""
    return [(n, m) for n, m in model.family.text_model.named_modules() if isinstance(m, BaseTunerLayer)]


@contextlib.contextmanager
def adapters_disabled(model):
    """Within this context the adapters are off, so that the base computes as before training."""
    layers = lora_layers(model)
    for _, layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for _, layer in layers:
            layer._disable_adapters = False


def merge_lora(model) -> None:
    """Adds the adapters to the weights of their layers and replaces these by plain layers."""
    for name, layer in lora_layers(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.family.text_model.get_submodule(parent), child, layer.get_base_layer())
