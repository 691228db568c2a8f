"""The rows of the Hub matrix: every model of the package, tiny, with random weights of which none is zero.

Everything but `build` and `make_part` works without the package, so that a process with only a saved folder makes the
same inputs and the same outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

TRANSFORMER = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
}  # fmt: skip
TOKENS, VOCABULARY, IMAGE, LFQ_BITS = 16, 128, 3, 5


@dataclass(frozen=True)
class Row:
    """A model and how to use it.

    inputs: keyword arguments of `forward`, float32; `labels` adds what a loss needs, where the model has one.
    more: calls beyond `forward` whose tensors count as outputs (a `TokComModel` uses its VAE only there).
    make_part, parts: its tokenizer or processor, and the Auto class that loads it.
    tasks: pipelines that run it.
    smooth: outputs that no hard decision enters, which rounding could turn; none named: all of them.
    undecided: arguments under which a forward decides nothing.
    """

    name: str
    model: str
    build: Callable[[], Any]
    inputs: Callable[[], dict]
    labels: Callable[[dict], dict] | None = None
    more: Callable[[Any], dict] | None = None
    generate: Callable[[Any], Any] | None = None
    make_part: Callable[[Any], Any] | None = None
    parts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    auto_class: str = "AutoModel"
    modules_to_save: tuple[str, ...] = ()
    composite: bool = False
    smooth: tuple[str, ...] = ()
    undecided: dict[str, Any] = field(default_factory=dict)


def slug(name: str) -> str:
    """A row's name as a name of a folder or repository."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


# ------------------------------------------------------------------ tensors
def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(rows: int, length: int, low: int = 8, high: int = 90, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model, seed: int = 0):
    """Draws every weight anew, biases, norms and zero-initialised layers included: a lost one shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(drawn * (0.2 if min(parameter.shape) > 1 else 0.5))
        else:
            parameter.add_(drawn * 0.1)
    return model.float().eval()


def tensors(output) -> dict[str, torch.Tensor]:
    """The tensors of a ModelOutput, tuple or tensor by name; caches are left out."""
    if torch.is_tensor(output):
        return {"output": output}
    found: dict[str, torch.Tensor] = {}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    for name, value in items:
        if torch.is_tensor(value):
            found[str(name)] = value
        elif isinstance(value, list | tuple):
            found |= {f"{name}.{key}": inner for key, inner in tensors(value).items()}
    return found


@torch.no_grad()
def outputs(row: Row, model) -> dict[str, torch.Tensor]:
    """What a model computes, by name."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            # Weights read from a file begin at odd addresses, where a sum may round differently.
            tensor.data = tensor.data.clone()
    torch.manual_seed(0)
    found = {name: value.detach().clone() for name, value in tensors(model(**row.inputs())).items()}
    if row.more is not None:
        found |= {f"more.{name}": value for name, value in row.more(model).items()}
    return found


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference; shapes and names must agree, NaN counts as infinite."""
    assert ours.keys() == theirs.keys(), f"other outputs: {sorted(ours.keys() ^ theirs.keys())}"
    largest = 0.0
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, f"{name}: {tuple(value.shape)} and {tuple(theirs[name].shape)}"
        gap = (value.double() - theirs[name].double()).abs()
        gap = gap[~(value == theirs[name])]  # equal infinities have no difference
        largest = max(largest, float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0)
    return largest


def loss_of(row: Row, model) -> torch.Tensor:
    """The model's own loss, or the mean square of its outputs where it has none: something that reaches every weight."""
    inputs = row.inputs()
    if row.labels is not None:
        return model(**inputs | row.labels(inputs)).loss
    found = tensors(model(**inputs))
    return sum(value.float().square().mean() for value in found.values() if value.requires_grad)


# ------------------------------------------------------------------ base models and their processors
def _text(**changes) -> dict:
    shape = TRANSFORMER | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return shape | changes


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return filled(LlamaForCausalLM(LlamaConfig(**_text())))


def vision_language_model(layers: int = 2):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=16, patch_size=4),
        text_config=LlamaConfig(**_text(num_hidden_layers=layers)),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    return filled(LlavaForConditionalGeneration(config))


def _language_processor():
    from tokcom_hf.small_models.scene_tokenizer import scene_tokenizer

    return scene_tokenizer({"image_token": "<image>"})


def _vision_language_processor():
    from tokcom_hf.small_models.small_vlm import scene_processor

    return scene_processor(16, 4)


def vision_inputs(**changes) -> dict:
    ids = random_ids(2, 24)
    ids[:, 2 : 2 + TOKENS] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random(2, 3, 16, 16)} | changes


# ------------------------------------------------------------------ models
def _vae_config() -> dict:
    return TRANSFORMER | {"vocab_size": len(_language_processor()) + 1, "latent_size": 16, "fixed_norm": True}


def build_vae():
    from tokcom_hf import TokComVAE, TokComVAEConfig

    return filled(TokComVAE(TokComVAEConfig(**_vae_config())))


def build_denoiser():
    from tokcom_hf import DenoisedModel, DenoisedModelConfig

    return filled(DenoisedModel(DenoisedModelConfig(**TRANSFORMER, latent_size=16, self_conditioning=True)))


def build_tokcom_documented():
    from tokcom_hf import TokComConfig, TokComModel

    flow = {"standardize_latents": True, "noise_std": 1.0, "mse_weight": 1.0, "eos_token_id": 1}
    return _with_statistics(TokComModel(TokComConfig(vae=_vae_config(), denoiser=TRANSFORMER, **flow)))


def build_tokcom():
    from tokcom_hf import TokComConfig, TokComModel

    flow = {"standardize_latents": True, "noise_std": 1.0, "mse_weight": 1.0, "eos_token_id": 1}
    context = {"context": TRANSFORMER, "block_size": 1, "block_sizes": [1, 0], "context_dropout": 0.1}
    denoiser = TRANSFORMER | {"self_conditioning": True}
    return _with_statistics(TokComModel(TokComConfig(vae=_vae_config(), denoiser=denoiser, **context, **flow)))


def _with_statistics(model):
    filled(model)
    with torch.no_grad():
        model.latent_mean.copy_(random(16, seed=5))
        model.latent_std.copy_(random(16, seed=6).abs() + 0.5)
    return model


