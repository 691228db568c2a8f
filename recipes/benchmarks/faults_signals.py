"""SIGTERM and SIGINT, to the launcher and to the worker, at five moments of every recipe."""

import random
from collections.abc import Iterator

from faults_checks import Case, left_over, seconds_to_resume, steps_lost, told, unequal
from faults_jobs import JOBS
from faults_moments import Fault
from faults_processes import Bench, Scenario, Start

SIGNALS = {"SIGTERM": 143, "SIGINT": 130}
MOMENTS = ("start", "first step", "mid training", "checkpoint write", "final save")


def moment(bench: Bench, name: str, when: str, signal: str, target: str, draw: random.Random) -> Fault:
    """The fault at one of `MOMENTS` of a job."""
    counts = bench.whole[name].counts
    place, count = {
        "start": ("start", 1),
        "first step": ("step", 1),
        "mid training": ("step", counts["step"] // 2),
        "checkpoint write": ("checkpoint", draw.randint(1, counts["checkpoint"])),
        "final save": ("final", draw.randint(1, counts["final"])),
    }[when]
    if when == "final save" and counts["final_evaluation"] and draw.random() < 0.5:
        place, count = "final_evaluation", draw.randint(1, counts["final_evaluation"])
    return Fault(place, count, signal, target)


def scenarios(bench: Bench, names: list[str], processes: int, reduced: bool, seed: int) -> Iterator[Scenario]:
    """One scenario per recipe, signal and moment.

    Args:
        processes: 0 sends the signal to a fork of the recipe, 1 to `accelerate launch`; with 2 ranks SIGTERM goes to the
            launcher and SIGINT to a worker, in the middle of training.
        reduced: one signal per recipe, for each recipe at another moment.
    """
    draw = random.Random(seed)
    for row, name in enumerate(names):
        for number, signal in enumerate(SIGNALS):
            for place, when in enumerate(MOMENTS):
                if reduced and (number, place) != (row % 2, (2 * row + 1) % len(MOMENTS)):
                    continue
                if processes == 2 and when != "mid training":
                    continue
                target = "worker" if processes == 0 or (processes == 2 and signal == "SIGINT") else "launcher"
                yield one(bench, name, when, moment(bench, name, when, signal, target, draw), processes)


def one(bench: Bench, name: str, when: str, fault: Fault, processes: int) -> Scenario:
    """Sends a signal to a run; the same command must then resume it without losing a step."""
    job = JOBS[name]
    suite = {0: "signals", 1: "launcher", 2: "two"}[processes]
    case = Case(suite, name, f"{fault.what} to the {fault.target}: {when} ({fault.place} {fault.count})")
    folder = bench.folder(name)
    bench.copy_base(job, folder)
    run = yield Start(job, folder, fault, processes=processes)
    case.seconds = run.seconds
    case.figures["late"] = round(run.late, 1)
    if run.orphans:
        case.wrong.append("an orphan")
    if not run.struck:
        case.wrong.append("the fault was not triggered")
    # A launcher that catches the signal (torchrun) exits with 1; one that does not dies of the signal.
    expected = {SIGNALS[fault.what]} if processes == 0 else {-(SIGNALS[fault.what] - 128), SIGNALS[fault.what], 1}
    if run.code not in expected:
        case.wrong.append(f"exit code {run.code}")
    case.wrong += told(run) if processes == 0 else []
    if processes == 2:
        # Two ranks resume what two ranks saved. No undisturbed run has two ranks, so weights are not compared.
        again = yield Start(job, folder, processes=2)
        case.wrong += [] if again.code == 0 else [f"the resumed run ended with {again.code}: {again.log[-400:]}"]
        case.figures["lost"] = steps_lost(run, again)
        case.wrong += [f"{case.figures['lost']} steps lost"] if case.figures["lost"] else []
        return case
    again = yield Start(job, folder)
    if again.code != 0:
        case.wrong.append(f"the resumed run ended with {again.code}: {again.log[-400:]}")
        return case
    case.figures |= {"lost": steps_lost(run, again), "to_resume": seconds_to_resume(again)}
    case.wrong += [f"{case.figures['lost']} steps lost"] if case.figures["lost"] else []
    case.wrong += unequal(folder, bench.whole[name].folder) + left_over(folder)
    bench.clear(folder, case)
    return case
