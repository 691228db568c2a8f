"""`eager_copy`: reads attention weights of a module while other threads run it."""

import copy
import functools
import types

from torch import nn


def eager_copy(module: nn.Module, configs: dict | None = None) -> nn.Module:
    """A copy of `module` that shares its weights, computes attention eagerly and can be given hooks of its own.

    The module and its configuration are not changed, so threads that run it are not affected.

    Args:
        module: for example a decoder layer or a vision tower.
        configs: for the recursion only: copies of configurations by the `id` of their original.
    """
    configs = {} if configs is None else configs
    view = copy.copy(module)
    for name, value in vars(module).items():
        # A shallow copy shares dictionaries. Weights are to be shared, hooks and children are not.
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
        # accelerate's hooks (offloading) call the forward of the module that they were registered on.
        vars(view)["_old_forward"] = types.MethodType(type(module).forward, view)
        vars(view)["forward"] = functools.partial(vars(module)["forward"].func, view)
    return view
