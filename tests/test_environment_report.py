"""`python -m tokcom_hf` and the pages for contributors."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

import tokcom_hf
from tokcom_hf.registry import MODELS

ROOT = Path(__file__).parents[1]


def test_the_report_names_versions_devices_and_models():
    run = subprocess.run([sys.executable, "-m", "tokcom_hf"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == f"tokcom_hf {tokcom_hf.__version__}"
    assert any(re.match(r"transformers \d", line) for line in lines)
    assert any(line.startswith("devices: cpu") for line in lines)
    assert all(row.model in lines[-2] and row.model_type in lines[-2] for row in MODELS)


def test_files_that_the_guide_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        folders = (ROOT, ROOT / "tokcom_hf")
        assert "NAME" in name or any((folder / name).is_file() for folder in folders), name


def test_hooks_run_what_the_continuous_integration_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    steps = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        if hook["id"] != "readme":
            assert hook["entry"] in steps, hook["entry"]
