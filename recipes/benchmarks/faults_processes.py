"""Starts and watches the runs of `faults.py`: most are forks of this process, the others run under `accelerate launch`.

A fork has torch, transformers and the recipes imported already, so that a tiny run takes seconds. Each run has its own
process group and log. `accelerate launch` starts this file as a script:

    accelerate launch recipes/benchmarks/faults_processes.py JOURNAL FAULT TRAININGS RECIPE ARGUMENTS...
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from faults_jobs import JOBS, RECIPES, Job, with_needs, write_text
from faults_moments import Fault, Moments

from tokcom_hf.cli import run_recipe

ONE_PROCESS = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
TWO_PROCESSES = [f"--config_file={RECIPES}/configs/accelerate/two_cpu_processes.yaml", "--main_process_port=0"]
ORPHAN_SECONDS = 45.0  # a worker that runs this long after its launcher ended is an orphan


@dataclass
class Run:
    """A run that has ended.

    Attributes:
        folder: its output folder.
        code: exit code, negative for a signal.
        log: its standard output and errors.
        journal: the entries of `Moments`.
        seconds: from its start to its end.
        orphans: process ids of workers that outlived their launcher by `ORPHAN_SECONDS`.
        late: seconds for which its workers outlived the launcher.
    """

    folder: Path
    code: int
    log: str
    journal: list[dict[str, Any]]
    seconds: float
    orphans: list[int] = field(default_factory=list)
    late: float = 0.0

    def steps(self) -> list[tuple[str, int]]:
        """(name of the training's folder, step) of each step that rank 0 took."""
        return [(e["training"], e["step"]) for e in self.journal if e["event"] == "step" and e["rank"] == 0]

    @property
    def struck(self) -> bool:
        """Whether the fault was triggered."""
        return any(entry["event"] == "fault" for entry in self.journal)

    @property
    def counts(self) -> dict[str, int]:
        """Number of occurrences of each moment; empty if the run did not reach its end."""
        return next((entry["counts"] for entry in self.journal if entry["event"] == "end"), {})


class Start:
    """A run to start; a scenario yields it and is sent its `Run`.

    Args:
        job: recipe and arguments.
        folder: its output folder.
        fault: what happens to it.
        resume: adds `--resume true`, which starts from the beginning if there is nothing to resume.
        processes: 0 for a fork; 1 or 2, the number of processes under `accelerate launch`.
    """

    def __init__(self, job: Job, folder: Path, fault: Fault | None = None, resume: bool = True, processes: int = 0):
        self.job, self.folder, self.fault, self.processes = job, folder, fault or Fault(), processes
        self.resume = resume
        self.name = f"{folder.name}-{time.monotonic_ns()}"

    def begin(self, work: Path) -> None:
        logs = work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log, self.journal = logs / f"{self.name}.log", logs / f"{self.name}.jsonl"
        self.arguments = [word.format(work=work) for word in self.job.arguments]
        self.arguments += ["--output_dir", str(self.folder), *(["--resume", "true"] if self.resume else [])]
        self.began = time.monotonic()
        self.pid = self._launch() if self.processes else self._fork()

    def _fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                out = os.open(self.log, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                code = work(str(self.journal), self.fault, self.job, self.arguments)
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        return pid

    def _launch(self) -> int:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += TWO_PROCESSES if self.processes == 2 else ONE_PROCESS
        command += [__file__, str(self.journal), self.fault.json(), str(self.job.trainings), self.job.recipe]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w", encoding="utf-8") as log:
            # Kept, because Python would collect the exit code of a process object that is no longer referenced.
            self.process = subprocess.Popen(
                [*command, *self.arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                process_group=0,
            )  # fmt: skip
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.processes:
            return self.process.poll()
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def end(self, code: int) -> Run:
        """The `Run` of a process that ended with `code`; `Bench` fills in log, orphans and `late`."""
        seconds = time.monotonic() - self.began
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.is_file() else []
        journal = [json.loads(line) for line in lines]
        return Run(self.folder, code, "", journal, seconds)

    def workers(self) -> list[int]:
        """Process ids of this run's workers that are still alive."""
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.is_file() else []
        return [pid for pid in {json.loads(line)["pid"] for line in lines} if _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def work(journal: str, fault: Fault, job: Job, arguments: list[str]) -> int:
    """Runs the recipe in this process, disturbed by the fault; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    folder = arguments[arguments.index("--output_dir") + 1]
    moments = Moments(fault, folder, job.trainings, journal)
    recipe = importlib.import_module(job.recipe)
    moments.install()
    sys.argv = [f"{job.recipe}.py", *arguments]
    moments.write(event="begin")

    def main() -> None:
        moments.at("start")
        recipe.main()

    try:
        run_recipe(main)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    moments.write(event="end", counts=moments.counts)
    return 0


Scenario = Generator[Start, Run, Any]


class Bench:
    """Runs scenarios, generators that yield a `Start` and are sent its `Run`, a few at a time.

    Args:
        work: folder of runs and logs.
        parallel: runs at a time.
        limit: seconds after which a run is killed, because it hangs.
    """

    def __init__(self, work: Path, parallel: int = 2, limit: float = 180.0):
        self.work, self.parallel, self.limit = work.absolute(), parallel, limit
        self.work.mkdir(parents=True, exist_ok=True)
        self.whole: dict[str, Run] = {}
        self.number = 0

    def run(self, scenarios: Iterable[Scenario]) -> list[Any]:
        """Returns what each scenario returns, in order."""
        waiting = deque(enumerate(scenarios))
        results: dict[int, Any] = {}
        running: dict[int, tuple[int, Scenario, Start]] = {}
        ended: list[tuple[int, Scenario, Start, Run, float]] = []

        def advance(number: int, scenario: Scenario, run: Run | None) -> None:
            try:
                start = scenario.send(run)
            except StopIteration as stop:
                results[number] = stop.value
                return
            start.begin(self.work)
            running[start.pid] = (number, scenario, start)

        try:
            self._loop(waiting, running, ended, advance)
        finally:
            for pid, (_, _, start) in running.items():
                _kill(pid, start.workers())
        return [results[number] for number in sorted(results)]

    def _loop(self, waiting, running, ended, advance) -> None:
        while waiting or running or ended:
            while waiting and len(running) + len(ended) < self.parallel:
                number, scenario = waiting.popleft()
                advance(number, scenario, None)
            for pid in list(running):
                number, scenario, start = running[pid]
                code = start.poll()
                if code is not None:
                    del running[pid]
                    ended.append((number, scenario, start, start.end(code), time.monotonic()))
                elif time.monotonic() - start.began > self.limit:
                    _kill(pid, start.workers())
            for item in list(ended):
                number, scenario, start, run, since = item
                left, late = start.workers(), time.monotonic() - since
                if left and late < ORPHAN_SECONDS:
                    continue
                ended.remove(item)
                run.orphans, run.late = left, late
                _kill(start.pid, left)
                run.log = start.log.read_text(encoding="utf-8", errors="replace") if start.log.is_file() else ""
                if start.journal.is_file():
                    run.journal = [json.loads(line) for line in start.journal.read_text(encoding="utf-8").splitlines()]
                advance(number, scenario, run)
            time.sleep(0.02)

    # ------------------------------------------------------------------ undisturbed runs
    def prepare(self, names: Iterable[str]) -> None:
        """Runs these jobs and all that they build on, undisturbed, in `work/whole`."""
        write_text(self.work / "text.txt")
        for name in with_needs(tuple(names)):
            if name not in self.whole:
                (self.whole[name],) = self.run([self._undisturbed(name)])

    def _undisturbed(self, name: str) -> Scenario:
        job, folder = JOBS[name], self.work / "whole" / name
        self.copy_base(job, folder)
        run = yield Start(job, folder, resume=False)
        if run.code != 0:
            raise RuntimeError(f"The undisturbed run of {name} ended with code {run.code}:\n{run.log[-3000:]}")
        return run

    def folder(self, name: str) -> Path:
        """Path of a new folder for a run of this job."""
        self.number += 1
        return self.work / "runs" / f"{self.number:04d}-{name}"

    def clear(self, folder: Path, case: Any) -> None:
        """Removes the folder of a case in which nothing was wrong."""
        if not case.wrong:
            shutil.rmtree(folder, ignore_errors=True)

    def copy_base(self, job: Job, folder: Path) -> None:
        """Copies the finished folder of `job.base` to `folder`, without checkpoints; does nothing for other jobs."""
        if job.base is not None:
            shutil.copytree(
                self.work / "whole" / job.base,
                folder,
                ignore=shutil.ignore_patterns("checkpoint-*"),
                dirs_exist_ok=True,
            )


def _kill(pid: int, workers: list[int]) -> None:
    for number in workers:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    journal, fault, trainings, recipe, *arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(work(journal, Fault(**json.loads(fault)), Job(recipe, (), int(trainings)), arguments))
