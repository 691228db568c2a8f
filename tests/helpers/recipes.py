"""Recipes in this process: as modules, and run as their commands run them."""

import importlib
import runpy
import sys
from types import ModuleType

from .processes import ROOT

RECIPES = ROOT / "recipes"


def load(name: str) -> ModuleType:
    """A recipe or benchmark as a module; `recipes` and `recipes/benchmarks` are on pytest's path."""
    return importlib.import_module(name)


def call(name: str, *arguments) -> None:
    """Runs `main` of a fresh copy of a recipe with a command line: `call("benchmarks/vae_compression", "--seed", 1)`."""
    path, before = RECIPES / f"{name}.py", sys.argv
    sys.argv = [str(path), *map(str, arguments)]
    try:
        runpy.run_path(str(path), run_name="recipe")["main"]()
    finally:
        sys.argv = before
