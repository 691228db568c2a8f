"""Reading attention weights of a model that other threads may be running."""

import copy
import functools
import types

from torch import nn


def eager_copy(module: nn.Module, configs: dict | None = None) -> nn.Module:
    """A copy of `module` that shares its weights, computes attention eagerly and may be given hooks of its own.

    The module and its configuration stay as they are, so a thread that runs them meanwhile sees nothing of this.

    Args:
        module: a decoder layer, a vision tower or the like.
        configs: copies of configurations made so far, by the id of the original (used by the recursion).
    """
    configs = {} if configs is None else configs
    view = copy.copy(module)
    for name, value in vars(module).items():
        # Hooks and children are dictionaries, which a shallow copy shares; the weights' dictionaries are to be shared.
        if isinstance(value, dict) and name not in ("_parameters", "_buffers"):
            vars(view)[name] = value.copy()
    for name, child in module._modules.items():
        view._modules[name] = None if child is None else eager_copy(child, configs)
    config = getattr(module, "config", None)
    if hasattr(config, "_attn_implementation"):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
            configs[id(config)]._attn_implementation = "eager"
        view.config = configs[id(config)]
    if "_old_forward" in vars(module):
        # The hooks of accelerate (offloading) call the forward of the module that they were put on.
        vars(view)["_old_forward"] = types.MethodType(type(module).forward, view)
        vars(view)["forward"] = functools.partial(vars(module)["forward"].func, view)
    return view
