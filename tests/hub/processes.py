"""Scripts of this folder in processes of their own that know nothing but the hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

from loopback import Hub

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_on_hub(hub: Hub, cache: Path, script: str, *arguments, package: bool = True) -> str:
    """What a script prints; `package`: the checkout is on its path.

    Raises:
        AssertionError: it failed.
    """
    environment = hub.environment("hf_ada", cache=cache)
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "recipes"))) if package else ""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
