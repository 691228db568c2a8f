"""Disturbs training runs and checks that the same command resumes them to the weights of an undisturbed run.

    python recipes/benchmarks/faults.py                                 # the whole matrix, on two quiet cores
    python recipes/benchmarks/faults.py --counts reduced                # what the tests run
    python recipes/benchmarks/faults.py --only kills damage --jobs vae vqgan

Every run is a recipe at a tiny size, disturbed at an exact moment (`faults_moments.py`) and then started again. The
weights of the resumed run must be bitwise those of an undisturbed one; two ranks need only resume. Sections:

    kills     SIGKILL: a third at a random time, a third during a checkpoint's write, a third during the final save
    damage    one file of the newest checkpoint truncated, emptied, missing or swapped
    signals   SIGTERM and SIGINT to the recipe at five moments
    launcher  the same signals to `accelerate launch` with one process
    two       two gloo ranks: SIGTERM to the launcher, SIGINT to a worker
    disk      no room left, output folder removed, NaN in the weights
    ranks     SIGKILL to one of two ranks

The seconds to resume do not include Python's imports. Prints a table and writes JSON; exit code 1 if any case was wrong.
"""

import contextlib
import gc
import importlib
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import faults_damage
import faults_kills
import faults_signals
from faults_checks import Case, write_json
from faults_jobs import JOBS, TRAINERS
from faults_processes import Bench, Scenario

from tokcom_hf.cli import parse_recipe, run_recipe

SECTIONS = ("kills", "damage", "signals", "launcher", "two", "disk", "ranks")
# Sections of a reduced run: none with a launcher, because one start of Python costs as much as five tiny runs.
REDUCED = ("kills", "damage", "signals", "disk")
KILLS, DAMAGES = {"full": 21, "reduced": 1}, {"full": 16, "reduced": 1}


@dataclass
class FaultArguments:
    """What is disturbed, how often, and where the results go."""

    counts: str = field(default="full", metadata={"help": "full, or reduced: the few cases that the tests run."})
    only: list[str] | str | None = field(
        default=None, metadata={"help": f"Sections to run, of {', '.join(SECTIONS)}."}
    )
    jobs: list[str] | str | None = field(default=None, metadata={"help": f"Runs to disturb, of {', '.join(JOBS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of the random moments."})
    parallel: int = field(default=2, metadata={"help": "Runs at the same time."})
    output_dir: str = field(default="outputs/benchmarks/faults", metadata={"help": "Folder of runs and logs."})
    output: str = field(default="", metadata={"help": "Result file (JSON); <output_dir>/results.json if not set."})

    def __post_init__(self):
        if self.counts not in KILLS:
            raise ValueError(f"counts must be full or reduced, got {self.counts!r}.")
        self.only = [self.only] if isinstance(self.only, str) else self.only
        self.only = self.only or list(REDUCED if self.counts == "reduced" else SECTIONS)
        self.jobs = [self.jobs] if isinstance(self.jobs, str) else self.jobs or list(JOBS)
        for option, names, known in (("only", self.only, SECTIONS), ("jobs", self.jobs, JOBS)):
            if unknown := sorted(set(names) - set(known)):
                raise ValueError(f"{option} must be some of {', '.join(known)}, got {', '.join(unknown)}.")


def section(bench: Bench, name: str, args: FaultArguments) -> Iterator[Scenario]:
    """The scenarios of a section."""
    jobs, reduced = list(args.jobs or ()), args.counts == "reduced"
    trainers = [job for job in jobs if job in TRAINERS]
    if name == "kills":
        return faults_kills.scenarios(bench, trainers, KILLS[args.counts], args.seed)
    if name == "damage":
        return faults_damage.scenarios(bench, trainers[:3] if reduced else trainers, DAMAGES[args.counts], args.seed)
    if name == "disk":
        return faults_damage.disk_scenarios(bench, trainers[-4:] if reduced else trainers, reduced, args.seed)
    if name == "ranks":
        return faults_kills.rank_scenarios(bench, trainers)
    processes = {"signals": 0, "launcher": 1, "two": 2}[name]
    return faults_signals.scenarios(bench, trainers[-3:] if reduced else jobs, processes, reduced, args.seed)