def _tokcom_inputs() -> dict:
    """Two rows of one block of two chunks, the second ends within its last."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return {
        "input_ids": random_ids(2, 8, 8, 60), "attention_mask": mask, "noise": random(2, 1, 2, 16, seed=2),
        "timesteps": torch.tensor([[0.3], [0.8]]), "return_loss": False,
    }  # fmt: skip


def _with_loss(inputs: dict) -> dict:
    return {"return_loss": True}


def _tokcom_generated(model):
    return model.generate(
        random_ids(2, 7, 8, 60), num_generate_chunks=2, num_steps=2, generator=torch.Generator().manual_seed(0)
    )


@torch.no_grad()
def _tokcom_more(model) -> dict:
    ids = random_ids(2, 8, 8, 60)
    latents = model.encode(ids)
    # Those of the tokenizer's ids: the omni token, which is never written, moves behind new ones.
    logits = model.vae.decode_logits(latents)[..., : model.config.vae.omni_token_id]
    found = {
        "encoded": latents, "standardized": model.standardize(latents), "logits": logits,
        "generated": _tokcom_generated(model),
    }  # fmt: skip
    if model.config.context is not None:
        states = model.context(ids)
        blocks = {"noise": random(2, 2, 1, 16, seed=3), "timesteps": torch.tensor([[0.2, 0.7], [0.5, 0.1]])}
        found |= {
            "states": states, "clean_latents": model(ids, block_size=1, return_dict=True, **blocks).clean_latents,
            "head_logits": model.context.head_logits(states)[..., : model.config.vae.omni_token_id],
        }  # fmt: skip
    return found


def build_vqgan():
    from tokcom_hf import VQGAN, VQGANConfig

    torch.manual_seed(0)
    shape = {"image_size": 16, "codebook_size": 16, "codebook_dim": 8, "base_channels": 8, "latent_channels": 12}
    shape |= {"channel_multipliers": [1, 2], "downsample_factor": 4, "patch_size": 2, "num_res_blocks": 1}
    model = filled(VQGAN(VQGANConfig(**shape, codebook_init="data", dead_code_threshold=0.0))).train()
    for seed in range(3):  # fills the codebook and its statistics
        model(random(4, 3, 16, 16, seed=seed))
    return model.eval()


@torch.no_grad()
def _vqgan_more(model) -> dict:
    codes = torch.arange(16).reshape(1, 4, 4)
    # An adapter's model has its names below `base_model.model`.
    named = {name.removeprefix("base_model.model."): value.clone() for name, value in model.named_buffers()}
    return {"decoded": model.decode_codes(codes)} | {f"buffer.{name}": value for name, value in named.items()}


def build_vqgan_discriminator():
    from tokcom_hf import VQGANDiscriminator, VQGANDiscriminatorConfig

    return filled(VQGANDiscriminator(VQGANDiscriminatorConfig(base_channels=8, num_layers=2)))


def build_merger():
    from tokcom_hf import TokenMerger, TokenMergerConfig

    config = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
    return filled(TokenMerger(TokenMergerConfig(**config, gumbel_noise=False)))


def build_pruner():
    from tokcom_hf import LayerPruner, LayerPrunerConfig

    config = {"hidden_size": 32, "layers": [1], "keep_tokens": [5], "internal_size": 16, "gumbel_noise": False}
    return filled(LayerPruner(LayerPrunerConfig(**config)))


def build_pruning_discriminator():
    from tokcom_hf import PruningDiscriminator, PruningDiscriminatorConfig

    model = PruningDiscriminator(PruningDiscriminatorConfig(hidden_size=32, internal_size=16, dropout=0.0))
    model = filled(model).train()
    with torch.no_grad():
        for _ in range(3):  # power iterations of the spectral norm
            model(**_pruning_discriminator_inputs())
    return model.eval()


def _pruning_discriminator_inputs() -> dict:
    states = [random(2, 6, 32, seed=seed) for seed in (1, 2, 3)]
    return {"hidden_states": states, "answer_mask": torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])}


def build_pruned(base=None):
    from tokcom_hf import LayerPrunerConfig, PrunedVLM, TokenMergerConfig

    merger = {"feature_size": 16, "question_size": 32, "target_merge_tokens": 8, "internal_size": 16}
    pruner = {"hidden_size": 32, "layers": [1, 2], "keep_tokens": [5, 2], "internal_size": 16}
    base = vision_language_model(4) if base is None else base
    model = PrunedVLM.from_base(
        base, TokenMergerConfig(**merger, gumbel_noise=False), LayerPrunerConfig(**pruner, gumbel_noise=False)
    )
    for part in (model.token_merger, model.layer_pruner):
        filled(part)
    return model.eval()


def build_lfq():
    from tokcom_hf import LFQConfig, LFQQuantizer

    shape = {"input_size": 24, "llm_hidden_size": 32, "num_tokens": 16, "output_dim": LFQ_BITS, "hidden_size": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return filled(LFQQuantizer(LFQConfig(**shape)))


@torch.no_grad()
def _lfq_more(model) -> dict:
    codes = (random(2, 16, LFQ_BITS, seed=3) > 0).long()
    return {"decoded": model.decode(codes), "codes": model.encode(random(2, 16, 24))}


def build_expanded(base=None):
    from tokcom_hf import LFQExpandedModel

    base = language_model() if base is None else base
    model = LFQExpandedModel.from_base(base, output_dim=LFQ_BITS, tokenizer=_language_processor())
    filled(model.lfq_rows)
    return model.eval()


def build_expanded_vlm(base=None):
    return build_expanded(vision_language_model() if base is None else base)


def _expanded_ids() -> torch.Tensor:
    ids = random_ids(2, 12)
    ids[:, 5:9] = VOCABULARY + random_ids(2, 4, 0, 2**LFQ_BITS)
    return ids


def _expanded_vision_inputs() -> dict:
    inputs = vision_inputs()
    inputs["input_ids"][:, 20:23] = VOCABULARY + random_ids(2, 3, 0, 2**LFQ_BITS)
    return inputs


def _lfq_processor(model):
    from tokcom_hf import LFQProcessor

    sees = hasattr(model.base.config, "vision_config")
    return LFQProcessor.from_model(model, _vision_language_processor() if sees else _language_processor())


def _image_processor(model):
    from tokcom_hf import VQGANImageProcessor

    return VQGANImageProcessor(image_size=16, size_divisor=4)


def _same_ids(inputs: dict) -> dict:
    return {"labels": inputs["input_ids"]}


def _next_ids(inputs: dict) -> dict:
    """The first id is no one's next: where it counts, `Trainer` divides a summed loss by too many."""
    labels = inputs["input_ids"].clone()
    labels[:, 0] = -100
    return {"labels": labels}


def _generated(model, **inputs):
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)


