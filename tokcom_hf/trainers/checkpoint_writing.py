"""One checkpoint between its first byte and its rename."""

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
    """Where a trainer's checkpoint is written inside a `with` block, and how it gets to its place behind it.

    Every rank writes into `folder`. The one that saves flushes all files, writes the manifest and renames the folder, after
    every rank has written. What the disk refuses on one rank ends all of them, in the same order of collective calls.

    Args:
        trainer: a `CompressionTrainer`.
        run_dir: folder of its checkpoints.
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
        """Keeps the first fault of the disk until all ranks are where they can speak of it."""
        try:
            with told_faults(self.place):
                yield
        except WriteError as error:
            self._fault = self._fault or str(error)

    def _agree(self) -> None:
        fault = first_of_all_ranks(self._fault)
        if fault is not None:
            raise WriteError(fault)

    def __enter__(self) -> "CheckpointWriting":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        try:
            # A fault of the disk is told when all ranks are here.
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
                    remove(self.parent)  # a full disk needs the room
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
        """Names the best checkpoint by its place; `Trainer` has looked for it under the temporary name."""
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
            # A damaged one that resuming has passed over, or the mark of transformers' just-in-time checkpoint.
            self.place.rename(self.parent / "replaced")
        self.folder.rename(self.place)
        flush(self.run_dir)
        remove(self.parent)

    def rotate(self) -> None:
        """Removes the checkpoints beyond `save_total_limit`, which `Trainer` has looked for in the temporary folder."""
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
    """Inside the block the folder to save a trainer's model into; behind it its files are in `folder`."""
    # With DeepSpeed every rank may write a part.
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
    """Whether the model's base lies in `folder`: its configuration is then written with regard to that folder."""
    reference = getattr(getattr(model, "config", None), "base_model_name_or_path", None)
    if not isinstance(reference, str) or not os.path.isdir(reference):
        return False
    return Path(reference).resolve().is_relative_to(folder.resolve())


def first_of_all_ranks(value: Any) -> Any:
    """The first value that is not None on any rank; every rank must call it."""
    return next((item for item in gather_object([value]) if item is not None), None)


@contextmanager
def own_key_names(model: Any) -> Iterator[None]:
    """`save_pretrained` with the names of the model's own parameters, which is what resuming reads.

    By default it writes those of the architecture's original release, and none of them would be found again.
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
