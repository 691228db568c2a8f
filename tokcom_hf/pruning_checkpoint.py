"""Reads a documented pruning run: `token_merger_step_N.pt`, `layer_pruners_step_N.pt`, `discriminator_step_N.pt`.

Each file is the state dict of one module. `TokenPruningTrainer` with `save_parts` writes such files with this package's
names of weights. The documented names are `importance_scorer`, `q_proj`, `k_proj` for the merger and, below each
layer's number, `vision_proj`, `text_proj`, `cross_attn`, `mask_predictor` for the pruners. Sizes follow from the shapes; a
name that does not fit is an error.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .models.configuration_pruning_discriminator import PruningDiscriminatorConfig
from .models.configuration_pruning_layer_pruner import LayerPrunerConfig
from .models.configuration_pruning_token_merger import TokenMergerConfig
from .models.modeling_pruning_discriminator import PruningDiscriminator
from .models.modeling_pruning_layer_pruner import LayerPruner
from .models.modeling_pruning_token_merger import TokenMerger
from .torch_files import DAMAGED

StateDict = dict[str, torch.Tensor]

PARTS = ("token_merger", "layer_pruners", "discriminator")
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
HEAD = re.compile(r"^(?:[A-Za-z_]+\.)?(?:layer_)?(\d+)\.(.+)$")


def read_parts(folder: str | Path | None, step: int | None = None) -> dict[str, StateDict]:
    """Reads the state dicts of the parts saved at a step, without the prefixes of DDP and `torch.compile`.

    Args:
        folder: folder of the files `<part>_step_<N>.pt`.
        step: N; None means the last step at which the merger or the pruners were saved.

    Returns:
        part (one of `PARTS`) -> state dict, for each part saved at that step.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: there is no folder, a file is damaged or is no state dict of tensors.
    """
    if not folder:
        raise ValueError(f"init_step {step} needs init_from, the folder of the documented run.")
    found = {
        (match[1], int(match[2])): path
        for path in Path(folder).glob("*_step_*.pt")
        if (match := re.fullmatch(rf"({'|'.join(PARTS)})_step_(\d+)\.pt", path.name))
    }
    steps = {number for part, number in found if part != "discriminator"}
    if not steps or (step is not None and step not in steps):
        wanted = "N" if step is None else step
        held = f"; it has steps {', '.join(map(str, sorted(steps)))}" if steps else ""
        raise FileNotFoundError(
            f"{str(folder)!r} has no token_merger_step_{wanted}.pt or layer_pruners_step_{wanted}.pt{held}."
        )
    step = max(steps) if step is None else step
    return {part: read_part(found[part, step]) for part in PARTS if (part, step) in found}


def read_part(path: str | Path) -> StateDict:
    """Reads the state dict of one file, without the prefixes of DDP and `torch.compile`.

    Raises:
        ValueError: the file is damaged or is no state dict of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{path} is damaged or no file of plain tensors ({reason}).") from None
    plain = isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not plain:
        raise ValueError(f"{path} holds no state dict (names and tensors); save module.state_dict() alone.")
    return {WRAPPERS.sub("", name): value for name, value in state.items()}


def convert_merger(state: StateDict, **settings: Any) -> TokenMerger:
    """Builds the merger of a state dict.

    Args:
        state: weights under documented names or this package's names.
        settings: fields of `TokenMergerConfig`. With documented names, those that do not follow from shapes, for example
            `target_merge_tokens`; with this package's names, all that the merger was built with.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape.
    """
    state = {re.sub(r"^importance_scorer\b", "scorer", name): value for name, value in state.items()}
    if "similarity_proj.weight" not in state and not any("question" in name for name in state):
        scorer = two_layers(state, "scorer", "importance_scorer")
        need(state, ("q_proj.weight", "k_proj.weight"))
        state = add_biases(rest(state, "scorer") | scorer, ("q_proj", "k_proj"))
        settings = settings | {
            "architecture": "documented",
            "merger_type": "simple",
            "feature_size": state["q_proj.weight"].shape[1],
            "internal_size": state["q_proj.weight"].shape[0],
            "scorer_size": scorer["scorer.0.weight"].shape[0],
        }
    return fill(TokenMerger(TokenMergerConfig(**settings)), state)


def convert_pruners(state: StateDict, **settings: Any) -> LayerPruner:
    """Builds the pruner of a state dict, with one head per layer.

    Args:
        state: weights under documented names or this package's names, below the number of the head's layer or the head's
            position in `layers`, counted from 0.
        settings: fields of `LayerPrunerConfig` that do not follow from shapes: `layers`, `num_attention_heads`,
            `selection` ...

    Raises:
        ValueError: a weight is missing, unknown, or of another shape.
    """
    heads: dict[int, StateDict] = {}
    for name, value in state.items():
        match = HEAD.match(name)
        if match is None:
            raise ValueError(
                f"layer_pruners: {name!r} has no layer number; expected for example '10.vision_proj.weight'."
            )
        heads.setdefault(int(match[1]), {})[match[2]] = value
    if any(name.startswith("question_proj") or name.startswith("score.") for head in heads.values() for name in head):
        return fill(LayerPruner(LayerPrunerConfig(**settings)), named(heads))
    layers = settings.get("layers") or sorted(heads)
    if sorted(heads) != list(layers):
        if sorted(heads) != list(range(len(layers))):
            raise ValueError(
                f"layer_pruners: the file has heads {sorted(heads)}, but pruning_layers is {list(layers)}."
            )
        heads = {layer: heads[place] for place, layer in enumerate(layers)}
    heads = {layer: convert_head(head, layer) for layer, head in heads.items()}
    first = next(iter(heads.values()))
    settings = settings | {
        "architecture": "documented",
        "pruner_type": "cross_attention" if "attention.query.weight" in first else "simple",
        "layers": list(layers),
        "hidden_size": first["vision_proj.weight"].shape[1],
        "internal_size": first["vision_proj.weight"].shape[0],
        "scorer_size": first["score.1.weight"].shape[0],
    }
    return fill(LayerPruner(LayerPrunerConfig(**settings)), named(heads))


