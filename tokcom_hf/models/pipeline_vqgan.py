"""`pipeline("vq-reconstruction")`, images → codes → images, and `pipeline("vq-tokenize")`, images ↔ codes."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from .pipeline_base import BatchedPipeline, refuse_unknown
from .shared_image_files import load_image
from .shared_image_pixels import CHANNELS


class _VQPipeline(BatchedPipeline):
    """Images in, codes or images out.

    An image is a PIL image, a path, a URL, a data URI, an array, a tensor, or a row `{"image": ...}` of a data set. Keyword
    arguments, at construction or call: `allow_urls` (False refuses URLs; by default they are fetched as transformers does,
    also from this machine and its network), `timeout` (seconds for a URL), `batch_size` (images at once, 1 by default),
    `num_workers` (threads that read images ahead).
    """

    family = "vqgan"
    _load_image_processor = True

    def _sanitize_parameters(self, **kwargs):
        refuse_unknown(kwargs, ("allow_urls", "timeout", "batch_size", "num_workers"))
        return kwargs, {}, {}

    def _is_single(self, inputs: Any) -> bool:
        if isinstance(inputs, np.ndarray | torch.Tensor):
            return inputs.ndim < 4
        return isinstance(inputs, str | os.PathLike | Image.Image | dict) or hasattr(inputs, "read")

    def preprocess(  # type: ignore[override]  # a batch
        self, inputs: list, allow_urls: bool = True, timeout: float | None = None
    ) -> dict[str, Any]:
        """Images → `pixel_values` (batch, channels, height, width)."""
        images = [self._image(row, allow_urls, timeout) for row in inputs]
        return dict(self.image_processor(images, return_tensors="pt"))

    def _image(self, row: Any, allow_urls: bool, timeout: float | None) -> Any:
        if isinstance(row, dict):
            if set(row) != {"image"}:
                raise ValueError(f'Expected an image or {{"image": ...}}, got the keys {sorted(row)}.')
            row = row["image"]
        if isinstance(row, str) and not os.path.isfile(row):
            return load_image(row, timeout, allow_urls, CHANNELS[self.image_processor.num_channels])
        # The image processor opens files itself, because it keeps the transparency and depth that the model can use.
        return row

    def _dataset_row(self, row: dict) -> Any:
        if "image" not in row:
            raise ValueError(f"The data set has no column 'image', only {sorted(row)}; use KeyDataset(data, column).")
        return row["image"]

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode(pixel_values.to(self.model.dtype))


class VQReconstructionPipeline(_VQPipeline):
    __doc__ = (
        "Images → `{'image': PIL image, 'codes': (h, w) list}` each.\n\n" + _VQPipeline.__doc__.partition("\n\n")[2]
    )

    def _forward(self, model_inputs):
        codes = self._encode(model_inputs["pixel_values"])
        return {"codes": codes, "pixels": self.model.decode_codes(codes)}

    def postprocess(self, model_outputs, **kwargs):
        images = self.image_processor.postprocess(model_outputs["pixels"])
        return [
            {"image": image, "codes": codes}
            for image, codes in zip(images, model_outputs["codes"].tolist(), strict=True)
        ]


class VQTokenizePipeline(_VQPipeline):
    __doc__ = (
        "Images → `{'codes': (h, w) list, 'length': h·w}`; an integer tensor of codes (h, w) → `{'image': PIL image}`.\n\n"
        + _VQPipeline.__doc__.partition("\n\n")[2]
    )

    def preprocess(self, inputs: list, **kwargs):  # type: ignore[override]  # a batch
        """Images → `pixel_values`, codes (h, w) → `codes`; `is_codes` tells which row is which."""
        is_codes = [_are_codes(row) for row in inputs]
        images = [row for row, codes in zip(inputs, is_codes) if not codes]
        given = [row for row in inputs if _are_codes(row)]
        return (super().preprocess(images, **kwargs) if images else {}) | {"codes": given, "is_codes": is_codes}

    def _forward(self, model_inputs):
        found = self._encode(model_inputs["pixel_values"]) if "pixel_values" in model_inputs else []
        pixels = [self.model.decode_codes(codes[None].long())[0] for codes in model_inputs["codes"]]
        return {"found": found, "pixels": pixels, "is_codes": model_inputs["is_codes"]}

    def postprocess(self, model_outputs, **kwargs):
        found, pixels = iter(model_outputs["found"]), iter(model_outputs["pixels"])
        results = []
        for is_codes in model_outputs["is_codes"]:
            if is_codes:
                results.append({"image": self.image_processor.postprocess(next(pixels)[None])[0]})
            else:
                codes = next(found)
                results.append({"codes": codes.tolist(), "length": codes.numel()})
        return results


def _are_codes(row: Any) -> bool:
    return isinstance(row, torch.Tensor) and not row.is_floating_point() and row.ndim == 2
