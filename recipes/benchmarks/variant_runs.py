"""Runs the variants of a benchmark in turn, each in a new process, so that its peak memory is measured alone."""

import json
import subprocess
import sys
from collections.abc import Iterable


def run_variants(script: str, variants: Iterable[str], repeats: int) -> dict[str, list[dict]]:
    """Variant -> what `script --variant NAME`, with this process's other arguments, prints as JSON in its last line."""
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for _ in range(repeats):
        for variant in runs:
            print(f"running {variant} …", flush=True)
            command = [sys.executable, script, *sys.argv[1:], "--variant", variant]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[variant].append(json.loads(output.splitlines()[-1]))
    return runs
