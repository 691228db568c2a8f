"""FSDP2 in the package's trainers: sharding on CPU ranks, what is refused, and whole weights where code needs them.

torch shards a model in place: its parameters become DTensors, whole inside `forward`, and its class a subclass.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel


def shard_on_cpu(accelerator: Accelerator, settings: Mapping[str, Any] | None = None) -> None:
    """Turns FSDP on for CPU ranks if it is configured; accelerate alone would ignore the setting there and use DDP.

    Args:
        accelerator: accelerator of the trainer.
        settings: arguments of `FullyShardedDataParallelPlugin`; None reads the launcher's environment.
    """
    configured = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not configured or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    # Every AcceleratorState that is created later copies the type from PartialState.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def prepare_sharding(trainer: Any) -> None:
    """Refuses what would train or save wrongly on sharded weights, and names the layers by which to shard.

    Raises:
        ValueError: FSDP has version 1, or the trainer or a setting does not work with FSDP2.
    """
    if not trainer.is_fsdp_enabled:
        return
    args, plugin = trainer.args, trainer.accelerator.state.fsdp_plugin
    other = "use DDP (recipes/configs/accelerate/multi_gpu.yaml)"
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported; set fsdp_version: 2.")
    if not trainer.shards:
        raise ValueError(f"{type(trainer).__name__} needs whole weights in every step, which FSDP2 shards; {other}.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError("from_pretrained reads whole weights; set fsdp_state_dict_type: FULL_STATE_DICT.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading passes the model through the meta device, which loses buffers that are not "
            "saved; set it to false."
        )
    unsupported = {
        "ema_decay": args.ema_decay > 0,
        "muon_learning_rate": args.muon_learning_rate > 0,
        "load_best_model_at_end": args.load_best_model_at_end,
        "guidance_weight": getattr(args, "guidance_weight", 0) > 0,
        "codebook_expansion": getattr(args, "codebook_expansion", False),
    }
    given = [name for name, wanted in unsupported.items() if wanted]
    if given:
        raise ValueError(
            f"{', '.join(given)} needs whole weights, which FSDP2 shards; leave it out (0 or false), or {other}."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # A part of a model, such as a vision tower alone, may name layers that it lacks; accelerate would raise.
        present = {type(module).__name__ for module in trainer.model.modules()}
        names = getattr(trainer.model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(names))
    flatten_scalars(trainer.model)


def flatten_scalars(model: nn.Module) -> None:
    """Reshapes scalar parameters to one dimension, which torch needs to shard them; `saved_weights` undoes this."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 0:
                flat = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                setattr(module, name, flat)
                module.__dict__.setdefault("_scalar_names", set()).add(name)


def saved_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathered weights of a sharded model, in the form that an unsharded model gives to `save_pretrained`.

    Scalars have no dimension again, and tied parameters are one tensor again, which is saved under one name.
    """
    scalars = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module.__dict__.get("_scalar_names", ())
    }
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {
        name: weights[same.get(name, name)].reshape(()) if name in scalars else weights[same.get(name, name)]
        for name in weights
    }


def register_methods(model: nn.Module, names: tuple[str, ...]) -> None:
    """Lets methods run before `forward` in a step: they see whole weights, which stay whole until the backward pass."""
    if isinstance(model, FSDPModule) and names:
        model.set_reshard_after_forward(False, recurse=False)
        for name in names:
            register_fsdp_forward_method(model, name)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within this context every rank holds the whole weights of a sharded model; every rank must enter it."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # As accelerate does: the backward pass needs the outermost module at once, so it is not resharded.
            part.set_reshard_after_forward(part is not model, recurse=False)


@contextmanager
def own_classes(model: nn.Module) -> Iterator[None]:
    """Within this context the modules of a sharded model have their own classes instead of torch's.

    `save_pretrained` writes the name of the class into config.json and copies the file that defines it.
    """
    sharded = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    for module, kind in sharded:
        # torch derives its class from FSDPModule and from the module's own class.
        own: Any = next(base for base in kind.__mro__[1:] if not issubclass(base, FSDPModule))
        module.__class__ = own
    try:
        yield
    finally:
        for module, kind in sharded:
            module.__class__ = kind


def replicate(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Wraps a second network for distributed training; by DDP even if the model is sharded, as FSDP2 prepares only one.

    Raises:
        ValueError: the run uses DeepSpeed, whose engine drives one network and one optimizer.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed drives one network, but this training also has a discriminator; set adversarial_weight to 0, or use "
            "DDP (recipes/configs/accelerate/multi_gpu.yaml)."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare_model(network)
    return DistributedDataParallel(accelerator.prepare_model(network, evaluation_mode=True))


def no_sync(accelerator: Accelerator, network: nn.Module) -> AbstractContextManager[None]:
    """Within this context the gradients of a network from `replicate` are not averaged over ranks."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else accelerator.no_sync(network)
