"""The quantizers by name: `ema` (learned codebook), `fsq` (rounding) and `lfq` (signs).

Each maps features `(..., input_size)` to embeddings of the same shape and integer codes `(...)` in [0, codebook_size). They
compute in float32 under any autocast, so that codes do not depend on the autocast dtype.
"""

from .vqgan_quantizer_base import Quantizer, QuantizerOutput
from .vqgan_quantizer_ema import EMAQuantizer
from .vqgan_quantizer_fsq import FSQQuantizer
from .vqgan_quantizer_lfq import LFQQuantizerHead

QUANTIZERS: dict[str, type[EMAQuantizer] | type[FSQQuantizer] | type[LFQQuantizerHead]] = {
    "ema": EMAQuantizer,
    "fsq": FSQQuantizer,
    "lfq": LFQQuantizerHead,
}

__all__ = [
    "QUANTIZERS",
    "EMAQuantizer",
    "FSQQuantizer",
    "LFQQuantizerHead",
    "Quantizer",
    "QuantizerOutput",
    "build_quantizer",
]


def build_quantizer(config, input_size: int) -> Quantizer:
    """The quantizer that `config.quantizer` names, for features of `input_size` channels."""
    return QUANTIZERS[config.quantizer](config, input_size)