def convert_head(state: StateDict, layer: int) -> StateDict:
    """Renames the weights of one documented head to this package's names, and splits its stacked attention projection."""
    need(state, ("vision_proj.weight",), f"layer {layer}: ")
    state = rest(state, "mask_predictor") | {
        name.replace(".2.", ".3.").replace(".0.", ".1."): value
        for name, value in two_layers(state, "mask_predictor", "mask_predictor", "score").items()
    }
    state = {re.sub(r"^text_proj\b", "question_proj", name): value for name, value in state.items()}
    if "cross_attn.in_proj_weight" in state:
        size = state["cross_attn.in_proj_weight"].shape[1]
        weight, bias = state.pop("cross_attn.in_proj_weight"), state.pop("cross_attn.in_proj_bias", None)
        bias = weight.new_zeros(3 * size) if bias is None else bias
        for name, part in (("query", slice(size)), ("key_value", slice(size, None))):
            state |= {f"attention.{name}.weight": weight[part], f"attention.{name}.bias": bias[part]}
        state = {re.sub(r"^cross_attn\.out_proj\b", "attention.output", name): value for name, value in state.items()}
    return add_biases(state, ("vision_proj", "question_proj", "attention.output"))


def convert_discriminator(state: StateDict, config: PruningDiscriminatorConfig) -> PruningDiscriminator:
    """Builds the discriminator of a state dict with this package's names, as the documents name none of its weights."""
    return fill(PruningDiscriminator(config), state)


def two_layers(state: StateDict, prefix: str, documented: str, to: str | None = None) -> StateDict:
    """Returns the two linear layers below `prefix` as `to.0` and `to.2`; layers without weights may lie between them."""
    names = [name for name in state if name.startswith(f"{prefix}.")]
    places = sorted({int(match[1]) for name in names if (match := re.match(rf"{prefix}\.(\d+)\.weight$", name))})
    fitting = {f"{prefix}.{place}.{kind}" for place in places for kind in ("weight", "bias")}
    odd = [name for name in names if name not in fitting or (name.endswith("weight") and state[name].dim() != 2)]
    if odd or len(places) != 2:
        shown = odd[0] if odd else (names[0] if names else f"{prefix}.0.weight (missing)")
        raise ValueError(
            f"{shown.replace(prefix, documented, 1)!r} does not fit: {documented} is two linear layers with a GELU between "
            "them, with no further weights. To train this part from scratch, leave it out of the folder."
        )
    to = to or prefix
    found = {
        f"{to}.{2 * rank}.{kind}": state[f"{prefix}.{place}.{kind}"]
        for rank, place in enumerate(places)
        for kind in ("weight", "bias")
        if f"{prefix}.{place}.{kind}" in state
    }
    return add_biases(found, (f"{to}.0", f"{to}.2"))


def rest(state: StateDict, prefix: str) -> StateDict:
    """Returns the weights that are not below `prefix`."""
    return {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}


def add_biases(state: StateDict, layers: Iterable[str]) -> StateDict:
    """Adds zero biases for those linear layers in `layers` that were saved without a bias."""
    zeros = {
        f"{name}.bias": state[f"{name}.weight"].new_zeros(len(state[f"{name}.weight"]))
        for name in layers
        if f"{name}.weight" in state and f"{name}.bias" not in state
    }
    return state | zeros


def need(state: StateDict, names: Iterable[str], where: str = "") -> None:
    """Raises ValueError if `state` lacks one of the names."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{where}the state dict lacks {', '.join(missing)}; it has {', '.join(state)[:200]}.")


def named(heads: Mapping[int, StateDict]) -> StateDict:
    """Joins state dicts of heads into one, with names `heads.<layer>.<name>`."""
    return {f"heads.{layer}.{name}": value for layer, head in heads.items() for name, value in head.items()}


def fill(module: Any, state: StateDict) -> Any:
    """Loads `state` into `module` and returns it.

    Raises:
        ValueError: names or shapes of the weights differ; the message names the first.
    """
    own = module.state_dict()
    wrong = [name for name in state if name not in own] + [name for name in own if name not in state]
    wrong += [name for name in state if name in own and state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        problem = (
            f"has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            if name in own and name in state
            else ("is missing in the file" if name in own else "is not among its weights")
        )
        raise ValueError(
            f"{name!r} {problem}, so the file does not fit a {type(module).__name__} of these settings ({len(wrong)} "
            "weights differ). Give the settings it was trained with, or leave the part out to train it from scratch."
        )
    module.load_state_dict(state)
    return module
