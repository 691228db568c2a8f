"""StrictLoading: refuses a checkpoint that does not hold exactly the model's weights.

transformers fills missing weights with random values, ignores unexpected ones and casts integers, with a warning at most;
the model then runs and is wrong. Here each of these cases raises an error that names the tensors.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

# Number of names in one error message; further tensors are only counted.
SHOWN = 5
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StrictLoading(PreTrainedModel):
    """`PreTrainedModel` whose `from_pretrained` refuses missing, unexpected, non-finite and integer weights.

    `_keys_to_ignore_on_load_missing` and `_keys_to_ignore_on_load_unexpected` name what older folders may lack or have in
    excess. Tied weights may be missing, and `ignore_mismatched_sizes=True` has its usual meaning.
    """

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        check_ties(model, load_config.device_map)
        # The weights of a quantized checkpoint may be integers.
        if load_config.hf_quantizer is None:
            check_values(model, stored_tensors(state_dict, checkpoint_files))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        check_shapes(model, load_config, loading_info)
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        check_keys(model, loading_info.missing_keys, loading_info.unexpected_keys)
        return loading_info


@contextmanager
def opened(path) -> Iterator[safe_open]:
    """A safetensors file to read; a damaged one raises OSError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise OSError(f"{path} is damaged or was cut short ({error}); copy or download it again.") from error


def check_shapes(model: PreTrainedModel, load_config, loading_info) -> None:
    """Raises RuntimeError, as transformers does, for a tensor with another shape than the model's; the error names it."""
    if load_config.ignore_mismatched_sizes:
        return
    for name, stored, wanted in sorted(loading_info.mismatched_keys):
        raise RuntimeError(
            f"{type(model).__name__}: {name} is stored with shape {tuple(stored)}, but config.json asks for "
            f"{tuple(wanted)}. Load the folder with its own config, or pass ignore_mismatched_sizes=True to draw such "
            "weights anew."
        )


def stored_tensors(state_dict, checkpoint_files) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a state dict or of the files of a checkpoint, one tensor in memory at a time."""
    if state_dict is not None:
        yield from state_dict.items()
        return
    for path in checkpoint_files or ():
        if str(path).endswith(".safetensors"):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no iteration over the file itself)
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True).items()


def check_values(model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError if a stored tensor holds NaN or infinity, or is quantized and the model's tensor is not."""
    floating = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, value in tensors:
        plain = value.dtype in FLOATING
        if name in floating and not plain:
            raise ValueError(
                f"{type(model).__name__}: {name} is stored as {value.dtype}, but the model has a floating-point tensor "
                "there. The folder was quantized or written by another program; save it again from the original weights."
            )
        if plain and not bool(value.isfinite().all()):
            wrong = int((~value.isfinite()).sum())
            raise ValueError(
                f"{type(model).__name__}: {wrong:,} of {value.numel():,} values of {name} are NaN or infinite. The training "
                "that saved it diverged or the file is damaged; take an earlier checkpoint."
            )


def check_keys(model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError if a checkpoint lacks weights of the model or holds weights that the model does not have."""
    wrong = {"lacks": sorted(missing), "holds, unknown to the model,": sorted(unexpected)}
    parts = [
        f"{verb} {len(names)} tensor(s): {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
        for verb, names in wrong.items()
        if names
    ]
    if parts:
        raise ValueError(
            f"{type(model).__name__}: the checkpoint {'; it '.join(parts)}. Its config.json must describe the model whose "
            "weights are beside it, and all shards must be there."
        )


def check_ties(model: PreTrainedModel, device_map: dict[str, Any] | None) -> None:
    """Raises ValueError if a device map offloads only one of two tied weights, which accelerate cannot do."""

    def place(weight: str) -> Any:
        fitting = [name for name in device_map or {} if name == "" or f"{weight}.".startswith(f"{name}.")]
        return (device_map or {})[max(fitting, key=len)] if fitting else None

    for target, source in model.all_tied_weights_keys.items():
        places = [place(target), place(source)]
        if places[0] != places[1] and {"cpu", "disk"} & set(places):
            raise ValueError(
                f"{type(model).__name__}: device_map offloads {source} ({places[1]}) and {target} ({places[0]}), which are "
                "one tied tensor, to different places; name the same place for both, or use device_map='auto'."
            )
