"""The output folder of a training recipe: who owns what in it, with which settings it was made, and how to go on.

A run leaves `run.json` in its folder: the recipe, and for each stage its settings and whether it is finished. From that
file `--overwrite` knows what it may remove, and a resume whether it goes on with the same data and settings.

    folder = RunFolder(run, "train_vqgan", folders=("discriminator", "pictures"))   # checks, changes nothing
    ...                                                            # everything else that can be refused
    folder.start({"": settings_of(SECTIONS, values)})              # removes what --overwrite replaces, writes run.json
    trainer.train(folder.checkpoint(trainer.checkpoint_files()))
    folder.finish()
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .checkpoints import checkpoints, choose_checkpoint
from .hub import RUN_MARKER

# Files that recipes write into their folders, beside checkpoints; nothing else is ever removed.
RESULT_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "training_args.bin", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "processor_config.json", "preprocessor_config.json", "README.md",
    "results.json", "budget.json", "samples.txt", "samples.jsonl", "train_latents.*", "validation_latents.*",
    "accuracy_against_noise.png", "denoising_against_time.png", "reconstructions.png", "codebook.png", "history.png",
    "joint_training.png", "generated.png", "completed.png", "best.json", "best_vae.pt", "best_diffusion.pt",
    "logs/training.log", "checkpoints/*_step_*.pt",
    "logs/tensorboard/events.out.tfevents.*", "step-*-reconstructions.png", "step-*-codebook.png",
)  # fmt: skip


@dataclass
class RunFolderArguments:
    """Where a recipe writes, and what it does with what is there; the same in every recipe that trains."""

    output_dir: str = field(default="outputs", metadata={"help": "Folder of the model and the reports."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the run in the output folder; files of others stay."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true' goes on from the newest whole checkpoint of the output folder, or from the beginning where "
            "there is none yet; a path goes on from that checkpoint."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Short for --resume_from_checkpoint true."})

    @property
    def checkpoint_wanted(self) -> str | bool:
        """False: a new run; True: the newest checkpoint; else a checkpoint's path."""
        given = self.resume_from_checkpoint
        if given is None or given.lower() in ("false", "none"):
            return self.resume
        return True if given.lower() == "true" else given


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
        self.marker = _read_marker(self.path)
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
        held = path.is_dir() and any(item.name != RUN_MARKER for item in path.iterdir())
        if held and self._source is not None:
            raise FileExistsError(
                f"Output folder {shown} is not empty, and {self.wanted!r} is no checkpoint of the run in it; name a new "
                "folder with --output_dir."
            )
        if held and not (self.wanted or self.overwrite or self.given):
            raise FileExistsError(_NOT_EMPTY.format(folder=str(path)))
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
        before = self._record(stage).get("settings", {})
        # A setting that only one of two releases knows says nothing.
        differing = [name for name in before if name in now and before[name] != now[name]]
        if not differing:
            return
        told = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in differing[:8])
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        folder = self.path / stage
        raise ValueError(
            f"The run in {str(folder)!r} was made with other data or settings: {told}{more}. Resume with those it was "
            "made with, start over with --overwrite, or train its weights on in a new folder: "
            f"--resume_from_checkpoint {folder / 'checkpoint-N'} --output_dir NEW."
        )

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
            raise FileExistsError(_NOT_EMPTY.format(folder=str(self.path / begun[0])))
        state = PartialState()
        # No rank may see the new marker while another still checks the folder.
        state.wait_for_everyone()
        if state.is_main_process:
            kept = set() if self.marker is None else set(self.marker["stages"]) if self.resumes else set(self.given)
            stages = {stage: self._record(stage) for stage in kept if self._record(stage)}
            for stage in self.stages:
                stages[stage] = {"settings": settings[stage], "finished": self.resumes and self.is_finished(stage)}
            if self.overwrite:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            if self._stage is not None:
                self._go_on_from_stage(stages)
            _write_marker(self.path, {"recipe": self.recipe, "stages": stages})
        state.wait_for_everyone()
        self.marker = _read_marker(self.path)

    def _go_on_from_stage(self, stages: dict[str, Any]) -> None:
        """From a named checkpoint: earlier stages are as they were, later ones are trained anew."""
        place = self.stages.index(self._stage)
        for stage in self.stages[:place]:
            if self._source is not None and (self._source / stage).is_dir():
                shutil.copytree(self._source / stage, self.path / stage, ignore=shutil.ignore_patterns("checkpoint-*"))
            stages[stage]["finished"] = True
        for stage in self.stages[place:]:
            stages[stage]["finished"] = False
        for stage in self.stages[place + 1 :]:
            remove_checkpoints(self.path / stage)

    def _clear(self) -> None:
        """Checkpoints directly in the folder; what a run of this package wrote, too, where `run.json` says it is one."""
        remove_checkpoints(self.path)
        if self.marker is None:
            return
        for folder in (self.path, *(self.path / name for name in self.folders)):
            if folder.is_symlink() or not folder.is_dir():
                continue
            remove_checkpoints(folder)
            for pattern in RESULT_FILES:
                for file in folder.glob(pattern):
                    if file.is_file() or file.is_symlink():
                        file.unlink()
            for emptied in (folder / "logs" / "tensorboard", folder / "logs", folder / "checkpoints"):
                with contextlib.suppress(OSError):  # others' files are in it, or there is none
                    emptied.rmdir()
            if folder != self.path:
                with contextlib.suppress(OSError):  # others' files are in it
                    folder.rmdir()

    def checkpoint(self, required: Iterable[str] = (), stage: str = "", folder: str | None = None) -> str | None:
        """The checkpoint from which `stage` goes on, or None where it starts at the beginning; says which.

        Args:
            required: files that this run needs in it (`CompressionTrainer.checkpoint_files`).
            stage: one of the run's stages.
            folder: subfolder of the stage's checkpoints where it is not called as the stage.
        """
        if isinstance(self.wanted, str):
            return choose_checkpoint(None, self.wanted, required) if stage == self._stage else None
        place = self.path / (stage if folder is None else folder)
        chosen = choose_checkpoint(place, self.wanted, required)
        if self.wanted:
            told = f"going on from {chosen}" if chosen else f"no checkpoint in {place} yet; starting at the beginning"
            PartialState().print(told, flush=True)
        return chosen

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
        """Records that `stage` has left its results."""
        if self.marker is not None:
            self._record(stage)["finished"] = True
            if PartialState().is_main_process:
                _write_marker(self.path, self.marker)