def summary(cases: list[Case]) -> list[dict]:
    """A row per section and run."""
    rows = []
    for suite, job in dict.fromkeys((case.suite, case.job) for case in cases):
        group = [case for case in cases if (case.suite, case.job) == (suite, job)]
        lost = [case.figures["lost"] for case in group if case.figures.get("lost") is not None]
        resumes = [case.figures["to_resume"] for case in group if case.figures.get("to_resume") is not None]
        outcomes = [case.figures["outcome"] for case in group if "outcome" in case.figures]
        rows.append(
            {
                "section": suite,
                "run": job,
                "cases": len(group),
                "right": sum(not case.wrong for case in group),
                "steps_lost_most": max(lost, default=None),
                "steps_lost_mean": round(statistics.mean(lost), 2) if lost else None,
                "seconds_to_resume": round(statistics.median(resumes), 2) if resumes else None,
                "fell_back": outcomes.count("fell back") if outcomes else None,
                "refused": outcomes.count("refused") if outcomes else None,
                "silent": outcomes.count("silent") if outcomes else None,
                "orphans": sum("an orphan" in case.wrong for case in group),
                "seconds_of_workers_behind_launcher": max((c.figures.get("late", 0.0) for c in group), default=0.0),
                "seconds_of_other_ranks": max((case.figures.get("ended", 0.0) for case in group), default=0.0),
            }
        )
    return rows


def totals(rows: list[dict]) -> dict[str, dict[str, int]]:
    """Number of cases and of right cases for each section."""
    sections = dict.fromkeys(row["section"] for row in rows)
    return {
        name: {count: sum(row[count] for row in rows if row["section"] == name) for count in ("cases", "right")}
        for name in sections
    }


def print_table(rows: list[dict], cases: list[Case]) -> None:
    print(f"\n{'section':10s} {'run':18s} {'right':>9s}  steps lost   to resume  fell back/refused/silent  orphans")
    for row in rows:
        lost = "" if row["steps_lost_most"] is None else f"{row['steps_lost_mean']:.1f}, most {row['steps_lost_most']}"
        resume = "" if row["seconds_to_resume"] is None else f"{row['seconds_to_resume']:.1f} s"
        outcome = "" if row["fell_back"] is None else f"{row['fell_back']}/{row['refused']}/{row['silent']}"
        right = f"{row['right']}/{row['cases']}"
        print(f"{row['section']:10s} {row['run']:18s} {right:>9s}  {lost:12s} {resume:>9s}  {outcome:>24s}  "
              f"{row['orphans']:7d}")  # fmt: skip
    for case in cases:
        if case.wrong:
            print(f"WRONG {case.suite} {case.job}: {case.fault}: {'; '.join(case.wrong)}")
    print(f"\n{sum(not case.wrong for case in cases)} of {len(cases)} cases right")


def warm_up() -> None:
    """Does once what every fork would repeat: imports, tables that libraries build at first use, garbage collection."""
    torch.set_num_threads(1)
    for job in JOBS.values():
        importlib.import_module(job.recipe)
    for name in ("matplotlib.pyplot", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        # The first save builds transformers' table of renamed weights.
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    gc.collect()
    gc.freeze()


def main(argv: list[str] | None = None) -> list[Case]:
    args = FaultArguments(**parse_recipe(__doc__ or "", {"run": FaultArguments}, None, argv)["run"])
    started = time.monotonic()
    # A shell starts background jobs with SIGINT ignored; launchers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warm_up()
    work = Path(args.output_dir)
    for folder in ("runs", "whole", "templates", "logs"):
        shutil.rmtree(work / folder, ignore_errors=True)
    bench = Bench(work, args.parallel)
    cases: list[Case] = []
    for name in args.only or ():
        began = time.monotonic()
        scenarios = section(bench, name, args)
        trainers = [job for job in args.jobs or () if job in TRAINERS]
        needed = args.jobs if name in ("signals", "launcher", "two") and args.counts == "full" else trainers
        bench.prepare(needed or ())
        found = bench.run(scenarios)
        cases += found
        print(
            f"{name}: {sum(not c.wrong for c in found)} of {len(found)} right, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    rows = summary(cases)
    seconds = round(time.monotonic() - started, 1)
    more = {"counts": args.counts, "seed": args.seed, "seconds": seconds, "sections": totals(rows), "rows": rows}
    write_json(Path(args.output or work / "results.json"), cases, more)
    print_table(rows, cases)
    return cases


if __name__ == "__main__":
    run_recipe(lambda: sys.exit(int(any(case.wrong for case in main()))))
