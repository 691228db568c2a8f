"""The arguments about the output folder that every training recipe has."""

from dataclasses import dataclass, field


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
