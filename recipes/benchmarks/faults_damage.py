"""Cases with a damaged file in the newest checkpoint, a full disk, a removed output folder or NaN weights."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults_checks import Case, left_over, told, unequal
from faults_jobs import JOBS
from faults_moments import Fault
from faults_processes import Bench, Scenario, Start

WAYS = ("truncated", "emptied", "missing", "swapped")


def templates(bench: Bench, names: list[str]) -> dict[str, Path]:
    """Folders of runs killed after the second of their three checkpoints, by job; each case damages a copy."""
    folders = {name: bench.work / "templates" / name for name in names}
    bench.run(_template(bench, name, folder) for name, folder in folders.items())
    return folders


def _template(bench: Bench, name: str, folder: Path) -> Scenario:
    bench.copy_base(JOBS[name], folder)
    run = yield Start(JOBS[name], folder, Fault("step", 5))
    if run.code != -9 or len(checkpoints(folder)) < 2:
        raise RuntimeError(f"The template of {name} ended with code {run.code}:\n{run.log[-2000:]}")


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints below `folder`, the newest last."""
    found = sorted(folder.rglob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [path for path in found if path.is_dir() and ".unfinished" not in str(path)]


def damage(file: Path, way: str, older: Path) -> bool:
    """Damages `file` in one of `WAYS`; "swapped" copies `older`. Returns False if that would change nothing."""
    content = file.read_bytes()
    if way == "swapped":
        if not older.is_file() or older.read_bytes() == content:
            return False
        file.write_bytes(older.read_bytes())
    elif way == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if way == "truncated" else b"")
    return True


def scenarios(bench: Bench, names: list[str], each: int, seed: int) -> Iterator[Scenario]:
    """`each` cases per trainer, drawn from all pairs of file and way; no file comes twice before all came once."""
    draw, folders = random.Random(seed), templates(bench, names)
    for name in names:
        *_, older, newest = checkpoints(folders[name])
        files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
        draw.shuffle(files)
        ways = {file: draw.sample(WAYS, len(WAYS)) for file in files}
        pairs = [(file, ways[file][turn]) for turn in range(len(WAYS)) for file in files]
        pairs = [p for p in pairs if p[1] != "swapped" or (newest / p[0]).read_bytes() != _content(older / p[0])]
        for file, way in pairs[:each]:
            yield one(bench, name, folders[name], file, way)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def one(bench: Bench, name: str, template: Path, file: str, way: str) -> Scenario:
    """Resumes from a damaged checkpoint: the run must report it and take an older one, or refuse and name it."""
    job, folder = JOBS[name], bench.folder(name)
    case = Case("damage", name, f"{file} {way}")
    shutil.copytree(template, folder)
    *_, older, newest = checkpoints(folder)
    damage(newest / file, way, older / file)
    run = yield Start(job, folder)
    case.seconds = run.seconds
    if run.code == 0:
        case.figures["outcome"] = "fell back"
        # A checkpoint without manifest.json may be an older release's: the run resumes from it and says so.
        expected = f"has no {file}" if (file, way) == ("manifest.json", "missing") else "passed over"
        if expected not in run.log or newest.name not in run.log:
            case.wrong.append("the damage is not reported")
            case.figures["outcome"] = "silent"
        case.wrong += unequal(folder, bench.whole[name].folder) + left_over(folder)
    else:
        case.figures["outcome"] = "refused"
        case.wrong += told(run) + ([] if newest.name in run.log else ["the error does not name the checkpoint"])
    bench.clear(folder, case)
    return case


def disk_scenarios(bench: Bench, names: list[str], reduced: bool, seed: int) -> Iterator[Scenario]:
    """No room in a checkpoint's write or in the final save, output folder removed during training, NaN weights."""
    draw = random.Random(seed)
    for row, name in enumerate(names):
        counts = bench.whole[name].counts
        faults = [
            Fault("checkpoint", draw.randint(1, counts["checkpoint"] // 3), "file size"),
            # The largest files come first; after them no file may be large enough to be refused.
            Fault("final", 1, "file size"),
            Fault("step", 4, "delete"),
            Fault("step", 4, "nan"),
        ]
        for fault in faults[row % 4 : row % 4 + 1] if reduced else faults:
            yield one_disk(bench, name, fault)


def one_disk(bench: Bench, name: str, fault: Fault) -> Scenario:
    """The run must end with one error sentence and not with 0; without the fault the same command must resume it."""
    job, folder = JOBS[name], bench.folder(name)
    what = {"file size": "no room", "delete": "folder removed", "nan": "NaN in the weights"}[fault.what]
    case = Case("disk", name, f"{what} ({fault.place} {fault.count})", figures={"what": what})
    bench.copy_base(job, folder)
    run = yield Start(job, folder, fault)
    case.seconds = run.seconds
    case.wrong += ["exit code 0"] if run.code == 0 else told(run)
    if not run.struck:
        case.wrong.append("the fault was not triggered")
    if fault.what == "delete":
        # The deleted folder also held the base that the job starts from.
        shutil.rmtree(folder, ignore_errors=True)
        bench.copy_base(job, folder)
    again = yield Start(job, folder)
    if again.code != 0:
        case.wrong.append(f"the resumed run ended with {again.code}: {again.log[-400:]}")
    else:
        case.wrong += unequal(folder, bench.whole[name].folder) + left_over(folder)
    bench.clear(folder, case)
    return case