_NOT_EMPTY = (
    "Output folder {folder!r} is not empty; add --resume_from_checkpoint true to go on with that run, --overwrite to "
    "replace it, or name another with --output_dir."
)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / RUN_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"recipe", "stages"} <= set(marker) else None


def _write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    # A kill leaves the old marker or the new one.
    unfinished = folder / f".{RUN_MARKER}"
    unfinished.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / RUN_MARKER)


def remove_checkpoints(folder: Path) -> None:
    """Removes the folders `checkpoint-N` directly in `folder`; a link goes, what it points to stays."""
    for checkpoint in list(checkpoints(folder)):
        if checkpoint.is_symlink():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint)


def check_new_folder(path: str | Path, overwrite: bool = False) -> Path:
    """Refuses a non-empty output folder of a recipe that trains nothing, unless it may replace files of the same names.

    Raises:
        FileExistsError: the folder holds files and `overwrite` is not set.
        NotADirectoryError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Output folder {str(path)!r} is a file; name a folder.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"Output folder {str(path)!r} is not empty; add --overwrite to replace files of the same names in it, or name "
            "another folder."
        )
    return path


def check_output_dir(path: str | Path, overwrite: bool = False, resume: bool = False) -> Path:
    """Refuses a non-empty output folder unless the run overwrites or resumes it.

    With `overwrite` the folders `checkpoint-N` directly in it are removed; what lies below other folders stays. Recipes use
    `RunFolder`, which knows what else a run owns.

    Raises:
        FileExistsError: the folder holds files and neither flag is set.
        NotADirectoryError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Output folder {str(path)!r} is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not (overwrite or resume):
            raise FileExistsError(_NOT_EMPTY.format(folder=str(path)))
        if overwrite and not resume:
            remove_checkpoints(path)
    return path
