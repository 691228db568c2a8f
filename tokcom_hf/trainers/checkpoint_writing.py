"""Writes one checkpoint into a temporary folder, and renames the folder once it is complete."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from ..checkpoints import STATE_FILE, UNFINISHED_CHECKPOINT
from ..manifests import write_manifest
from ..whole_files import UNFINISHED_MODEL, WriteError, flush, flush_tree, remove, told_faults, whole_folder


class CheckpointWriting:
    """Context in which every rank writes a trainer's checkpoint into the temporary `folder`.

    At its end, after every rank has written, the rank that saves flushes all files, writes the manifest and renames the
    folder to its `place`. A disk error on one rank ends all ranks, with the same order of collective calls on each.

    Args:
        trainer: a `CompressionTrainer`.
        run_dir: folder that holds the checkpoints.
    """

    def __init__(self, trainer: Any, run_dir: str | Path):
        self.trainer, self.run_dir = trainer, Path(run_dir)
        self.step = trainer.state.global_step
        self.place = self.run_dir / f"checkpoint-{self.step}"
        self.parent = self.run_dir / UNFINISHED_CHECKPOINT
        self.folder = self.parent / self.place.name
        self._fault: str | None = None
        with self.noted():
            if self._saves:
                remove(self.parent)
                self.folder.mkdir(parents=True)
        self._agree()

    @property
    def _saves(self) -> bool:
        return self.trainer.args.should_save

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within this context a disk error is stored (the first one) instead of raised, until `_agree` raises it."""
        try:
            with told_faults(self.place):
                yield
        except WriteError as error:
            self._fault = self._fault or str(error)

    def _agree(self) -> None:
        """Raises WriteError on all ranks if one of them has stored an error; every rank must call it."""
        fault = first_of_all_ranks(self._fault)
        if fault is not None:
            raise WriteError(fault)

    def __enter__(self) -> "CheckpointWriting":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        try:
            # A disk error is raised only once all ranks are here.
            with self.noted():
                if error is not None:
                    raise error
            self._agree()
            with self.noted():
                self._put_in_place()
            self._agree()
        except BaseException:
            if self._saves:
                with suppress(OSError):
                    remove(self.parent)  # on a full disk the space is needed
            raise
        return True

    def _put_in_place(self) -> None:
        known = self._best_checkpoint()
        if not self._saves:
            return
        if known:
            self.trainer.state.save_to_json(str(self.folder / STATE_FILE))
        flush_tree(self.folder)
        args = self.trainer.args
        write_manifest(
            self.folder,
            step=self.step,
            world_size=args.world_size,
            resumable=not args.save_only_model,
            settings=self.trainer.run_settings,
        )
        self._rename()

    def _best_checkpoint(self) -> bool:
        """Names the best checkpoint by its final place; `Trainer` has looked for it in the temporary folder."""
        state, best = self.trainer.state, self.trainer.state.best_global_step
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if not best or self.trainer.args.save_strategy not in strategies:
            return False
        place = self.run_dir / f"checkpoint-{best}"
        if place == self.place or place.is_dir():
            state.best_model_checkpoint = str(place)
        return True

    def _rename(self) -> None:
        if self.place.is_file():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.place))
        if self.place.exists() or self.place.is_symlink():
            # There is a damaged checkpoint that resuming has skipped, or the mark of transformers' just-in-time checkpoint.
            self.place.rename(self.parent / "replaced")
        self.folder.rename(self.place)
        flush(self.run_dir)
        remove(self.parent)

    def rotate(self) -> None:
        """Removes the checkpoints beyond `save_total_limit`; `Trainer` has looked for them only in the temporary folder."""
        args, state = self.trainer.args, self.trainer.state
        if self._saves:
            rotate_checkpoints(
                output_dir=str(self.run_dir),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )


@contextmanager
def final_save(trainer: Any, folder: str | Path) -> Iterator[str]:
    """Context with a temporary folder to save a trainer's model into; at its end the files move into `folder`."""
    # With DeepSpeed every rank may write a part, so ranks enter and leave together.
    together = trainer.accelerator.wait_for_everyone if trainer.is_deepspeed_enabled else lambda: None
    unfinished = Path(folder) / UNFINISHED_MODEL
    if _refers_into(trainer.unwrapped_model, Path(folder)):
        yield str(folder)
        return
    with whole_folder(folder) if trainer.args.should_save else nullcontext(unfinished) as place:
        together()
        yield str(place)
        together()


def _refers_into(model: Any, folder: Path) -> bool:
    """Whether the model's base lies in `folder`; its configuration then names the base relative to that folder."""
    reference = getattr(getattr(model, "config", None), "base_model_name_or_path", None)
    if not isinstance(reference, str) or not os.path.isdir(reference):
        return False
    return Path(reference).resolve().is_relative_to(folder.resolve())


def first_of_all_ranks(value: Any) -> Any:
    """The first rank's value that is not None; every rank must call it."""
    return next((item for item in gather_object([value]) if item is not None), None)


@contextmanager
def own_key_names(model: Any) -> Iterator[None]:
    """Within this context `save_pretrained` writes the names of the model's own parameters, which resuming reads.

    By default it may write the names of the architecture's original release, none of which resuming would find.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    # torch keeps plain functions as attributes of the instance.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained
