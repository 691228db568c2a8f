"""Modules may still be imported by the paths they had before the folders were sorted."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tokcom_hf
from tokcom_hf.former_names import FORMER


@pytest.mark.parametrize("former", FORMER)
def test_a_former_path_gives_the_present_module(former):
    with pytest.warns(FutureWarning, match=rf"tokcom_hf\.{former} is now tokcom_hf\.{FORMER[former]};"):
        sys.modules.pop(f"tokcom_hf.{former}", None)
        module = importlib.import_module(f"tokcom_hf.{former}")
    present = importlib.import_module(f"tokcom_hf.{FORMER[former]}")
    assert module is present
    assert present.__spec__.name == present.__name__ == f"tokcom_hf.{FORMER[former]}"


def test_former_paths_are_no_files_and_unknown_ones_are_unknown():
    package = Path(tokcom_hf.__file__).parent
    assert not [former for former in FORMER if (package / (former.replace(".", "/") + ".py")).exists()]
    with pytest.raises(ModuleNotFoundError, match=r"tokcom_hf\.models\.vector_serch"):
        importlib.import_module("tokcom_hf.models.vector_serch")


def test_names_come_from_a_former_path_in_a_new_process():
    code = "from tokcom_hf.models.vector_search import kmeans; print(kmeans.__module__)"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "tokcom_hf.models.vqgan_code_search"
    assert "tokcom_hf.models.vector_search is now" in run.stderr
