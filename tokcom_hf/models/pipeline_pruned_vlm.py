"""`pipeline("pruned-image-text-to-text")`: a question about an image, answered with fewer vision tokens."""

from typing import Any

from transformers import AutoProcessor, Pipeline
from transformers.image_utils import load_image


class PrunedImageTextToTextPipeline(Pipeline):
    """Answers `{"image": path, URL or PIL image, "text": prompt with <image>}`.

    Returns `{"generated_text": answer, "token_report": tokens per layer, FLOPs and KV memory}`. Text without an image
    passes through. Options: `max_new_tokens` and everything else `generate` takes, `pruning_mode`.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, processor=None, **kwargs):
        super().__init__(*args, **kwargs)
        if processor is None:
            try:
                processor = AutoProcessor.from_pretrained(self.model.config.name_or_path)
            except (OSError, ValueError):
                processor = AutoProcessor.from_pretrained(self.model.config.base_model_name_or_path)
        self.processor = processor

    def _sanitize_parameters(self, pruning_mode: str | None = None, **generation):
        forward: dict[str, Any] = {"generation": generation}
        if pruning_mode is not None:
            forward["pruning_mode"] = pruning_mode
        return {}, forward, {}

    def preprocess(self, inputs, **kwargs):
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if not isinstance(inputs, dict) or "text" not in inputs:
            raise ValueError(f'Expected {{"image": ..., "text": ...}}, got {inputs!r}.')
        images = inputs.get("image", inputs.get("images"))
        images = images if isinstance(images, list) else [] if images is None else [images]
        token = getattr(self.processor, "image_token", "<image>")
        text = inputs["text"].replace("<image>", token)
        if images and text.count(token) != len(images):
            raise ValueError(
                f"{len(images)} image(s) but {text.count(token)} '<image>' in the text; put one '<image>' per image."
            )
        return self.processor(text=[text], images=[load_image(image) for image in images] or None, return_tensors="pt")

    def _forward(self, inputs, generation=None, pruning_mode=None):
        before = self.model.pruning_mode
        self.model.pruning_mode = pruning_mode or before
        try:
            options = {"do_sample": False, "max_new_tokens": 64} | (generation or {})
            ids = self.model.generate(**inputs, **options)
            report = self.model.token_report()
        finally:
            self.model.pruning_mode = before
        return {"ids": ids[:, inputs["input_ids"].shape[1] :], "report": report}

    def postprocess(self, outputs):
        texts = self.processor.batch_decode(outputs["ids"], skip_special_tokens=True)
        results = [{"generated_text": text.strip(), "token_report": outputs["report"]} for text in texts]
        return results[0] if len(results) == 1 else results
