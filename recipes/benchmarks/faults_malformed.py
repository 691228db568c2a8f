"""Gives malformed input to every reader of the package and counts the outcomes.

    python recipes/benchmarks/faults_malformed.py
    python recipes/benchmarks/faults_malformed.py --kinds YAML "JSON lines" --output outputs/malformed.json

The files faults_malformed_*.py make the inputs. A malformed input must be refused in one sentence that names the file or the
argument; the good inputs among the cases must be accepted. Faults are a traceback, malformed input accepted in silence, ten
seconds without an answer, code in the input that ran, a request to the network, memory allocated because a file header asks
for it, and an error that does not name the file or argument.
"""

import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers

from tokcom_hf.cli import RecipeError, parse_recipe, run_recipe

MODULES = ("text", "images", "tokens", "settings", "files", "folders", "bases")
KINDS = (
    "JSON lines", "text files", "images", "tokens", "prompts", "YAML", "command line", "latents", ".pt files",
    "model folders",
)  # fmt: skip
VERDICTS = (
    "refused",
    "accepted",
    "traceback",
    "silent",
    "hang",
    "code executed",
    "request",
    "memory",
    "unclear",
    "other",
)


@dataclass
class MalformedArguments:
    """Which inputs are tried, and where the results go."""

    kinds: list[str] | None = field(default=None, metadata={"help": f"Some of {', '.join(KINDS)}; all if not set."})
    output: str = field(
        default="outputs/faults/malformed.json", metadata={"help": "JSON file of counts, inputs and faults."}
    )

    def __post_init__(self):
        self.kinds = [self.kinds] if isinstance(self.kinds, str) else self.kinds
        unknown = [kind for kind in self.kinds or () if kind not in KINDS]
        if unknown:
            raise RecipeError(f"--kinds must be some of {', '.join(KINDS)}, got {', '.join(unknown)}.")


def measure(kinds: list[str] | None = None) -> dict:
    """Runs all cases of these kinds (all kinds if None).

    Returns:
        `counts` (kind -> verdict -> number), the numbers `total`, `malformed` and `faults`, `inputs` (kind ->
        descriptions), and `wrong`, the outcomes that are faults.
    """
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    check = importlib.import_module("faults_malformed_check")
    scratch, before = Path(tempfile.mkdtemp(prefix="malformed_")), Path.cwd()
    canary = scratch / "canary"
    os.environ["MALFORMED_CANARY"] = str(canary)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    try:
        # Here the relative paths in the cases do not name existing files by accident.
        os.chdir(scratch)
        for name in MODULES:
            cases = importlib.import_module(f"faults_malformed_{name}").cases(scratch / name)
            outcomes += [check.run_case(case, canary) for case in cases if kinds is None or case.kind in kinds]
    finally:
        os.chdir(before)
        logging.disable(level)
        del os.environ["MALFORMED_CANARY"]
        shutil.rmtree(scratch, ignore_errors=True)
    counts: dict[str, Counter] = {}
    for outcome in outcomes:
        verdict = outcome.verdict if outcome.verdict in VERDICTS else "other"
        counts.setdefault(outcome.kind, Counter())[verdict] += 1
    faults = [outcome for outcome in outcomes if outcome.verdict not in ("refused", "accepted")]
    return {
        "counts": {kind: dict(count) for kind, count in counts.items()},
        "total": len(outcomes),
        "malformed": sum(outcome.verdict != "accepted" for outcome in outcomes),
        "faults": len(faults),
        "inputs": {
            kind: [outcome.name.replace(str(scratch), "FOLDER") for outcome in outcomes if outcome.kind == kind]
            for kind in counts
        },
        "wrong": [asdict(outcome) for outcome in faults],
    }


def main(argv: list[str] | None = None) -> None:
    run = MalformedArguments(**parse_recipe(__doc__, {"run": MalformedArguments}, argv=argv)["run"])
    result = measure(run.kinds)
    print(f"{'input':14s}" + "".join(f"{verdict:>15s}" for verdict in VERDICTS))
    for kind, count in result["counts"].items():
        print(f"{kind:14s}" + "".join(f"{count.get(verdict, 0):15d}" for verdict in VERDICTS))
    for outcome in result["wrong"]:
        print(f"{outcome['verdict']}: {outcome['kind']}, {outcome['name']}: {outcome['message']}")
    print(f"{result['malformed']} malformed inputs of {result['total']}, {result['faults']} faults")
    path = Path(run.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    run_recipe(main)
