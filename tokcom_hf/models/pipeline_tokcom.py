"""`pipeline("tokcom-generation")`: text from prompts, or from nothing."""

from typing import Any

import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

TASK = "tokcom-generation"
FORWARD_ARGUMENTS = (
    "num_chunks", "num_generate_chunks", "num_steps", "temperature", "sampler", "time_grid", "block_size",
    "guidance_scale", "final_clean_pass", "posterior_temperature", "token_lag", "generator", "num_return_sequences",
    "max_new_tokens", "max_length", "do_sample", "eos_token_id", "pad_token_id", "streamer", "generation_config",
)  # fmt: skip


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """What a folder's config.json must say for `pipeline(task, model=folder, trust_remote_code=True)` to find this file."""
    # The "pt" class is looked up in transformers itself, so it cannot be TokComModel.
    return {TASK: {"impl": "pipeline_tokcom.TokComGenerationPipeline", "pt": ["AutoModel"], "type": "text"}}


class TokComGenerationPipeline(Pipeline):
    """Generates text with a `TokComModel`.

    `pipe()` gives one text from nothing, `pipe("prompt")` continues it; both return `[{"generated_text": ...}]`.
    `pipe(["one", "two"])` is one batch and returns such a list per prompt, as "text-generation" does.

    Keyword arguments, at construction or call: `seed` (reproducible output), `num_return_sequences`, `return_full_text`
    (False leaves the prompt out), `batch_size` (prompts per batch; all at once by default), and those of
    `TokComModel.generate`: `num_chunks` (without a prompt), `num_generate_chunks` (after one), `num_steps`, `temperature`,
    `sampler`, `time_grid`, `block_size`, `guidance_scale`, `final_clean_pass`, `posterior_temperature`, `token_lag`,
    `generator`.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = False

    def __init__(self, *args, seed: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed
        expected = self.model.config.vae.omni_token_id
        if self.tokenizer is None:
            raise ValueError("TokComGenerationPipeline needs the tokenizer saved beside the model; pass tokenizer=...")
        if len(self.tokenizer) != expected:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens but the model was trained with {expected}; use the "
                "tokenizer saved beside the model."
            )

    def _sanitize_parameters(self, return_full_text: bool | None = None, **kwargs):
        unknown = sorted(set(kwargs) - set(FORWARD_ARGUMENTS))
        if unknown:
            raise TypeError(
                f"Unknown argument {unknown[0]!r}; this pipeline takes seed, {', '.join(FORWARD_ARGUMENTS)}."
            )
        forward = {name: value for name, value in kwargs.items() if value is not None}
        return {}, forward, {} if return_full_text is None else {"return_full_text": return_full_text}

    def __call__(
        self, inputs: Any = None, *, batch_size: int | None = None, seed: int | None = None, **kwargs
    ) -> list:
        """Returns `[{"generated_text": str}]` for one prompt or none, a list of such lists for a list of prompts.

        Raises:
            TypeError: prompts that are no strings, or an unknown keyword.
            ValueError: an empty prompt, or an argument that `TokComModel.generate` refuses.
        """
        prompts = [inputs] if inputs is None or isinstance(inputs, str) else list(inputs)
        if inputs is not None and not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("Prompts must be strings; call the pipeline without arguments to generate from nothing.")
        if not prompts:
            return []
        if "generator" not in kwargs:
            # One generator for the whole call: a batch seeded like the one before would repeat its noise.
            seed = self.seed if seed is None else seed
            # Without a seed it follows the global one, so that set_seed still decides.
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        size = batch_size or self._batch_size or len(prompts)
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        results = [result for batch in super().__call__(batches, batch_size=1, **kwargs) for result in batch]
        return results[0] if inputs is None or isinstance(inputs, str) else results

    def preprocess(self, inputs: list[str] | list[None], **kwargs) -> dict[str, Any]:
        """Prompts → `prompt_ids` and `prompt_mask` (batch, longest), padded on the right; `[None]` → nothing."""
        if inputs == [None]:
            return {}
        rows = self.tokenizer(inputs, add_special_tokens=False).input_ids
        if not all(rows):
            raise ValueError(
                f"Prompt {inputs[[bool(row) for row in rows].index(False)]!r} makes no token; give some text."
            )
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"prompt_ids": ids, "prompt_mask": mask}

    def _forward(self, model_inputs: dict[str, Any], num_return_sequences: int = 1, **options) -> dict[str, Any]:
        # Arguments set once for the pipeline may serve calls with and without a prompt.
        options.pop("num_generate_chunks" if not model_inputs else "num_chunks", None)
        ids = self.model.generate(**model_inputs, num_return_sequences=num_return_sequences, **options)
        lengths = [0] if not model_inputs else model_inputs["prompt_mask"].sum(dim=1).tolist()
        copied = [length for length in lengths for _ in range(num_return_sequences)]
        return {"ids": ids, "lengths": copied, "copies": num_return_sequences}

    def postprocess(self, model_outputs: dict[str, Any], return_full_text: bool = True) -> list[list[dict[str, str]]]:
        """ids → one list of `num_return_sequences` dictionaries per prompt."""
        texts = []
        for ids, length in zip(model_outputs["ids"].tolist(), model_outputs["lengths"]):
            prompt = "" if return_full_text else self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            # Decoding the continuation alone would lose the space before its first word in some tokenizers.
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            texts.append({"generated_text": text.removeprefix(prompt)})
        copies = model_outputs["copies"]
        return [texts[start : start + copies] for start in range(0, len(texts), copies)]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves model, tokenizer and this file, so that the folder works where tokcom_hf is not installed."""
        super().save_pretrained(save_directory, **kwargs)
        custom_object_save(self, save_directory)
        self.model.config.custom_pipelines = custom_pipelines()
        self.model.config.save_pretrained(save_directory)
