"""FLOPs, tokens per layer and KV memory of a pruned VLM; the formulas are in `models/vlm_flops.py`."""

from ..models.token_report import predicted_report, token_report
from ..models.vlm_flops import decoder_layer_flops, kv_cache_bytes, vision_tower_flops

__all__ = ["decoder_layer_flops", "kv_cache_bytes", "predicted_report", "token_report", "vision_tower_flops"]
