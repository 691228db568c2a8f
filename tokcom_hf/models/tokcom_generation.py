"""Generation with a `TokComModel`: block after block, each along the flow from noise to latents to tokens.

With a context a block knows the tokens before it, whatever their number. Without one the whole row is a single block beside
the prompt's latents; a prompt that is no multiple of the chunk size is then filled with EOS **in front**, where a document
boundary is natural. Nothing ever stands between prompt and continuation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from .tokcom_flow_matching import Denoise, sample, sampling_times
from .tokcom_generation_settings import GenerationSettings
from .tokcom_token_stream import TokenStream


@dataclass
class TokComGenerateOutput(ModelOutput):
    """sequences: (batch, length) ids, prompt first; latents: (batch, generated chunks, latent), the VAE's."""

    sequences: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class Prompt:
    """Prompts as the model reads them, padded on the left.

    ids: (batch, length); length 0: no prompt. mask: (batch, length), 1 = token; None: no padding.
    """

    ids: torch.LongTensor
    mask: torch.LongTensor | None = None

    @classmethod
    def of(cls, model: Any, input_ids: torch.LongTensor | None, attention_mask: torch.LongTensor | None) -> "Prompt":
        """Checks prompts (batch, length) with padding on either side, and moves the padding to the left.

        Raises:
            TypeError: ids that are no integers.
            ValueError: a mask without a prompt or of another shape, an empty prompt, or ids outside the vocabulary.
        """
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask says which tokens of a prompt are padding; there is no prompt.")
            return cls(torch.empty(1, 0, dtype=torch.long, device=execution_device(model)))
        if not torch.is_tensor(input_ids) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            kind = input_ids.dtype if torch.is_tensor(input_ids) else type(input_ids).__name__
            raise TypeError(f"input_ids must be a tensor of token ids (torch.long), got {kind}.")
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (batch, length), both at least 1, got {tuple(input_ids.shape)}.")
        size = model.config.vae.vocab_size
        if input_ids.min() < 0 or input_ids.max() >= size:
            raise ValueError(
                f"input_ids must be in 0 … {size - 1}, got {int(input_ids.min())} … {int(input_ids.max())}; was the prompt "
                "written by this model's tokenizer?"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the prompt's shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
            )
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask.to(input_ids.device))]
        if min(len(row) for row in rows) == 0:
            raise ValueError(
                "Every prompt needs at least one token; generate without input_ids to start from nothing."
            )
        chunk = 1 if model.context is not None else model.config.vae.chunk_size
        width = -(-max(len(row) for row in rows) // chunk) * chunk
        eos = model.config.eos_token_id
        ids = input_ids.new_full((len(rows), width), model.config.vae.omni_token_id if eos is None else eos)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = row
            # What fills the first chunk of a prompt without a context belongs to it.
            mask[index, (width - len(row)) // chunk * chunk :] = 1
        device = execution_device(model)
        return cls(ids.to(device), None if bool(mask.all()) else mask.to(device))


class TextSoFar:
    """What the denoiser is told of the text before a block: a state of the context, or the prompt's clean latents.

    Each prompt is read once for its `copies` continuations, which stand side by side.
    """

    def __init__(self, model: Any, prompt: Prompt, copies: int = 1):
        self.model = model
        self.mask = None if prompt.mask is None else prompt.mask.repeat_interleave(copies, 0)
        self.state: torch.Tensor | None = None
        self.prefix: torch.Tensor | None = None
        if model.context is not None:
            self.cache = DynamicCache(config=model.config.context)
            self.state = model.context(prompt.ids, prompt.mask, self.cache)[:, -1].repeat_interleave(copies, 0)
            self.cache.batch_repeat_interleave(copies)
        elif prompt.ids.shape[1]:
            self.prefix = model.standardize(model.encode(prompt.ids)).repeat_interleave(copies, 0)

    def read(self, ids: torch.LongTensor) -> None:
        """Appends the tokens of a finished block, (rows, tokens)."""
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, ids.shape[1]), value=1)
        self.state = self.model.context(ids, self.mask, self.cache)[:, -1]

    def denoise(self, settings: GenerationSettings) -> Denoise:
        """(x_t, t) → predicted clean latents of one block; `best_of` draws of each row stand side by side."""
        denoiser, copies, guidance = self.model.denoiser, settings.best_of, settings.guidance_scale
        earlier: list[torch.Tensor | None] = [None]

        def with_context(x: torch.Tensor, t: float) -> torch.Tensor:
            time = torch.full((1,), t, device=x.device)
            known: dict[str, Any] = {"self_condition": earlier[0], "return_dict": True}
            clean = denoiser(x, time, context=self.state.repeat_interleave(copies, 0), **known).clean_latents
            if guidance == 1.0:
                return clean
            free = denoiser(x, time, **known).clean_latents
            return free + guidance * (clean - free)

        def with_prefix(x: torch.Tensor, t: float) -> torch.Tensor:
            start = 0 if self.prefix is None else self.prefix.shape[1]
            time, condition, mask = torch.full((1,), t, device=x.device), earlier[0], None
            if self.prefix is not None:
                # The prompt's latents are put back before every step, as documented.
                prefix = self.prefix.repeat_interleave(copies, 0)
                if self.model.config.clean_prefix:
                    time = time.repeat(len(x), start + x.shape[1])
                    time[:, :start] = 1.0
                if denoiser.config.self_conditioning:
                    condition = torch.cat([prefix, torch.zeros_like(x) if condition is None else condition], dim=1)
                if self.mask is not None:
                    chunks = self.mask.view(len(self.mask), start, -1).any(dim=-1).repeat_interleave(copies, 0)
                    mask = nn.functional.pad(chunks, (0, x.shape[1]), value=True)
                x = torch.cat([prefix, x], dim=1)
            known = {"self_condition": condition, "attention_mask": mask, "return_dict": True}
            return denoiser(x, time, **known).clean_latents[:, start:]

        def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
            clean = (with_prefix if self.state is None else with_context)(x, t)
            if denoiser.config.self_conditioning:
                earlier[0] = clean
            return clean

        return denoise


