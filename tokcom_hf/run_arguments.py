"""The arguments for the output folder that every training recipe has."""

from dataclasses import dataclass, field
from typing import Any


def require_positive(arguments: Any, *names: str) -> None:
    """Raises ValueError where one of these attributes is a number below 1; None is accepted."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")


@dataclass
class RunFolderArguments:
    """Where a training recipe writes, and whether it replaces or resumes a run in that folder."""

    output_dir: str = field(default="outputs", metadata={"help": "Output folder of the model and the reports."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the run in the output folder; files that no run wrote are kept."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true' resumes from the newest undamaged checkpoint of the output folder, or starts from the beginning "
            "if there is none yet; a path resumes from that checkpoint."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Short for --resume_from_checkpoint true."})

    @property
    def checkpoint_wanted(self) -> str | bool:
        """Which checkpoint to resume from: False for none, True for the newest one, or a path."""
        given = self.resume_from_checkpoint
        if given is None or given.lower() in ("false", "none"):
            return self.resume
        return True if given.lower() == "true" else given
