"""PromptPipeline: what pipelines with text and images share: forms of input, options of `generate`, private sampling."""

from typing import Any

import torch

from .pipeline_base import TOKENIZER_LOCK, BatchedPipeline, check_texts, generator_of, refuse_unknown
from .pipeline_prompts import Prompt, as_prompt, is_prompt, pair
from .shared_image_files import load_image
from .shared_private_sampling import generation_names, private_options, sampling_options

PREPROCESS = ("allow_urls", "timeout")


class PromptPipeline(BatchedPipeline):
    """Text and images in, ids out, through the model's `generate`.

    Subclasses set `defaults` (options of `generate`), `own_names` (further keywords of `_forward`) and `postprocess_names`,
    and define `preprocess`, `generate_ids` and `postprocess`.
    """

    defaults: dict[str, Any] = {}
    own_names: tuple[str, ...] = ()
    postprocess_names: tuple[str, ...] = ("return_full_text",)

    def __init__(self, *args, seed: int | None = None, **kwargs):
        self.seed = seed
        super().__init__(*args, **kwargs)

    def generate_ids(self, encoded: dict, options: dict, own: dict) -> tuple[torch.Tensor, Any]:
        """Ids `(rows, prompt + new)` of one batch, and anything that `postprocess` needs beside them."""
        raise NotImplementedError

    # ------------------------------------------------------------------ keywords
    def _sanitize_parameters(self, generate_kwargs: dict | None = None, **kwargs):
        if generate_kwargs is not None:
            twice = sorted(set(generate_kwargs) & set(kwargs))
            if twice:
                raise ValueError(f"{twice[0]!r} is given twice, as a keyword and in generate_kwargs.")
            kwargs |= generate_kwargs
        forward = generation_names() | set(self.own_names)
        known = forward | {*PREPROCESS, *self.postprocess_names, "generate_kwargs"}
        refuse_unknown(kwargs, known | {"seed", "generator", "batch_size", "num_workers", "images", "text"})
        return (
            {name: kwargs[name] for name in PREPROCESS if name in kwargs},
            {name: value for name, value in kwargs.items() if name in forward | {"generator"} and value is not None},
            {name: kwargs[name] for name in self.postprocess_names if kwargs.get(name) is not None},
        )

    # ------------------------------------------------------------------ inputs
    def _is_single(self, inputs: Any) -> bool:
        return is_prompt(inputs)

    def _dataset_row(self, row: dict) -> Any:
        if "messages" in row:
            return row["messages"]
        if "text" not in row:
            raise ValueError(f"The data set has neither column 'text' nor 'messages', only {sorted(row)}.")
        return {name: row[name] for name in ("text", "image", "images") if row.get(name) is not None}

    def __call__(  # type: ignore[override]  # no *args: transformers ignores them
        self, inputs: Any = None, *, images: Any = None, text: Any = None, seed: int | None = None, **kwargs
    ):
        """One result for one request, a list for several, an iterator for a generator or a data set.

        Args:
            inputs: a text with one `<image>` per image, `{"image": ..., "text": ...}` (or `"images"` with a list), a chat
                (a list of messages `{"role": ..., "content": text or parts}`), or several of them. With `text=` it holds the
                images, as in transformers' "image-text-to-text".
            images, text: one text with an image or a list of images, or lists of equal length; `text` may be a chat, whose
                image parts without an image take `images` in order.
            seed: seed of the sampling; each call has a generator of its own.

        Raises:
            TypeError: a keyword is unknown, or an input is none of these.
            ValueError: images do not fit the text, or an image is a URL and `allow_urls` is False.
        """
        if inputs is not None and images is not None:
            inputs, text = None, inputs if text is None else text
        elif inputs is not None and text is not None:
            inputs, images = None, inputs
        if inputs is None:
            if text is None and images is None:
                raise TypeError("Nothing to answer: pass a text, images with text, or a chat.")
            inputs = images if text is None else pair(text, images)
        generator = kwargs.get("generator", self._forward_params.get("generator"))
        if generator is not None or self._samples(kwargs):
            seed = self.seed if seed is None and generator is None else seed
            kwargs["generator"] = generator_of(seed, generator)
        return super().__call__(inputs, **kwargs)

    def _samples(self, kwargs: dict) -> bool:
        options = self._forward_params | kwargs | (kwargs.get("generate_kwargs") or {})
        return bool(sampling_options(self.model, self._with_defaults(options))["do_sample"])

    def _with_defaults(self, options: dict) -> dict:
        """Options of `generate` with the pipeline's defaults, unless the call or its generation config sets them."""
        config = options.get("generation_config")
        limited = "max_length" in options or getattr(config, "max_length", None) is not None
        return {
            name: value
            for name, value in self.defaults.items()
            if getattr(config, name, None) is None and not (limited and name == "max_new_tokens")
        } | options

    def prompts(self, inputs: list, allow_urls: bool = True, timeout: float | None = None) -> list[Prompt]:
        """Inputs of any form → prompts with opened images."""
        prompts = [as_prompt(row) for row in inputs]
        return [
            Prompt(prompt.text, [load_image(image, timeout, allow_urls) for image in prompt.images], prompt.messages)
            for prompt in prompts
        ]

    def encode(self, texts: list[str], images: list[list], special: bool) -> dict[str, Any]:
        """Texts and their images → one batch of the processor's tensors, padded on the left."""
        options: dict[str, Any] = {} if special else {"add_special_tokens": False}
        if len(texts) > 1:
            options |= {"padding": True, "padding_side": "left"}
        if any(images):
            options["images"] = images if len(images) > 1 else images[0]
        with TOKENIZER_LOCK:
            return dict(self.processor(text=texts, return_tensors="pt", **options))

    # ------------------------------------------------------------------ running
    def _forward(  # type: ignore[override]  # named options
        self, model_inputs: dict, generator: torch.Generator | None = None, **options
    ) -> dict[str, Any]:
        options = self._with_defaults(options)
        config = options.get("generation_config")
        copies = options.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
        samples = bool(sampling_options(self.model, options)["do_sample"])
        own = {name: options.pop(name) for name in self.own_names if name in options}
        rows: list = [None] * len(model_inputs["prompts"])
        for group in model_inputs["groups"]:
            encoded = group["encoded"]
            if samples and copies > 1:
                # `generate` repeats rows only if it samples, but private sampling makes it greedy over noisy logits.
                encoded = self.repeated(group, copies)
            call = dict(options)
            if samples:
                call["num_return_sequences"] = 1
                call = private_options(self.model, call, generator)
            encoded = self._on_device(encoded)
            ids, extra = self.generate_ids(encoded, call, own)
            new = ids[:, encoded["input_ids"].shape[1] :]
            per_row = len(new) // len(group["rows"])
            for position, row in enumerate(group["rows"]):
                rows[row] = (new[position * per_row : (position + 1) * per_row].cpu(), extra)
        return {"rows": rows, "prompts": model_inputs["prompts"]}

    def repeated(self, group: dict, copies: int) -> dict[str, Any]:
        """The tensors of a group, each row `copies` times."""
        texts = [text for text in group["texts"] for _ in range(copies)]
        images = [given for given in group["images"] for _ in range(copies)]
        return self.encode(texts, images, group["special"])

    def _on_device(self, encoded: dict) -> dict[str, Any]:
        tensors = self._ensure_tensor_on_device(encoded, self.device)
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in tensors.items()
        }

    def grouped(self, prompts: list[Prompt], texts: list[tuple[str, bool]]) -> dict[str, Any]:
        """Prompts in groups that can share a batch: in a group, all or none have images, and all or none special tokens.

        Args:
            texts: text and special-token flag of each prompt, as `render` returns them.
        """
        check_texts([text for text, _ in texts])
        groups: dict[tuple[bool, bool], list[int]] = {}
        for row, (prompt, (_, special)) in enumerate(zip(prompts, texts, strict=True)):
            groups.setdefault((bool(prompt.images), special), []).append(row)
        found = []
        for (_, special), rows in groups.items():
            group = {
                "rows": rows, "texts": [texts[row][0] for row in rows],
                "images": [prompts[row].images for row in rows], "special": special,
            }  # fmt: skip
            found.append(group | {"encoded": self.encode(group["texts"], group["images"], special)})
        return {"prompts": prompts, "groups": found}