def generate_blocks(
    model: Any, prompt: Prompt, settings: GenerationSettings, generator: torch.Generator | None, stream: TokenStream
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Generates behind prompts, `num_return_sequences` times behind each.

    Returns:
        VAE latents (rows, chunks, latent) and their ids (rows, chunks · chunk_size), whole chunks.
    """
    config = model.config
    wanted = -(-settings.new_tokens // config.vae.chunk_size)
    times = sampling_times(settings.num_steps, config.step_power)
    all_latents, all_ids = [], []
    # 1. Read the prompt.
    copies = settings.num_return_sequences * (1 if prompt.ids.shape[1] else settings.batch_size)
    text = TextSoFar(model, prompt, copies)
    rows = len(prompt.ids) * copies
    for start in range(0, wanted, settings.block_size or wanted):
        # 2. Draw the block's noise.
        size = min(settings.block_size or wanted, wanted - start)
        shape = (rows * settings.best_of, size, config.vae.latent_size)
        x0 = draw_noise(model, shape, settings.temperature, generator)
        # 3. Follow the flow from the noise to clean latents.
        noise_std = config.noise_std * settings.temperature
        x1 = sample(text.denoise(settings), x0, times, settings.sampler, noise_std, generator)
        # 4. Read the tokens off them.
        latents = model.unstandardize(x1)
        ids = model.decode(latents)
        # 5. Keep the draw that lies nearest to its own text.
        if settings.best_of > 1:
            distance = (model.standardize(model.encode(ids)) - x1).square().mean(dim=(1, 2))
            best = distance.view(rows, -1).argmin(dim=1) + torch.arange(rows, device=ids.device) * settings.best_of
            latents, ids = latents[best], ids[best]
        all_latents.append(latents)
        all_ids.append(ids)
        stream.put(ids)
        # 6. Stop at the end, or read the block and go on.
        left = wanted - start - size
        if left and all_ended(all_ids, settings):
            # What would follow every row's end is not looked at; fill ids and zeros keep the shape.
            all_latents.append(latents.new_zeros(rows, left, latents.shape[2]))
            all_ids.append(ids.new_full((rows, left * config.vae.chunk_size), settings.fill_id))
            break
        if left:
            text.read(ids)
    return torch.cat(all_latents, dim=1), torch.cat(all_ids, dim=1)


def denoise_blocks(
    model: Any, x: torch.Tensor, input_ids: torch.LongTensor, times: list[float], sampler: str, generator: Any = None
) -> torch.Tensor:
    """Follows the flow for noisy latents (rows, chunks, latent) of known tokens (rows, length), all blocks at once.

    With a context each block of `config.block_size` chunks (of one chunk where that does not divide the row) is told the
    tokens that really precede it.
    """
    chunks, chunk = x.shape[1], model.config.vae.chunk_size
    size = model.config.block_size or chunks
    size = size if chunks % size == 0 else 1
    context, earlier = None, None
    if model.context is not None:
        context = model.context(input_ids)[:, : chunks * chunk : size * chunk].flatten(0, 1)

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
        nonlocal earlier
        time = torch.full((1,), t, device=x_t.device)
        clean = model.denoiser(x_t, time, context, self_condition=earlier, return_dict=True).clean_latents
        earlier = clean if model.config.denoiser.self_conditioning else None
        return clean

    blocks = x.reshape(-1, size, x.shape[2])
    return sample(denoise, blocks, times, sampler, model.config.noise_std, generator).reshape(x.shape)


def draw_noise(model: Any, shape, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """x0 ~ N(0, (noise_std · temperature)²), drawn on the CPU so that a seed means the same on every device."""
    noise = torch.randn(shape, generator=generator) * (model.config.noise_std * temperature)
    return noise.to(execution_device(model), model.dtype)


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: under offloading its weights are elsewhere, and accelerate's hooks know."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
    place = next((place for place in places if place is not None), None)
    return model.device if place is None else torch.device(place)


def ended(ids: torch.LongTensor, settings: GenerationSettings) -> torch.LongTensor:
    """Ids (rows, tokens) with `fill_id` behind the first end token of each row."""
    if not settings.eos_token_ids:
        return ids
    end = torch.isin(ids, torch.tensor(settings.eos_token_ids, device=ids.device))
    behind = nn.functional.pad(end.cummax(dim=1).values[:, :-1], (1, 0))
    return ids.masked_fill(behind, settings.fill_id)


def all_ended(ids: list[torch.LongTensor], settings: GenerationSettings) -> bool:
    """Whether every row holds an end token."""
    so_far = torch.cat(ids, dim=1)
    end = torch.tensor(settings.eos_token_ids, device=so_far.device, dtype=so_far.dtype)
    return bool(torch.isin(so_far, end).any(dim=1).all())
