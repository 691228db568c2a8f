"""Stage 1 of a `PrunedVLM`: embeds a prompt and reduces the tokens of its images before the language model."""

import zlib
from dataclasses import replace

import torch

from .pruning_family_base import ImageTokens
from .pruning_report import PromptRecord
from .pruning_strategies import STRATEGIES
from .pruning_stream import Prompt, Stream

# Per image: its reduced features `(m, d)` and their places `(m,)` among its tokens.
Reduced = list[tuple[torch.Tensor, torch.Tensor]]
IMAGE_INPUTS = (
    "pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_values_videos", "video_grid_thw",
)  # fmt: skip


def image_inputs(*values: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The processor's tensors for images by their names, without those that are None; `values` as in `IMAGE_INPUTS`."""
    return {name: value for name, value in zip(IMAGE_INPUTS, values) if value is not None}


def prepare_prompt(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    images: dict[str, torch.Tensor],
    mode: str,
) -> Prompt:
    """Embeds a prompt and reduces its vision tokens.

    Args:
        model: the `PrunedVLM`.
        input_ids: `(batch, length)`, image placeholders included.
        attention_mask, labels: of the same shape, or None.
        position_ids: rotary positions instead of the family's own, `(batch, length)` or `(3, batch, length)`.
        images: the processor's tensors for the images, by name.
        mode: pruning mode.

    Raises:
        ValueError: images and image placeholders do not match, or the family does not take an input.
    """
    family = model.family
    unknown = [name for name in images if name not in family.image_inputs]
    if unknown:
        raise ValueError(
            f"PrunedVLM on {model.base.config.model_type!r} takes {', '.join(family.image_inputs)}, got "
            f"{', '.join(unknown)} (videos are not supported)."
        )
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(given.shape)}."
            )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    vision = input_ids == family.image_token_id
    positions = family.positions(input_ids, mask, images) if position_ids is None else position_ids
    mask = mask.bool()
    question = mask & ~vision
    if labels is not None:
        # The question ends before the first answer token: the heads must not read what they help to predict.
        question &= (labels != -100).cumsum(-1) == 0
    stream = Stream(
        hidden=model.get_input_embeddings()(input_ids),
        mask=mask,
        positions=positions.expand(*positions.shape[:-2], *input_ids.shape),
        vision=vision,
        question=question,
        index=torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids),
        images=torch.full_like(input_ids, -1),
    )
    prompt = Prompt(stream, PromptRecord(mode, vision.sum(-1), (mask & ~vision).sum(-1)), merged={})
    if images:
        _insert_images(model, prompt, input_ids, images)
    elif vision.any():
        raise ValueError(f"The prompt has {int(vision.sum())} image placeholders but no image was given.")
    return prompt


def _insert_images(model, prompt: Prompt, input_ids: torch.Tensor, inputs: dict) -> None:
    """Replaces the image placeholders in `prompt.stream` by the reduced tokens of their images."""
    stream = prompt.stream
    strategy = model.config.strategy if model.config.strategy in STRATEGIES else None
    reduces = prompt.record.mode != "origin" and (model.token_merger is not None or strategy is not None)
    guided = model.token_merger is not None and model.token_merger.config.attention_guided in (True, "tower")
    images = model.family.features(inputs, with_attention=reduces and (guided or strategy == "visionzip"))
    sizes = [len(f) for f in images.features]
    prompt.record = replace(
        prompt.record,
        image_tokens=sizes,
        sequences=images.sequences,
        windows=images.windows,
        projected=images.projected,
    )
    if int(stream.vision.sum()) != sum(sizes):
        raise ValueError(
            f"The images give {sum(sizes)} vision tokens ({len(sizes)} images), but the prompt holds "
            f"{int(stream.vision.sum())} image placeholders: every image needs its '<image>' in the text, and every "
            "'<image>' its image. Use the model's processor."
        )
    rows, columns = stream.vision.nonzero(as_tuple=True)
    # `owner`: the image that each placeholder belongs to. In `stream.images` images are numbered within their row.
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(rows.device)
    starts = torch.tensor([0, *sizes[:-1]], device=rows.device).cumsum(0)
    row_of_image = rows[starts]
    first_of_row = torch.searchsorted(row_of_image, row_of_image)
    stream.images[rows, columns] = (owner - first_of_row[owner]).to(stream.images.dtype)
    if not reduces:
        reduced: Reduced = [(f, torch.arange(len(f), device=rows.device)) for f in images.features]
    elif strategy is not None:
        reduced = _by_strategy(model, strategy, images, stream, input_ids, row_of_image.tolist())
    else:
        reduced = _by_merger(model, images, prompt, row_of_image)
    kept = torch.cat([index + start for (_, index), start in zip(reduced, starts)])
    embedded = model.family.project(torch.cat([values for values, _ in reduced]))
    stream.hidden = stream.hidden.index_put((rows[kept], columns[kept]), embedded.to(stream.hidden.dtype))
    keep = ~stream.vision
    keep[rows[kept], columns[kept]] = True
    prompt.stream = stream.keep(keep)


def _by_strategy(
    model, strategy: str, images: ImageTokens, stream: Stream, input_ids: torch.Tensor, row_of_image: list[int]
) -> Reduced:
    """Reduces the tokens of every image by a training-free strategy."""
    config, select = model.config, STRATEGIES[strategy]
    received: list = [None] * len(images.features) if images.received is None else images.received
    generators: list = [None] * len(received)
    if strategy == "random":
        questions = [ids[of_question].tolist() for ids, of_question in zip(input_ids, stream.question)]
        generators = [
            _generator(config.strategy_seed, questions[row], image - row_of_image.index(row))
            for image, row in enumerate(row_of_image)
        ]
    return [
        select(features, min(config.keep, len(features)), attention, generator)
        for features, attention, generator in zip(images.features, received, generators)
    ]


def _generator(seed: int, question: list[int], image: int) -> torch.Generator:
    """A generator seeded by question and image, so that its numbers do not depend on the rest of the batch."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {question} {image}".encode()))


def _by_merger(model, images: ImageTokens, prompt: Prompt, row_of_image: torch.Tensor) -> Reduced:
    """Merges the tokens of every image, images of one size in one call; the merger's losses go into `prompt.merged`."""
    merger, stream, features = model.token_merger, prompt.stream, images.features
    reduced: list = [None] * len(features)
    results = []
    for size in sorted({len(f) for f in features}):
        members = [i for i, f in enumerate(features) if len(f) == size]
        rows = row_of_image[members]
        result = merger(
            torch.stack([features[i] for i in members]),
            stream.hidden[rows],
            stream.question[rows],
            torch.stack([images.received[i] for i in members]) if images.received is not None else None,
            temperature=model.temperature,
            return_dict=True,
        )
        for place, image in enumerate(members):
            used = result.keep_mask[place]
            reduced[image] = (result.merged_features[place][used], result.keep_index[place][used])
        results.append(result)
    kept = torch.cat([result.kept_tokens for result in results]).mean()
    sparsity = torch.stack([result.sparsity_loss for result in results]).mean()
    if merger.config.max_ratio is not None:
        # The budget is for the mean over all images of the batch, also where their sizes differ.
        budgets = [merger.config.tokens_wanted(len(f)) for f in features]
        sparsity = (kept - sum(budgets) / len(budgets)).square()
    prompt.merged = {
        "merge_weights": tuple(result.merge_weights for result in results),
        "merge_sparsity_loss": sparsity,
        "merge_entropy_loss": torch.stack([result.entropy_loss for result in results]).mean(),
        "merge_kept_tokens": kept,
    }
    return reduced
