"""The output folder of a training recipe: the files that belong to its run, the run's settings, and how to resume it.

A run writes `run.json` into its folder: the recipe's name, and for each stage its settings and whether it is finished. This
file tells `--overwrite` what it may remove, and a resume whether data and settings are the same.

    folder = RunFolder(run, "train_vqgan", folders=("discriminator", "pictures"))   # checks only, changes nothing
    ...                                                            # all other checks of arguments and data
    folder.start({"": settings_of(SECTIONS, values)})              # removes what --overwrite replaces, writes run.json
    folder.train(trainer)                                          # from the beginning or a checkpoint
    with folder.whole() as place:                                  # files that `trainer.save_model` does not save
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
    """The output folder of one run. The constructor only checks it; `start` changes it.

    Args:
        run: the recipe's run arguments.
        recipe: the recipe's name.
        stages: subfolders of the stages, in the order of training; "" for a recipe that trains in the folder itself.
        folders: further subfolders that the run writes results into.
        given: stages that an earlier run has finished in this folder and that this run uses unchanged.

    Raises:
        FileExistsError: the folder holds files and the run neither overwrites nor resumes it.
        NotADirectoryError: the path is a file.
        ValueError: the folder belongs to another recipe, or the named checkpoint is incomplete or damaged.
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
        # The stage of a named checkpoint, and the folder of its run if that is not this folder.
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
        """Whether the run resumes the run of this folder."""
        return bool(self.wanted) and self._source is None

    # ------------------------------------------------------------------ checks
    def _check(self) -> None:
        path, shown = self.path, repr(str(self.path))
        if self.wanted and self.overwrite:
            raise ValueError("--overwrite starts over and --resume_from_checkpoint resumes; give one of them.")
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
                    f"{str(path / full[0])!r} holds files, and no {RUN_MARKER} in {shown} shows that they belong to this "
                    "recipe; remove them yourself, or name another folder with --output_dir."
                )
        if held and self.marker is None and self.resumes:
            checkpoint = any(next(checkpoints(path / stage), None) for stage in self.stages)
            if (path / "config.json").is_file() and not checkpoint:
                raise FileExistsError(
                    f"{shown} holds a model, but neither {RUN_MARKER} nor a checkpoint to resume from; name "
                    "another folder with --output_dir."
                )

    def _check_settings(self, stage: str, now: Mapping[str, Any]) -> None:
        """Raises ValueError if a stage would be resumed with other settings than it was started with."""
        told = settings_difference(self.settings(stage), now)
        if told is None:
            return
        folder = self.path / stage
        raise ValueError(
            f"The run in {str(folder)!r} was made with other data or settings: {told}. Resume it with its own "
            "settings, start over with --overwrite, or continue from its weights in a new folder: "
            f"--resume_from_checkpoint {folder / 'checkpoint-N'} --output_dir NEW."
        )

    def settings(self, stage: str = "") -> dict[str, Any]:
        """Returns the settings that `stage` was started with."""
        return self._record(stage).get("settings", {})

    def _record(self, stage: str) -> dict[str, Any]:
        return {} if self.marker is None else self.marker["stages"].get(stage, {})

    def _stage_of(self, checkpoint: str) -> str:
        """Returns the stage of a named checkpoint, which is the name of its parent folder if stages have folders."""
        name = Path(checkpoint).resolve().parent.name
        if name in self.stages:
            return name
        if "" in self.stages:
            return ""
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: the checkpoint must lie in a folder called "
            f"{' or '.join(self.stages)}, because that name is the stage to resume."
        )

    # ------------------------------------------------------------------ the run
    def start(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Removes the files that `--overwrite` replaces and writes `run.json`. Call it after all other checks.

        Args:
            settings: for each stage, the settings that determine its result (`fingerprints.settings_of`).

        Raises:
            ValueError: the run is resumed with other data or settings; the message lists them.
            FileExistsError: a stage after a given one has files, and the run neither overwrites nor resumes it.
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
        # Wait: no rank may read the new marker while another rank still checks the folder.
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
        # "removing" marks an interrupted removal: the rest of that run is removed, too, and never resumed.
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
        """Prepares to resume from a named checkpoint: earlier stages are kept, later stages are trained again."""
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
        """Returns and prints the checkpoint from which `stage` resumes; None means that it starts from the beginning.

        Args:
            required: files that this run needs in the checkpoint (`CompressionTrainer.checkpoint_files`).
            stage: one of the run's stages.
            folder: subfolder of the stage's checkpoints, if its name differs from the stage.
        """
        # A checkpoint of another run may have other settings, so they are not compared.
        settings = self.settings(stage) if self._source is None else None
        if isinstance(self.wanted, str):
            return choose_checkpoint(None, self.wanted, required, settings) if stage == self._stage else None
        place = self.path / (stage if folder is None else folder)
        chosen = choose_checkpoint(place, self.wanted, required, settings)
        if self.wanted and place not in self._told:
            self._told.add(place)
            told = f"resuming from {chosen}" if chosen else f"no checkpoint in {place} yet; starting from step 0"
            PartialState().print(told, flush=True)
        return chosen

    def train(self, trainer: Any, stage: str = "", folder: str | None = None) -> None:
        """Trains `stage` from its checkpoint or from the beginning; new checkpoints record the stage's settings.

        Args:
            trainer: a `CompressionTrainer`.
            stage, folder: see `checkpoint`.
        """
        trainer.run_settings = self.settings(stage)
        trainer.train(self.checkpoint(trainer.checkpoint_files(), stage, folder))

    @contextmanager
    def whole(self, name: str = "") -> Iterator[Path]:
        """Gives an empty folder to save a model into; at the end of the block its files move to the subfolder `name`.

        After a kill, that folder holds either all old or all new files. Call it in the main process only.
        """
        self._held.check()
        with whole_folder(self.path / name) as place:
            yield place

    def is_finished(self, stage: str) -> bool:
        """Returns whether this run resumes a run that has finished `stage`."""
        if not self.wanted:
            return False
        if self.marker is None:
            # Runs of older releases have no marker; their results show that they finished.
            return self._source is None and bool(stage) and (self.path / stage / "results.json").is_file()
        return bool(self._record(stage).get("finished"))

    def begun_with(self, stage: str, file: str) -> str | None:
        """Returns the folder in which the resumed run's `stage` has left `file`; None if there is none."""
        places = [self.path] if self.resumes else []
        if self._source is not None and stage in self.stages and stage != self._stage:
            places = [self._source]
        return next((str(place / stage) for place in places if (place / stage / file).is_file()), None)

    def finish(self, stage: str = "") -> None:
        """Records in `run.json` that `stage` is finished.

        Raises:
            WriteError: the folder was removed or replaced, or cannot be written.
        """
        self._held.check()
        if self.marker is not None:
            self._record(stage)["finished"] = True
            if PartialState().is_main_process:
                write_marker(self.path, self.marker)
