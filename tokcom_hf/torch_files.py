"""Errors that `torch.load(weights_only=True)` raises on damaged files, because its unpickler does not validate its input."""

import struct
from pickle import UnpicklingError

DAMAGED = (
    UnpicklingError, RuntimeError, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
    AssertionError, MemoryError, struct.error,
)  # fmt: skip
