"""`python -m tokcom_hf` prints the facts for a bug report: versions, devices, installed extras and registered models."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from . import __version__
from .cli import run_recipe
from .registry import MODELS, PIPELINES


def installed(name: str) -> str | None:
    """Returns the version of distribution `name`, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def dependencies() -> dict[str, list[str]]:
    """Maps each extra ('' for the required dependencies) to its distributions; empty if the package is not installed."""
    found: dict[str, list[str]] = {}
    if installed("tokcom_hf") is None:
        return found
    for line in requires("tokcom_hf") or []:
        requirement = Requirement(line)
        extra = str(requirement.marker).split("==")[-1].strip(" \"'") if requirement.marker else ""
        found.setdefault(extra, []).append(requirement.name)
    return found


def devices() -> list[str]:
    """Lists the devices that torch can use, the CPU first."""
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def report() -> str:
    """Returns the text that `python -m tokcom_hf` prints."""
    lines = [f"tokcom_hf {__version__}", f"python {sys.version.split()[0]}, {platform.platform()}"]
    groups = dependencies()
    for name in groups.get("", ["torch", "transformers", "accelerate", "peft", "datasets", "safetensors"]):
        lines.append(f"{name} {installed(name) or 'not installed'}")
    for extra, names in groups.items():
        missing = [name for name in names if installed(name) is None]
        if extra:
            lines.append(f"extra {extra}: " + (f"lacks {', '.join(missing)}" if missing else "installed"))
    lines.append("devices: " + "; ".join(devices()))
    lines.append("models: " + ", ".join(f"{row.model} ({row.model_type})" for row in MODELS))
    lines.append("pipelines: " + ", ".join(row.task for row in PIPELINES))
    return "\n".join(lines)


if __name__ == "__main__":
    run_recipe(lambda: print(report()))
