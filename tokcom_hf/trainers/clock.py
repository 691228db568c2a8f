"""Seconds of training, summed over the parts of a run that was interrupted and resumed."""

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Counts seconds of training; a resumed run continues from the count in its checkpoint."""

    def __init__(self):
        self.before, self.started = 0.0, None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.started is None else time.monotonic() - self.started)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"before": self.seconds, "started": None}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) or self.state()
        self.before, self.started = float(saved["attributes"]["before"]), time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.before, self.started = self.seconds, None
