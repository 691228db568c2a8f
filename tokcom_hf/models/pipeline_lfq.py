"""`pipeline("lfq-image-text")`: generates text, images or both with an `LFQExpandedModel`."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModel, BatchFeature, PreTrainedConfig
from transformers.utils import cached_file

from .image_processing_vqgan import VQGANImageProcessor
from .modeling_vqgan import VQGAN
from .pipeline_base import TOKENIZER_LOCK
from .pipeline_prompts import answered, render
from .pipeline_vlm_base import PromptPipeline
from .processing_lfq import LFQProcessor
from .shared_private_sampling import one_config

DECODER_FOLDER = "image_decoder"


class LFQImageTextPipeline(PromptPipeline):
    """Draws captions, or continues prompts with text and images.

    pipe = pipeline("lfq-image-text", model=folder)
    pipe("a red circle", guidance_scale=3.0)[0]["images"][0].save("circle.png")

    Returns `[{"generated_text", "token_ids", "images"}]` for one request, a list of such lists for several.

    Keyword arguments, at construction or call: `mode` (`image` by default; `text`, `mixed`), `num_image_tokens` (the image
    decoder's number by default), `guidance_scale` (above 1: classifier-free guidance against a prompt without caption),
    `num_return_sequences`, `seed` or `generator`, `return_full_text` (True: with the prompt), everything `generate` takes
    (it samples by default; also as `generate_kwargs={...}`), `batch_size` (a whole list by default), `num_workers`, and for
    a base model that takes images `timeout` and `allow_urls` (False refuses URLs; by default they are fetched as
    transformers does, also from this machine and its network).

    Args:
        image_decoder: a model with `decode_codes` (a VQGAN with `quantizer="lfq"`), or its folder or Hub name. None: the
            folder `image_decoder` of the model's repository; if it has none, images are returned as ids.
        decoder_revision: branch, tag or commit of an `image_decoder` that is given by its Hub name.
        decoder_trust_remote_code: run code of the `image_decoder`'s repository, to which trust in the model's repository
            does not extend. A VQGAN needs no such code.
    """

    family = "lfq"
    default_batch_size = None
    defaults = {"do_sample": True}
    own_names = ("mode", "num_image_tokens")
    # An LFQProcessor; transformers annotates both as None.
    processor: Any
    _load_processor = True  # type: ignore[assignment]  # annotated as None

    def __init__(
        self,
        *args,
        image_decoder=None,
        decoder_revision: str | None = None,
        decoder_trust_remote_code: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if not isinstance(self.processor, LFQProcessor) and type(self.processor).__name__ != "LFQProcessor":
            raise ValueError("This pipeline needs the LFQProcessor saved beside the model; pass processor=...")
        decoder = _own_decoder(self.model) if image_decoder is None else image_decoder
        self.image_decoder, self.image_processor = None, None
        if decoder is not None:
            options = {"revision": decoder_revision, "trust_remote_code": decoder_trust_remote_code}
            self.image_decoder, self.image_processor = _load_decoder(decoder, options)
            self.image_decoder.to(self.device).eval()
            codes, ours = self.image_decoder.config.codebook_size, 2**self.model.config.output_dim
            if codes != ours:
                raise ValueError(f"The image decoder has {codes:,} codes, but the model has {ours:,} LFQ ids.")

    def _sanitize_parameters(self, generate_kwargs: dict | None = None, mode: str | None = None, **kwargs):
        before, forward, after = super()._sanitize_parameters(generate_kwargs, **kwargs)
        if mode is not None:
            before, forward = before | {"mode": mode}, forward | {"mode": mode}
        return before, forward, after

    def preprocess(self, inputs: list, mode: str = "image", **kwargs) -> dict[str, Any]:  # type: ignore[override]  # rows
        """Requests → left-padded ids; in `image` mode a text is put into the processor's `image_prompt`."""
        prompts = self.prompts(inputs, **kwargs)
        texts = [render(prompt, self._prompt_processor()) for prompt in prompts]
        if mode == "image":
            texts = [
                (self._image_prompt(text) if prompt.messages is None else text, special)
                for prompt, (text, special) in zip(prompts, texts, strict=True)
            ]
        return self.grouped(prompts, texts)

    def _prompt_processor(self):
        """The processor with the image token and the chat template."""
        return self.processor if self.processor.base is None else self.processor.base

    def _image_prompt(self, caption: str) -> str:
        # `str.format` would fail on other braces in prompt or caption.
        return self.processor.image_prompt.replace("{caption}", caption)

    def encode(self, texts: list[str], images: list[list], special: bool) -> dict[str, Any]:
        flat = [image for given in images for image in given]
        with TOKENIZER_LOCK:
            batch = self.processor(text=texts, images=flat or None, add_special_tokens=special)
        return _left_padded(dict(batch), self.processor.tokenizer.pad_token_id)

    def generate_ids(self, encoded: dict, options: dict, own: dict) -> tuple[torch.LongTensor, dict]:
        """Ids `(rows, prompt + new)` of one batch, and the number of tokens per image."""
        mode, count = own.get("mode", "image"), own.get("num_image_tokens")
        count = self._num_image_tokens() if count is None else count
        rows = len(encoded["input_ids"])
        config = options.get("generation_config")
        guidance = options.get("guidance_scale") or getattr(config, "guidance_scale", None)
        if guidance not in (None, 1.0) and "negative_prompt_ids" not in options:
            empty = self.encode([self._image_prompt("")], [[]], special=True)["input_ids"]
            options["negative_prompt_ids"] = empty.to(self.device).expand(rows, -1)
        unlimited = all(
            options.get(name) is None and getattr(given, name, None) is None
            for name in ("max_new_tokens", "max_length")
            for given in (config, self.model.generation_config)
        )
        if mode != "image" and unlimited:
            options["max_new_tokens"] = 64 + count * (mode == "mixed")
        if getattr(config, "pad_token_id", None) is None:
            options = {"pad_token_id": self.processor.tokenizer.pad_token_id} | options
        ids = self.model.generate(**encoded, mode=mode, num_image_tokens=count, **one_config(options))
        return ids, {"num_image_tokens": count}

    def postprocess(self, model_outputs, return_full_text: bool = False) -> list:  # type: ignore[override]  # one keyword
        results = []
        for (rows, extra), prompt in zip(model_outputs["rows"], model_outputs["prompts"], strict=True):
            given = []
            for ids in rows:
                images = self.processor.split_images(ids, extra["num_image_tokens"])
                skip = self.image_decoder is not None
                text = self.processor.decode(ids, skip_lfq_tokens=skip, skip_special_tokens=True)
                text = answered(prompt, text) if return_full_text else text
                pictures = [self._draw(image) for image in images]
                given.append({"generated_text": text, "token_ids": ids.tolist(), "images": pictures})
            results.append(given)
        return results

    def _num_image_tokens(self) -> int:
        return 256 if self.image_decoder is None else self._side() ** 2

    def _side(self) -> int:
        config = self.image_decoder.config
        return config.image_size // config.downsample_factor

    def _draw(self, ids: torch.LongTensor):
        """LFQ ids of a square image → PIL image; other ids, or ids without an image decoder, are returned as a list."""
        side = math.isqrt(len(ids))
        if self.image_decoder is None or side * side != len(ids):
            return ids.tolist()
        codes = (ids - self.model.config.lfq_start_token_id).view(1, side, side).to(self.device)
        with torch.no_grad():
            return self.image_processor.postprocess(self.image_decoder.decode_codes(codes))[0]

    def save_pretrained(self, save_directory, include_base: bool | None = None, **kwargs) -> None:
        """Saves the pipeline, for `pipeline(model=folder, trust_remote_code=True)`.

        Args:
            save_directory: folder.
            include_base: save the base model's weights, too. None: save them if the base model's code is part of
                transformers; otherwise the folder refers to the base model.
            kwargs: passed to the model's `save_pretrained`.
        """
        if include_base is None:
            known = self.model.config.base_config["model_type"] in CONFIG_MAPPING
            include_base = True if known else None
        super().save_pretrained(save_directory, include_base=include_base, **kwargs)
        if self.image_decoder is not None:
            folder = Path(save_directory) / DECODER_FOLDER
            self.image_decoder.save_pretrained(folder)
            self.image_processor.save_pretrained(folder)


def _left_padded(batch: dict[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """Lists with one value per token → tensors `(rows, longest)`, padded on the left; other values → tensors."""
    lengths = [len(ids) for ids in batch["input_ids"]]
    if pad_token_id is None and len(set(lengths)) > 1:
        raise ValueError("The tokenizer has no pad token; set processor.tokenizer.pad_token, or batch_size=1.")
    tensors = {}
    for name, rows in batch.items():
        if isinstance(rows, list) and all(isinstance(row, list) for row in rows) and [len(r) for r in rows] == lengths:
            fill = pad_token_id if name == "input_ids" else 0
            tensors[name] = torch.tensor([[fill] * (max(lengths) - len(row)) + row for row in rows])
        else:
            tensors[name] = rows
    # BatchFeature joins every form of image tensors that processors return.
    return dict(BatchFeature(tensors, tensor_type="pt"))


def _own_decoder(model) -> tuple[VQGAN, VQGANImageProcessor] | None:
    """The VQGAN in the folder `image_decoder` of the repository that the model was loaded from, or None.

    This file's own VQGAN class builds it; code that lies beside the decoder's weights is never run.
    """
    name = model.config.name_or_path
    if not name:
        # The model was built in memory; its empty name would mean the working directory.
        return None
    if os.path.isdir(name):
        if not (Path(name) / DECODER_FOLDER / "config.json").is_file():
            return None
        options = {}
    else:
        # The decoder comes from the same commit as the model.
        options = {"revision": getattr(model.config, "_commit_hash", None)}
        config = f"{DECODER_FOLDER}/config.json"
        if cached_file(name, config, _raise_exceptions_for_missing_entries=False, **options) is None:
            return None
    processor = VQGANImageProcessor.from_pretrained(name, subfolder=DECODER_FOLDER, **options)
    return VQGAN.from_pretrained(name, subfolder=DECODER_FOLDER, **options), processor


def _load_decoder(decoder, options: dict):
    """A loaded image decoder, a pair of decoder and processor, or a name → decoder and image processor."""
    if isinstance(decoder, tuple):
        return decoder
    if isinstance(decoder, str | os.PathLike):
        name, revision = os.fspath(decoder), {"revision": options["revision"]}
        values, _ = PreTrainedConfig.get_config_dict(name, **revision)
        if values.get("model_type") == VQGAN.config_class.model_type:
            return VQGAN.from_pretrained(name, **revision), VQGANImageProcessor.from_pretrained(name, **revision)
        return AutoModel.from_pretrained(name, **options), AutoImageProcessor.from_pretrained(name, **options)
    config = decoder.config
    processor = VQGANImageProcessor(config.image_size, config.in_channels, size_divisor=config.downsample_factor)
    return decoder, processor
