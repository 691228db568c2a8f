"""`pipeline("tokcom-generation")`: generates text from prompts, or from nothing."""

from typing import Any

import torch

from .pipeline_base import TOKENIZER_LOCK, BatchedPipeline, check_texts, generator_of, refuse_unknown
from .shared_tokenizer_size import tokenizer_size

FORWARD_ARGUMENTS = (
    "num_chunks", "num_generate_chunks", "num_steps", "temperature", "sampler", "block_size", "guidance_scale", "best_of",
    "generator", "num_return_sequences", "max_new_tokens", "max_length", "do_sample", "eos_token_id", "pad_token_id",
    "streamer", "generation_config",
)  # fmt: skip


class TokComGenerationPipeline(BatchedPipeline):
    """Generates text with a `TokComModel`.

    `pipe()` generates one text from nothing, and `pipe("prompt")` continues the prompt; both return
    `[{"generated_text": ...}]`. `pipe(["one", "two"])` runs as one batch and returns such a list per prompt, as
    "text-generation" does. Generators and data sets (of texts, or with a column `text`) give an iterator.

    Keyword arguments, at construction or call: `seed` (makes the output reproducible), `return_full_text` (False leaves the
    prompt out), `batch_size` (prompts per batch; by default all at once), and those of `TokComModel.generate`.
    """

    family = "tokcom"
    default_batch_size = None
    _load_tokenizer = True

    def __init__(self, *args, seed: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed
        expected = self.model.config.vae.omni_token_id
        if self.tokenizer is None:
            raise ValueError("TokComGenerationPipeline needs the tokenizer saved beside the model; pass tokenizer=...")
        size = tokenizer_size(self.tokenizer)
        if size != expected:
            raise ValueError(
                f"The tokenizer has {size} tokens but the model was trained with {expected}; use the "
                "tokenizer saved beside the model."
            )

    def _sanitize_parameters(self, return_full_text: bool | None = None, **kwargs):
        refuse_unknown(kwargs, ("seed", "batch_size", "num_workers", "return_full_text", *FORWARD_ARGUMENTS))
        forward = {name: value for name, value in kwargs.items() if value is not None}
        return {}, forward, {} if return_full_text is None else {"return_full_text": return_full_text}

    def _is_single(self, inputs: Any) -> bool:
        return inputs is None or isinstance(inputs, str)

    def _dataset_row(self, row: dict) -> str:
        if "text" not in row:
            raise ValueError(f"The data set has no column 'text', only {sorted(row)}; use KeyDataset(data, column).")
        return row["text"]

    def __call__(  # type: ignore[override]  # no *args: transformers ignores them
        self, inputs: Any = None, *, seed: int | None = None, **kwargs
    ):
        """Returns `[{"generated_text": str}]` for one prompt or none, a list of such lists for a list of prompts.

        Raises:
            TypeError: a prompt is no string, or a keyword is unknown.
            ValueError: a prompt is empty, or `TokComModel.generate` refuses an argument.
        """
        generator = kwargs.get("generator", self._forward_params.get("generator"))
        # One generator for the whole call, because batches with the same seed would have the same noise.
        kwargs["generator"] = generator_of(self.seed if seed is None and generator is None else seed, generator)
        return super().__call__(inputs, **kwargs)

    def preprocess(  # type: ignore[override]  # a batch
        self, inputs: list[str] | list[None], **kwargs
    ) -> dict[str, Any]:
        """Prompts → `input_ids` and `attention_mask` (batch, longest), padded on the left; `[None]` → nothing."""
        if inputs == [None]:
            return {}
        if not all(isinstance(prompt, str) for prompt in inputs):
            raise TypeError("Prompts must be strings; call the pipeline without arguments to generate from nothing.")
        check_texts(inputs)
        with TOKENIZER_LOCK:
            rows = self.tokenizer(inputs, add_special_tokens=False).input_ids
        if not all(rows):
            raise ValueError(
                f"Prompt {inputs[[bool(row) for row in rows].index(False)]!r} makes no token; give some text."
            )
        longest = max(len(row) for row in rows)
        return {
            "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    def _forward(  # type: ignore[override]  # named options
        self, model_inputs: dict[str, Any], num_return_sequences: int | None = None, **options
    ) -> dict[str, Any]:
        if num_return_sequences is None:
            num_return_sequences = getattr(options.get("generation_config"), "num_return_sequences", None) or 1
        # A length given at construction may be for the other kind of call, with or without prompts; it does not act here.
        options.pop("num_generate_chunks" if not model_inputs else "num_chunks", None)
        ids = self.model.generate(**model_inputs, num_return_sequences=num_return_sequences, **options)
        padding, width = [0] * len(ids), 0
        if model_inputs:
            mask = model_inputs["attention_mask"].repeat_interleave(num_return_sequences, 0)
            padding, width = (mask == 0).sum(dim=1).tolist(), mask.shape[1]
        return {"ids": ids, "padding": padding, "width": width, "copies": num_return_sequences}

    def postprocess(  # type: ignore[override]  # a batch
        self, model_outputs: dict[str, Any], return_full_text: bool = True
    ) -> list[list[dict[str, str]]]:
        """Ids → one list of `num_return_sequences` dictionaries per prompt."""
        texts, width = [], model_outputs["width"]
        for ids, padding in zip(model_outputs["ids"].tolist(), model_outputs["padding"]):
            prompt = "" if return_full_text else self.tokenizer.decode(ids[padding:width], skip_special_tokens=True)
            # Decoded with the prompt, because some tokenizers drop the space before a first word.
            text = self.tokenizer.decode(ids[padding:], skip_special_tokens=True)
            texts.append({"generated_text": text.removeprefix(prompt)})
        copies = model_outputs["copies"]
        return [texts[start : start + copies] for start in range(0, len(texts), copies)]
