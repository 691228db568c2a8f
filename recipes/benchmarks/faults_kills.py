"""Cases with SIGKILL: at a random time, during a checkpoint's write, during the final save, to one of two ranks."""

import random
from collections.abc import Iterator

from faults_checks import Case, left_over, seconds_to_resume, steps_lost, unequal
from faults_jobs import JOBS
from faults_moments import Fault
from faults_processes import Bench, Scenario, Start

PLACES = ("time", "checkpoint", "final")
RANK_SECONDS = 60.0  # after one rank was killed, the others must end within this time


def kill(bench: Bench, name: str, place: str, draw: random.Random) -> Fault:
    """SIGKILL at one of `PLACES`, at a moment drawn from those of the undisturbed run."""
    whole = bench.whole[name]
    if place == "time":
        return Fault("time", seconds=round(draw.uniform(0.0, whole.seconds), 2))
    return Fault(place, draw.randint(1, whole.counts[place]))


def scenarios(bench: Bench, names: list[str], each: int, seed: int) -> Iterator[Scenario]:
    """`each` kills per trainer, the three places in turn."""
    draw = random.Random(seed)
    for row, name in enumerate(names):
        for number in range(each):
            # With fewer kills than places each trainer starts at another place.
            place = PLACES[(number + (row if each < len(PLACES) else 0)) % len(PLACES)]
            yield one(bench, name, kill(bench, name, place, draw))


def one(bench: Bench, name: str, fault: Fault) -> Scenario:
    """Kills a run; the same command must then resume it and end with the undisturbed run's weights."""
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
    """One case per trainer: the second of two gloo ranks is killed."""
    for name in names:
        yield one_rank(bench, name)


def one_rank(bench: Bench, name: str) -> Scenario:
    """After the kill the other rank and the launcher must end, and two new ranks must resume."""
    job, folder = JOBS[name], bench.folder(name)
    case = Case("ranks", name, "SIGKILL of the second of two ranks (step 4)")
    bench.copy_base(job, folder)
    run = yield Start(job, folder, Fault("step", 4, rank=1), processes=2)
    begin = next((e["seconds"] for e in run.journal if e["event"] == "begin"), 0.0)
    killed = next((e["seconds"] for e in run.journal if e["event"] == "fault"), None)
    if killed is None:
        case.wrong.append(f"the fault was not triggered: {run.log[-400:]}")
    else:
        # Includes the seconds that the launcher took to start its workers; they only tighten the bound.
        case.figures["ended"] = round(run.seconds + run.late - (killed - begin), 1)
        case.wrong += ["the other rank kept running"] if case.figures["ended"] > RANK_SECONDS else []
    case.wrong += (["an orphan"] if run.orphans else []) + (["exit code 0"] if run.code == 0 else [])
    again = yield Start(job, folder, processes=2)
    case.wrong += [] if again.code == 0 else [f"the resumed run ended with {again.code}: {again.log[-600:]}"]
    bench.clear(folder, case)
    return case
