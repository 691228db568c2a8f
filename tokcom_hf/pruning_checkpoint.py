"""Reads a documented pruning run: `token_merger_step_N.pt`, `layer_pruners_step_N.pt`, `discriminator_step_N.pt`.

Each file is one module's state dict. `TokenPruningTrainer` with `save_parts` writes such files with our own names; those of
the documented modules are `importance_scorer`, `q_proj`, `k_proj` for the merger and, under each layer's number,
`vision_proj`, `text_proj`, `cross_attn`, `mask_predictor` for the pruners. Shapes tell the sizes; every name must fit.
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


def read_parts(folder: str | Path, step: int | None = None) -> dict[str, StateDict]:
    """State dicts of the parts saved at a step, without the prefixes of DDP and `torch.compile`.

    Args:
        folder: holds `<part>_step_<N>.pt`.
        step: N; the last step that the merger or the pruners were saved at where None.

    Raises:
        FileNotFoundError: no such files.
        ValueError: a file that is damaged or holds something else than tensors.
    """
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
    """One file's state dict, without the prefixes of DDP and `torch.compile`."""
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
    """The merger of a state dict.

    Args:
        state: documented names or ours.
        settings: fields of `TokenMergerConfig` that shapes do not tell, for example `target_merge_tokens`; with our names
            all that the merger was built with.

    Raises:
        ValueError: names that are missing or that no merger of ours has.
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
    """The heads of a state dict, one per layer.

    Args:
        state: documented names or ours, each under its layer's number or, counted from 0, its place among `layers`.
        settings: fields of `LayerPrunerConfig` that shapes do not tell: `layers`, `num_attention_heads`, `selection` ...

    Raises:
        ValueError: names that are missing or that no head of ours has.
    """
    heads: dict[int, StateDict] = {}
    for name, value in state.items():
        match = HEAD.match(name)
        if match is None:
            raise ValueError(f"layer_pruners: {name!r} has no layer's number; expected e.g. '10.vision_proj.weight'.")
        heads.setdefault(int(match[1]), {})[match[2]] = value
    if any(name.startswith("question_proj") or name.startswith("score.") for head in heads.values() for name in head):
        return fill(LayerPruner(LayerPrunerConfig(**settings)), named(heads))
    layers = settings.get("layers") or sorted(heads)
    if sorted(heads) != list(layers):
        if sorted(heads) != list(range(len(layers))):
            raise ValueError(f"layer_pruners: heads {sorted(heads)} do not fit pruning_layers {list(layers)}.")
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
    """One documented head in our names: its attention's stacked projection is two of ours."""
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
    """The discriminator of a state dict in our names: the documents name none of its weights."""
    return fill(PruningDiscriminator(config), state)


def two_layers(state: StateDict, prefix: str, documented: str, to: str | None = None) -> StateDict:
    """The two linear layers below `prefix`, whatever stands between them without weights, as `to.0` and `to.2`."""
    names = [name for name in state if name.startswith(f"{prefix}.")]
    places = sorted({int(match[1]) for name in names if (match := re.match(rf"{prefix}\.(\d+)\.weight$", name))})
    fitting = {f"{prefix}.{place}.{kind}" for place in places for kind in ("weight", "bias")}
    odd = [name for name in names if name not in fitting or (name.endswith("weight") and state[name].dim() != 2)]
    if odd or len(places) != 2:
        shown = odd[0] if odd else (names[0] if names else f"{prefix}.0.weight (missing)")
        raise ValueError(
            f"{shown.replace(prefix, documented, 1)!r} does not fit: {documented} is two linear layers with a GELU between "
            "them, with no further weights. Leave this part out of the folder to train it anew."
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
    """What does not stand below `prefix`."""
    return {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}


def add_biases(state: StateDict, layers: Iterable[str]) -> StateDict:
    """With biases of zero where a linear layer was saved without one."""
    zeros = {
        f"{name}.bias": state[f"{name}.weight"].new_zeros(len(state[f"{name}.weight"]))
        for name in layers
        if f"{name}.weight" in state and f"{name}.bias" not in state
    }
    return state | zeros


def need(state: StateDict, names: Iterable[str], where: str = "") -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{where}the state dict lacks {', '.join(missing)}; it has {', '.join(state)[:200]}.")


def named(heads: Mapping[int, StateDict]) -> StateDict:
    return {f"heads.{layer}.{name}": value for layer, head in heads.items() for name, value in head.items()}


def fill(module: Any, state: StateDict) -> Any:
    """`module` with the weights of `state`, all of them and no others."""
    own = module.state_dict()
    wrong = [name for name in state if name not in own] + [name for name in own if name not in state]
    wrong += [name for name in state if name in own and state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        problem = (
            f"is {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            if name in own and name in state
            else ("is missing in the file" if name in own else "is not among its weights")
        )
        raise ValueError(
            f"{name!r} {problem}, so that the file does not fit a {type(module).__name__} of these settings ("
            f"{len(wrong)} such names). Give the settings it was trained with, or leave the part out to train it anew."
        )
    module.load_state_dict(state)
    return module
