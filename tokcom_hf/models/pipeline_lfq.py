"""`pipeline("lfq-image-text")`: text, images and both from an `LFQExpandedModel`."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, Pipeline

from .image_processing_vqgan import VQGANImageProcessor
from .processing_lfq import LFQProcessor

DECODER_FOLDER = "image_decoder"


class LFQImageTextPipeline(Pipeline):
    """Captions to pictures, or prompts to text with pictures in it.

    pipe = pipeline("lfq-image-text", model=folder)
    pipe("a red circle", guidance_scale=3.0)[0]["images"][0].save("circle.png")

    Keyword arguments, at construction or call: `mode` (`image` by default; `text`, `mixed`), `num_image_tokens` (the image
    decoder's own number by default), `guidance_scale` (above 1 the caption counts more; the prompt without a caption is
    what it is compared with), `num_return_sequences`, `seed`, and everything `generate` takes.

    Args:
        image_decoder: a model with `decode_codes` (a VQGAN with `quantizer="lfq"`), or its folder or Hub id; the folder
            `image_decoder` beside the model by default. None there either: ids only.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = True

    def __init__(self, *args, image_decoder=None, seed: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed
        if not isinstance(self.processor, LFQProcessor) and type(self.processor).__name__ != "LFQProcessor":
            raise ValueError("This pipeline needs the LFQProcessor saved beside the model; pass processor=...")
        self.image_decoder, self.image_processor = _load_decoder(image_decoder, self.model)
        if self.image_decoder is not None:
            self.image_decoder.to(self.device).eval()
            codes, ours = self.image_decoder.config.codebook_size, 2**self.model.config.output_dim
            if codes != ours:
                raise ValueError(f"The image decoder has {codes:,} codes, but the model has {ours:,} LFQ ids.")

    def _sanitize_parameters(self, mode: str | None = None, **kwargs):
        return {"mode": mode or "image"}, kwargs | {"mode": mode or "image"}, {}

    def __call__(self, inputs: Any, *, seed: int | None = None, batch_size: int | None = None, **kwargs) -> list:
        """Returns `[{"generated_text", "token_ids", "images"}]` for one text, a list of such lists for a list.

        Args:
            inputs: a caption or prompt, a dictionary `{"text": ..., "images": ...}` for a base model that sees images,
                or a list of either.
        """
        single = isinstance(inputs, (str, dict))
        rows = [inputs] if single else list(inputs)
        if not all(isinstance(row, (str, dict)) for row in rows):
            raise TypeError("Inputs must be texts, or dictionaries with text and images.")
        if not rows:
            return []
        seed = self.seed if seed is None else seed
        size = batch_size or self._batch_size or len(rows)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            results = [result for batch in super().__call__(batches, batch_size=1, **kwargs) for result in batch]
        return results[0] if single else results

    def preprocess(self, inputs: list, mode: str = "image", **kwargs):
        """Texts → left-padded ids; in `image` mode inside the processor's `image_prompt`."""
        texts = [row if isinstance(row, str) else row["text"] for row in inputs]
        pictures = [row["images"] for row in inputs if isinstance(row, dict) and row.get("images") is not None]
        pictures = [image for given in pictures for image in (given if isinstance(given, list) else [given])]
        if mode == "image":
            texts = [self.processor.image_prompt.replace("{caption}", text) for text in texts]
        self.processor.tokenizer.padding_side = "left"
        return dict(self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt"))

    def _forward(self, model_inputs, mode: str = "image", num_image_tokens: int | None = None, **options):
        if num_image_tokens is None:
            side = 0 if self.image_decoder is None else self._side()
            num_image_tokens = side * side or 256
        if options.get("guidance_scale", 1.0) not in (None, 1.0) and "negative_prompt_ids" not in options:
            empty = self.processor(text=self.processor.image_prompt.replace("{caption}", ""), return_tensors="pt")
            rows = model_inputs["input_ids"].shape[0] * options.get("num_return_sequences", 1)
            options["negative_prompt_ids"] = empty["input_ids"].to(self.device).expand(rows, -1)
        options = {"do_sample": True, "pad_token_id": self.processor.tokenizer.pad_token_id} | options
        ids = self.model.generate(**model_inputs, mode=mode, num_image_tokens=num_image_tokens, **options)
        new = ids[:, model_inputs["input_ids"].shape[1] :]
        return {"ids": new, "prompts": len(model_inputs["input_ids"]), "num_image_tokens": num_image_tokens}

    def postprocess(self, model_outputs, **kwargs):
        rows = []
        for ids in model_outputs["ids"]:
            images = self.processor.split_images(ids, model_outputs["num_image_tokens"])
            text = self.processor.decode(ids, skip_lfq_tokens=self.image_decoder is not None, skip_special_tokens=True)
            rows.append({"generated_text": text, "token_ids": ids.tolist(), "images": [self._draw(i) for i in images]})
        copies = len(rows) // model_outputs["prompts"]
        return [rows[start : start + copies] for start in range(0, len(rows), copies)]

    def _side(self) -> int:
        config = self.image_decoder.config
        return config.image_size // config.downsample_factor

    def _draw(self, ids: torch.LongTensor):
        """LFQ ids of a square image → PIL image, or the ids where nothing decodes them."""
        side = math.isqrt(len(ids))
        if self.image_decoder is None or side * side != len(ids):
            return ids.tolist()
        codes = (ids - self.model.config.lfq_start_token_id).view(1, side, side).to(self.device)
        with torch.no_grad():
            return self.image_processor.postprocess(self.image_decoder.decode_codes(codes))[0]


def _load_decoder(decoder, model):
    """Image decoder and its image processor, or (None, None)."""
    trust = {"trust_remote_code": True} if type(model).__module__.startswith("transformers_modules") else {}
    if decoder is None:
        folder = Path(model.config.name_or_path or ".") / DECODER_FOLDER
        if not (folder / "config.json").is_file():
            return None, None
        decoder = str(folder)
    if isinstance(decoder, (str, Path)):
        image_processor = AutoImageProcessor.from_pretrained(decoder, **trust)
        return AutoModel.from_pretrained(decoder, **trust), image_processor
    config = decoder.config
    processor = VQGANImageProcessor(config.image_size, config.in_channels, size_divisor=config.downsample_factor)
    return decoder, processor
