"""The output folder of a training recipe: who owns what in it, with which settings it was made, and how to go on.

A run leaves `run.json` in its folder: the recipe, and for each stage its settings and whether it is finished. From that
file `--overwrite` knows what it may remove, and a resume whether it goes on with the same data and settings.

    folder = RunFolder(run, "train_vqgan", folders=("discriminator", "pictures"))   # checks, changes nothing
    ...                                                            # everything else that can be refused
    folder.start({"": settings_of(SECTIONS, values)})              # removes what --overwrite replaces, writes run.json
    folder.train(trainer)                                          # from the beginning, or from the newest whole checkpoint
    with folder.whole() as place:                                  # what `trainer.save_model` does not save
        processor.save_pretrained(place)
    folder.finish()
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .checkpoints import checkpoints, choose_checkpoint
from .endings import writing_into
from .held_folder import HeldFolder
from .hub import RUN_MARKER
from .manifests import settings_difference
from .output_folders import (
    NOT_EMPTY,
    RESULT_FILES,
    check_new_folder,
    check_output_dir,
    holds_files,
    remove_checkpoints,
    remove_results,
)
from .run_arguments import RunFolderArguments
from .run_marker import read_marker, write_marker
from .whole_files import UNFINISHED_PREFIX, remove_unfinished, told_faults, whole_folder

__all__ = [
    "RESULT_FILES",
    "RunFolder",
    "RunFolderArguments",
    "check_new_folder",
    "check_output_dir",
    "remove_checkpoints",
]


class RunFolder:
    """The folder of one run. Building it checks and changes nothing; `start` makes it this run's.

    Args:
        run: the recipe's run arguments.
        recipe: its name.
        stages: what is trained, in order: the subfolder of each stage, or "" for a recipe that trains in the folder itself.
        folders: further subfolders that the run writes results into.
        given: stages that an earlier run finished in this folder and that this one takes as they are.

    Raises:
        FileExistsError: the folder holds files and the run neither overwrites nor resumes it.
        NotADirectoryError: the path is a file.
        ValueError: it is the folder of another recipe, or the checkpoint to go on from is not whole.
    """

    def __init__(
        self,
        run: RunFolderArguments,
        recipe: str,
        stages: Iterable[str] = ("",),
        folders: Iterable[str] = (),
        given: Iterable[str] = (),
    ):
        self.path, self.recipe, self.overwrite = Path(run.output_dir), recipe, run.overwrite
        self.stages, self.given = tuple(stages), tuple(given)
        self.folders = tuple(
            dict.fromkeys(name for name in [*self.stages, *folders] if name and name not in self.given)
        )
        self.wanted = run.checkpoint_wanted
        self.marker = read_marker(self.path)
        self._held = HeldFolder()
        self._told: set[Path] = set()
        # The stage of a named checkpoint, and the run it comes from where that is not this folder's.
        self._stage, self._source = None, None
        if isinstance(self.wanted, str):
            choose_checkpoint(self.path, self.wanted)
            self._stage = self._stage_of(self.wanted)
            source = Path(self.wanted).resolve().parent
            source = source.parent if self._stage else source
            self._source = None if source == self.path.resolve() else source
        self._check()

    @property
    def resumes(self) -> bool:
        """Whether the run goes on with what this folder holds."""
        return bool(self.wanted) and self._source is None

    # ------------------------------------------------------------------ checks
    def _check(self) -> None:
        path, shown = self.path, repr(str(self.path))
        if self.wanted and self.overwrite:
            raise ValueError("--overwrite starts over and --resume_from_checkpoint goes on; give one of them.")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"Output folder {shown} is a file; name a folder.")
        if not (above := next(place for place in path.absolute().parents if place.exists())).is_dir():
            raise NotADirectoryError(f"Output folder {shown} lies below {str(above)!r}, which is a file.")
        held = path.is_dir() and holds_files(path)
        if held and self._source is not None:
            raise FileExistsError(
                f"Output folder {shown} is not empty, and {self.wanted!r} is no checkpoint of the run in it; name a new "
                "folder with --output_dir."
            )
        if held and not (self.wanted or self.overwrite or self.given):
            raise FileExistsError(NOT_EMPTY.format(folder=str(path)))
        if self.marker is not None and self.marker["recipe"] != self.recipe:
            raise ValueError(
                f"{shown} is a run of {self.marker['recipe']}.py, not of {self.recipe}.py; name another folder with "
                "--output_dir."
            )
        if held and self.marker is None and self.overwrite:
            full = [name for name in self.folders if (path / name).is_dir() and any((path / name).iterdir())]
            if full:
                raise FileExistsError(
                    f"{str(path / full[0])!r} holds files, and no {RUN_MARKER} in {shown} says that they are of this "
                    "recipe; remove them yourself, or name another folder with --output_dir."
                )
        if held and self.marker is None and self.resumes:
            checkpoint = any(next(checkpoints(path / stage), None) for stage in self.stages)
            if (path / "config.json").is_file() and not checkpoint:
                raise FileExistsError(
                    f"{shown} holds a model, but neither {RUN_MARKER} nor checkpoints of a run to go on with; name "
                    "another folder with --output_dir."
                )

    def _check_settings(self, stage: str, now: Mapping[str, Any]) -> None:
        """Raises where a stage was begun with other settings than it is to go on with."""
        told = settings_difference(self.settings(stage), now)
        if told is None:
            return
        folder = self.path / stage
        raise ValueError(
            f"The run in {str(folder)!r} was made with other data or settings: {told}. Resume with those it was "
            "made with, start over with --overwrite, or train its weights on in a new folder: "
            f"--resume_from_checkpoint {folder / 'checkpoint-N'} --output_dir NEW."
        )

    def settings(self, stage: str = "") -> dict[str, Any]:
        """What `stage` was begun with, as `start` was given it."""
        return self._record(stage).get("settings", {})

    def _record(self, stage: str) -> dict[str, Any]:
        return {} if self.marker is None else self.marker["stages"].get(stage, {})

    def _stage_of(self, checkpoint: str) -> str:
        """The stage of a named checkpoint: the name of the folder it lies in, where stages have folders."""
        name = Path(checkpoint).resolve().parent.name
        if name in self.stages:
            return name
        if "" in self.stages:
            return ""
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: the checkpoint must lie in a folder called "
            f"{' or '.join(self.stages)}, which tells the stage to go on with."
        )

    # ------------------------------------------------------------------ the run
    def start(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Removes what `--overwrite` replaces and writes `run.json`. Call it when nothing else is left to refuse.

        Args:
            settings: for each stage what decides its result (`fingerprints.settings_of`).

        Raises:
            ValueError: a resume with other data or settings; names them.
            FileExistsError: a stage behind a given one was begun before, and the run neither overwrites nor resumes it.
        """
        if self.resumes:
            for stage in self.stages:
                self._check_settings(stage, settings[stage])
        begun = [
            stage
            for stage in self.stages
            if stage and (self.path / stage).is_dir() and any((self.path / stage).iterdir())
        ]
        if self.given and begun and not (self.wanted or self.overwrite):
            raise FileExistsError(NOT_EMPTY.format(folder=str(self.path / begun[0])))
        state = PartialState()
        # No rank may see the new marker while another still checks the folder.
        state.wait_for_everyone()
        if state.is_main_process:
            with told_faults(self.path):
                self._make_own(settings)
        state.wait_for_everyone()
        self.marker = read_marker(self.path)
        self._held.hold(self.path)
        writing_into(self._held)

    def _make_own(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        kept = set() if self.marker is None else set(self.marker["stages"]) if self.resumes else set(self.given)
        stages = {stage: self._record(stage) for stage in kept if self._record(stage)}
        for stage in self.stages:
            stages[stage] = {"settings": settings[stage], "finished": self.resumes and self.is_finished(stage)}
        self.path.mkdir(parents=True, exist_ok=True)
        folders = [self.path, *(self.path / name for name in self.folders)]
        marker = {"recipe": self.recipe, "stages": stages}
        # Where removing was cut short, what is left of the former run is not gone on with.
        replaces = self.overwrite or bool(self.marker and self.marker.get("removing"))
        if replaces and self.marker is not None:
            write_marker(self.path, marker | {"removing": True})
            remove_results(folders)
        elif self.overwrite:
            remove_checkpoints(self.path)
        for folder in folders:
            remove_unfinished(folder)
        if self._stage is not None:
            self._go_on_from_stage(stages)
        write_marker(self.path, marker)

    def _go_on_from_stage(self, stages: dict[str, Any]) -> None:
        """From a named checkpoint: earlier stages are as they were, later ones are trained anew."""
        place = self.stages.index(self._stage)
        for stage in self.stages[:place]:
            if self._source is not None and (self._source / stage).is_dir():
                unfinished = self.path / f"{UNFINISHED_PREFIX}{stage}"
                shutil.copytree(self._source / stage, unfinished, ignore=shutil.ignore_patterns("checkpoint-*", ".*"))
                unfinished.rename(self.path / stage)
            stages[stage]["finished"] = True
        for stage in self.stages[place:]:
            stages[stage]["finished"] = False
        for stage in self.stages[place + 1 :]:
            remove_checkpoints(self.path / stage)

    def checkpoint(self, required: Iterable[str] = (), stage: str = "", folder: str | None = None) -> str | None:
        """The checkpoint from which `stage` goes on, or None where it starts at the beginning; says which.

        Args:
            required: files that this run needs in it (`CompressionTrainer.checkpoint_files`).
            stage: one of the run's stages.
            folder: subfolder of the stage's checkpoints where it is not called as the stage.
        """
        # Another run's checkpoint may have been saved with other settings.
        settings = self.settings(stage) if self._source is None else None
        if isinstance(self.wanted, str):
            return choose_checkpoint(None, self.wanted, required, settings) if stage == self._stage else None
        place = self.path / (stage if folder is None else folder)
        chosen = choose_checkpoint(place, self.wanted, required, settings)
        if self.wanted and place not in self._told:
            self._told.add(place)
            told = f"going on from {chosen}" if chosen else f"no checkpoint in {place} yet; starting at the beginning"
            PartialState().print(told, flush=True)
        return chosen

    def train(self, trainer: Any, stage: str = "", folder: str | None = None) -> None:
        """Trains from where `stage` is to go on; the checkpoints repeat its settings.

        Args:
            trainer: a `CompressionTrainer`.
            stage, folder: see `checkpoint`.
        """
        trainer.run_settings = self.settings(stage)
        trainer.train(self.checkpoint(trainer.checkpoint_files(), stage, folder))

    @contextmanager
    def whole(self, name: str = "") -> Iterator[Path]:
        """Inside the block an empty folder to save a model into; behind it the files are in the run's folder `name`.

        A kill leaves the former files or these. For the main process alone.
        """
        self._held.check()
        with whole_folder(self.path / name) as place:
            yield place

    def is_finished(self, stage: str) -> bool:
        """Whether this run goes on with one that has finished `stage`."""
        if not self.wanted:
            return False
        if self.marker is None:
            # A run of an older release left only its results.
            return self._source is None and bool(stage) and (self.path / stage / "results.json").is_file()
        return bool(self._record(stage).get("finished"))

    def begun_with(self, stage: str, file: str) -> str | None:
        """The folder in which the stage that this run goes on with has left `file`; None for a new stage."""
        places = [self.path] if self.resumes else []
        if self._source is not None and stage in self.stages and stage != self._stage:
            places = [self._source]
        return next((str(place / stage) for place in places if (place / stage / file).is_file()), None)

    def finish(self, stage: str = "") -> None:
        """Records that `stage` has left its results.

        Raises:
            WriteError: the folder was removed meanwhile, or cannot be written.
        """
        self._held.check()
        if self.marker is not None:
            self._record(stage)["finished"] = True
            if PartialState().is_main_process:
                write_marker(self.path, self.marker)
