"""What torch raises on a damaged file that is read with `weights_only=True`: its unpickler trusts the stack it works on."""

import struct
from pickle import UnpicklingError

DAMAGED = (
    UnpicklingError, RuntimeError, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
    AssertionError, MemoryError, struct.error,
)  # fmt: skip
