"""`pipeline("vq-reconstruction")` and `pipeline("vq-tokenize")`."""

import torch
from transformers import Pipeline


class _VQPipeline(Pipeline):
    _load_tokenizer = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_processor = False
    _load_video_processor = False

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}

    def preprocess(self, inputs, **kwargs):
        return self.image_processor(inputs, return_tensors="pt")


class VQReconstructionPipeline(_VQPipeline):
    """Images (PIL, path, array, or a list) → `{"image": PIL image, "codes": (h, w) list}` each."""

    def _forward(self, model_inputs):
        codes = self.model.encode(model_inputs["pixel_values"])
        return {"codes": codes, "pixels": self.model.decode_codes(codes)}

    def postprocess(self, model_outputs, **kwargs):
        image = self.image_processor.postprocess(model_outputs["pixels"])[0]
        return {"image": image, "codes": model_outputs["codes"][0].tolist()}


class VQTokenizePipeline(_VQPipeline):
    """Images → `{"codes": (h, w) list, "length": h·w}`; codes `(h, w)` (tensor) → `{"image": PIL image}`."""

    def preprocess(self, inputs, **kwargs):
        if isinstance(inputs, torch.Tensor) and not inputs.is_floating_point() and inputs.ndim == 2:
            return {"codes": inputs[None]}
        return super().preprocess(inputs)

    def _forward(self, model_inputs):
        if "codes" in model_inputs:
            return {"pixels": self.model.decode_codes(model_inputs["codes"])}
        return {"codes": self.model.encode(model_inputs["pixel_values"])}

    def postprocess(self, model_outputs, **kwargs):
        if "pixels" in model_outputs:
            return {"image": self.image_processor.postprocess(model_outputs["pixels"])[0]}
        codes = model_outputs["codes"][0]
        return {"codes": codes.tolist(), "length": codes.numel()}
