"""SIGKILL at random, inside a checkpoint's write and inside the final save; and two ranks of which one is killed."""

import random
from collections.abc import Iterator

from faults_checks import Case, left_over, seconds_to_resume, steps_lost, unequal
from faults_jobs import JOBS
from faults_moments import Fault
from faults_processes import Bench, Scenario, Start

PLACES = ("time", "checkpoint", "final")
RANK_SECONDS = 60.0  # in which the other ranks must have ended


def kill(bench: Bench, name: str, place: str, draw: random.Random) -> Fault:
    """A kill at a moment drawn from those of the undisturbed run."""
    whole = bench.whole[name]
    if place == "time":
        return Fault("time", seconds=round(draw.uniform(0.0, whole.seconds), 2))
    return Fault(place, draw.randint(1, whole.counts[place]))


def scenarios(bench: Bench, names: list[str], each: int, seed: int) -> Iterator[Scenario]:
    """`each` kills per trainer, the three places in turn."""
    draw = random.Random(seed)
    for row, name in enumerate(names):
        for number in range(each):
            # With one kill each the trainers take the places in turn.
            place = PLACES[(number + (row if each < len(PLACES) else 0)) % len(PLACES)]
            yield one(bench, name, kill(bench, name, place, draw))


def one(bench: Bench, name: str, fault: Fault) -> Scenario:
    """A kill, and the same command until it is done."""
    job, folder = JOBS[name], bench.folder(name)
    where = f"{fault.place} {fault.seconds if fault.place == 'time' else fault.count}"
    case = Case("kills", name, f"SIGKILL ({where})", figures={"place": fault.place})
    bench.copy_base(job, folder)
    run = yield Start(job, folder, fault)
    case.seconds = run.seconds
    if run.code not in (-9, 0) or (run.code == 0 and fault.place != "time"):
        case.wrong.append(f"exit code {run.code} of the killed run: {run.log[-300:]}")
    again = yield Start(job, folder)
    if again.code != 0:
        case.wrong.append(f"the resumed run ended with {again.code}: {again.log[-600:]}")
    else:
        case.wrong += unequal(folder, bench.whole[name].folder) + left_over(folder)
        case.figures |= {"lost": steps_lost(run, again), "to_resume": seconds_to_resume(again)}
    bench.clear(folder, case)
    return case


def rank_scenarios(bench: Bench, names: list[str]) -> Iterator[Scenario]:
    """Of two gloo ranks the second is killed."""
    for name in names:
        yield one_rank(bench, name)


def one_rank(bench: Bench, name: str) -> Scenario:
    """The other rank and the launcher must end, and two ranks must be able to go on."""
    job, folder = JOBS[name], bench.folder(name)
    case = Case("ranks", name, "SIGKILL of the second of two ranks (step 4)")
    bench.copy_base(job, folder)
    run = yield Start(job, folder, Fault("step", 4, rank=1), processes=2)
    begin = next((e["seconds"] for e in run.journal if e["event"] == "begin"), 0.0)
    killed = next((e["seconds"] for e in run.journal if e["event"] == "fault"), None)
    if killed is None:
        case.wrong.append(f"the moment never came: {run.log[-400:]}")
    else:
        # The launcher's own start is the time before its workers'; it only makes the bound tighter.
        case.figures["ended"] = round(run.seconds + run.late - (killed - begin), 1)
        case.wrong += ["the other rank went on"] if case.figures["ended"] > RANK_SECONDS else []
    case.wrong += (["an orphan"] if run.orphans else []) + (["exit code 0"] if run.code == 0 else [])
    again = yield Start(job, folder, processes=2)
    case.wrong += [] if again.code == 0 else [f"the resumed run ended with {again.code}: {again.log[-600:]}"]
    bench.clear(folder, case)
    return case
