"""`pipeline("pruned-image-text-to-text")`: answers questions about images with fewer vision tokens."""

from typing import Any

import torch
from transformers import AutoProcessor

from .pipeline_prompts import answered, render
from .pipeline_vlm_base import PromptPipeline
from .shared_private_sampling import one_config


class PrunedImageTextToTextPipeline(PromptPipeline):
    """Answers `{"image": path, URL, data URI or PIL image, "text": prompt with <image>}`, a chat, or a text without image.

    Returns `{"generated_text": answer, "token_report": tokens per layer, FLOPs and KV memory}`, or a list of such results
    for several requests or `num_return_sequences` above 1. The report is that of the batch in which the request ran.

    Keyword arguments, at construction or call: everything `generate` takes (greedy, 64 new tokens by default; also as
    `generate_kwargs={...}`), `pruning_mode`, `return_full_text` (True: the prompt, or the chat, with the answer), `seed`
    or `generator` (where `do_sample=True`), `batch_size`, `num_workers`, `timeout` and `allow_urls` (False refuses URLs;
    by default they are fetched as transformers does, also from this machine and its network).
    """

    family = "pruned_vlm"
    defaults = {"do_sample": False, "max_new_tokens": 64}
    own_names = ("pruning_mode",)
    _load_processor = None  # type: ignore[assignment]  # loaded where there is one

    def __init__(self, *args, processor=None, **kwargs):
        super().__init__(*args, processor=processor, **kwargs)
        if self.processor is None:
            self.processor = _processor_of(self.model)

    def preprocess(self, inputs: list, **kwargs) -> dict[str, Any]:  # type: ignore[override]  # rows
        prompts = self.prompts(inputs, **kwargs)
        return self.grouped(prompts, [render(prompt, self.processor) for prompt in prompts])

    def generate_ids(self, encoded: dict, options: dict, own: dict) -> tuple[torch.LongTensor, dict]:
        """Ids `(rows, prompt + new)` and the token report of one batch."""
        options = {"pad_token_id": self._pad_token_id(), **options} if len(encoded["input_ids"]) > 1 else options
        options = one_config({**options, "return_dict_in_generate": True})
        output = self.model.generate(**encoded, **own, **options)
        return output.sequences, output.token_report

    def _pad_token_id(self) -> int | None:
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def postprocess(self, outputs, return_full_text: bool = False) -> list:  # type: ignore[override]  # one keyword
        results = []
        for (ids, report), prompt in zip(outputs["rows"], outputs["prompts"], strict=True):
            texts = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
            given = [
                {"generated_text": answered(prompt, text) if return_full_text else text, "token_report": report}
                for text in texts
            ]
            results.append(given[0] if len(given) == 1 else given)
        return results

    def save_pretrained(self, save_directory, include_base: bool = True, **kwargs) -> None:
        """Saves the pipeline, for `pipeline(model=folder, trust_remote_code=True)`.

        Args:
            save_directory: folder.
            include_base: save the base model, too, so that the folder needs no other.
            kwargs: passed to the model's `save_pretrained`.
        """
        super().save_pretrained(save_directory, include_base=include_base, **kwargs)


def _processor_of(model):
    """The processor saved beside the model, or else that of the base model."""
    for name in (model.config.name_or_path, model.config.base_model_name_or_path):
        if name:
            try:
                # Trust in the model's repository does not extend to code of the base model's repository.
                return AutoProcessor.from_pretrained(name, trust_remote_code=False)
            except (OSError, ValueError) as error:
                reason = error
    raise ValueError("This pipeline needs the base model's processor; pass processor=...") from reason
