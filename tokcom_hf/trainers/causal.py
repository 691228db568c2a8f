"""The trainer of the autoregressive baseline: next-token loss in nats per token."""

import torch

from .base import CompressionTrainer


class CausalTrainer(CompressionTrainer):
    """Next-token loss in nats per token on rows of `input_ids` and `attention_mask`; padding does not count."""

    data_columns = ("input_ids", "attention_mask")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over tokens, so Trainer must divide it by the accumulation steps; for a Llama it would not.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model(**inputs, labels=labels, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return loss.detach(), outputs.logits.detach(), labels