ROWS: tuple[Row, ...] = (
    Row(
        "TokComVAE", "TokComVAE", build_vae, lambda: {"input_ids": random_ids(2, 8, 8, 60)}, _same_ids,
        make_part=lambda model: _language_processor(), parts=("AutoTokenizer",),
        modules_to_save=("latent_proj",),
    ),
    Row(
        "DenoisedModel", "DenoisedModel", build_denoiser,
        lambda: {
            "latents": random(2, 6, 16), "timesteps": torch.tensor([0.3, 0.8]), "self_condition": random(2, 6, 16, seed=2),
        },
        modules_to_save=("output_proj",),
    ),
    Row(
        "TokComModel", "TokComModel", build_tokcom, _tokcom_inputs, _with_loss,
        more=_tokcom_more, generate=_tokcom_generated,
        make_part=lambda model: _language_processor(), parts=("AutoTokenizer",),
        modules_to_save=("output_proj", "heads"), tasks=("tokcom-generation",),
    ),
    Row(
        "TokComModel (documented)", "TokComModel", build_tokcom_documented, _tokcom_inputs, _with_loss,
        more=_tokcom_more, generate=_tokcom_generated,
        make_part=lambda model: _language_processor(), parts=("AutoTokenizer",),
        modules_to_save=("output_proj",), tasks=("tokcom-generation",),
    ),
    Row(
        "VQGAN", "VQGAN", build_vqgan, lambda: {"pixel_values": random(2, 3, 16, 16)},
        # Its loss needs no labels, but the plain Trainer evaluates a loss only where a forward that names them has them.
        lambda inputs: {"labels": inputs["pixel_values"]},
        more=_vqgan_more, make_part=_image_processor, parts=("AutoImageProcessor",),
        modules_to_save=("conv_out",), smooth=("more.decoded",), tasks=("vq-reconstruction", "vq-tokenize"),
    ),
    Row(
        "VQGANDiscriminator", "VQGANDiscriminator", build_vqgan_discriminator,
        lambda: {"pixel_values": random(2, 3, 16, 16)},
    ),
    Row(
        "TokenMerger", "TokenMerger", build_merger,
        lambda: {
            "vision_features": random(2, TOKENS, 16), "question_embeddings": random(2, 5, 32, seed=2),
            "question_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
        modules_to_save=("scorer",), smooth=("scores",),
    ),
    Row(
        "LayerPruner", "LayerPruner", build_pruner,
        lambda: {
            "layer_index": 1, "vision_hidden": random(2, TOKENS, 32), "question_embeddings": random(2, 5, 32, seed=2),
            "question_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
        modules_to_save=("score",), smooth=("keep_logits",),
    ),
    Row("PruningDiscriminator", "PruningDiscriminator", build_pruning_discriminator, _pruning_discriminator_inputs),
    Row(
        "PrunedVLM", "PrunedVLM", build_pruned, vision_inputs, lambda inputs: _next_ids(inputs) | {"pruning_mode": "soft"},
        generate=lambda model: _generated(model, **vision_inputs()),
        make_part=lambda model: _vision_language_processor(), parts=("AutoProcessor",),
        auto_class="AutoModelForImageTextToText", modules_to_save=("token_merger", "layer_pruner"), composite=True,
        smooth=("logits",), undecided={"pruning_mode": "origin"}, tasks=("pruned-image-text-to-text",),
    ),
    Row(
        "LFQQuantizer", "LFQQuantizer", build_lfq,
        lambda: {"features": random(2, 16, 24), "targets": random(2, 16, 32, seed=2)}, lambda inputs: {}, more=_lfq_more,
        modules_to_save=("to_bits",), smooth=("logits", "more.decoded"),
    ),
    Row(
        "LFQExpandedModel (LM)", "LFQExpandedModel", build_expanded, lambda: {"input_ids": _expanded_ids()}, _next_ids,
        generate=lambda model: model.generate(_expanded_ids(), mode="image", num_image_tokens=3, do_sample=False),
        make_part=_lfq_processor, parts=("AutoProcessor",), auto_class="AutoModelForCausalLM",
        modules_to_save=("lfq_rows",), composite=True, tasks=("lfq-image-text",),
    ),
    Row(
        "LFQExpandedModel (VLM)", "LFQExpandedModel", build_expanded_vlm, _expanded_vision_inputs, _next_ids,
        generate=lambda model: model.generate(
            **_expanded_vision_inputs(), mode="image", num_image_tokens=3, do_sample=False
        ),
        make_part=_lfq_processor, parts=("AutoProcessor",), auto_class="AutoModelForImageTextToText",
        modules_to_save=("lfq_rows",), composite=True, tasks=("lfq-image-text",),
    ),
)  # fmt: skip
