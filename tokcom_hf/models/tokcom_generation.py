"""Generation with a `TokComModel`: block after block, each along the flow from noise to latents to tokens.

With a context, a block sees all tokens before it. Without a context, the row is a single block beside the latents of the
prompt; a prompt that is no multiple of the chunk size then gets EOS tokens **in front**, where a document may begin, so that
nothing stands between prompt and continuation.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from .shared_tensor_checks import check_ids
from .tokcom_context_encoder import TextBefore, read_before
from .tokcom_denoise import Denoised, Predictions, denoise
from .tokcom_flow_matching import check_sampler, denoising_steps, interpolate, sample, step_times
from .tokcom_generation_settings import GenerationSettings
from .tokcom_token_order import without_order
from .tokcom_token_stream import TokenStream


@dataclass
class TokComGenerateOutput(ModelOutput):
    """Output of `generate`: `sequences` (batch, length) ids, prompt first; `latents` (batch, generated chunks, latent)."""

    sequences: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class Prompt:
    """A batch of prompts.

    given: ids as the caller gave them, (batch, length); without a prompt (1, 0).
    ids: the same ids with all padding on the left, as the model reads them.
    mask: 1 = token, 0 = padding of `ids`; None: no padding.
    """

    given: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> "Prompt":
        """Checks prompts (batch, length) with padding on either side, and moves the padding to the left.

        Raises:
            TypeError: ids are no integers.
            ValueError: a mask has no prompt or another shape, a prompt is empty, or ids are outside the vocabulary.
        """
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask says which tokens of a prompt are padding; there is no prompt.")
            nothing = torch.empty(1, 0, dtype=torch.long, device=execution_device(model))
            return cls(nothing, nothing)
        check_ids(input_ids, model.config.vae.vocab_size, every_device=True)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
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
            # Without a context, the tokens that fill up the first chunk count as part of the prompt.
            mask[index, (width - len(row)) // chunk * chunk :] = 1
        device = execution_device(model)
        return cls(input_ids.to(device), ids.to(device), None if bool(mask.all()) else mask.to(device))


def predict(
    model: Any, x: torch.Tensor, t: float, context: TextBefore | None = None, earlier: Denoised | None = None
) -> Denoised:
    """What the denoiser predicts from x_t = x (blocks, chunks, latent), with one t for all."""
    return denoise(model, x, torch.full((1,), t, device=x.device), context, earlier)


class TextSoFar:
    """The text before a block in the form that the denoiser reads: a state of the context, or clean latents of the prompt.

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

    def read(self, ids: torch.Tensor) -> None:
        """Appends the tokens of a finished block, (rows, tokens)."""
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, ids.shape[1]), value=1)
        self.state = self.model.context(ids, self.mask, self.cache)[:, -1]

    def before(self, copies: int) -> TextBefore:
        """The text so far for `copies` blocks of each row, side by side."""
        state = self.state.repeat_interleave(copies, 0)
        if not self.model.config.read_guesses:
            return TextBefore(state)
        seen = torch.ones(1, self.cache.get_seq_length(), dtype=torch.bool, device=state.device)
        if self.mask is not None:
            seen = nn.functional.pad(self.mask, (1, 0), value=1).bool()
        seen = seen.unsqueeze(1).expand(-1, copies, -1)
        return TextBefore(state, lambda soft: self.model.context.read_on(soft, self.cache, seen))

    def denoise(self, settings: GenerationSettings) -> Predictions:
        """(x_t, t) → predicted clean latents of one block; the `best_of` draws of each row stand side by side."""
        model, copies, scale = self.model, settings.best_of, settings.guidance_scale
        before = None if self.state is None else self.before(copies)

        def with_state(x: torch.Tensor, t: float, earlier: Denoised | None) -> Denoised:
            conditional = predict(model, x, t, before, earlier)
            if scale == 1.0:
                return conditional
            # Without the text, no guess that knows it is read either.
            blind = None if earlier is None else Denoised(earlier.clean_latents)
            unconditional = predict(model, x, t, None, blind).clean_latents
            guided = unconditional + scale * (conditional.clean_latents - unconditional)
            return replace(conditional, clean_latents=guided)

        def with_prefix(x: torch.Tensor, t: float, earlier: Denoised | None) -> Denoised:
            # The prompt's latents are put back before every step, as documented.
            prefix, mask = self.prefix.repeat_interleave(copies, 0), None
            start, time = prefix.shape[1], torch.full((1,), t, device=x.device)
            if model.config.clean_prefix:
                time = time.repeat(len(x), start + x.shape[1])
                time[:, :start] = 1.0
            condition = None
            if model.config.denoiser.self_conditioning:
                predicted = torch.zeros_like(x) if earlier is None else earlier.clean_latents
                condition = torch.cat([prefix, predicted], dim=1)
            if self.mask is not None:
                chunks = self.mask.view(len(self.mask), start, -1).any(dim=-1).repeat_interleave(copies, 0)
                mask = nn.functional.pad(chunks, (0, x.shape[1]), value=True)
            row = torch.cat([prefix, x], dim=1)
            output = model.denoiser(row, time, self_condition=condition, attention_mask=mask, return_dict=True)
            return Denoised(output.clean_latents[:, start:])

        def alone(x: torch.Tensor, t: float, earlier: Denoised | None) -> Denoised:
            return predict(model, x, t, None, earlier)

        step = with_state if before is not None else alone if self.prefix is None else with_prefix
        return Predictions(model, step)


def generate_blocks(
    model: Any, prompt: Prompt, settings: GenerationSettings, generator: torch.Generator | None, streamer: Any = None
) -> torch.Tensor | TokComGenerateOutput:
    """The steps of `TokComModel.generate`: continues each prompt `num_return_sequences` times."""
    config = model.config
    copies = settings.num_return_sequences * (1 if prompt.ids.shape[1] else settings.batch_size)
    rows, wanted = len(prompt.ids) * copies, -(-settings.new_tokens // config.vae.chunk_size)
    times = step_times(config, settings.num_steps)
    start, stream = prompt.given.repeat_interleave(copies, 0), TokenStream(streamer, settings)
    stream.start(start)
    # 1. Read the prompt.
    text = TextSoFar(model, prompt, copies)
    all_latents, all_ids = [], []
    for first in range(0, wanted, settings.block_size or wanted):
        # 2. Draw the block's noise.
        size = min(settings.block_size or wanted, wanted - first)
        shape = (rows * settings.best_of, size, config.vae.latent_size)
        x0 = draw_noise(model, shape, settings.temperature, generator)
        # 3. Follow the flow from the noise to clean latents.
        noise_std = config.noise_std * settings.temperature
        x1 = sample(text.denoise(settings), x0, times, settings.sampler, noise_std, generator)
        # 4. Decode them to tokens.
        latents = model.unstandardize(x1)
        ids = model.decode(latents)
        # 5. Of several draws, keep the one whose latents are nearest to the encoding of its own text.
        if settings.best_of > 1:
            distance = without_order(model, model.standardize(model.encode(ids)) - x1).square().mean(dim=(1, 2))
            best = distance.view(rows, -1).argmin(dim=1) + torch.arange(rows, device=ids.device) * settings.best_of
            latents, ids = latents[best], ids[best]
        all_latents.append(latents)
        all_ids.append(ids)
        stream.put(ids)
        # 6. Stop where every row has ended, or read the block and go on.
        left = wanted - first - size
        if left and all_ended(all_ids, settings):
            all_latents.append(latents.new_zeros(rows, left, latents.shape[2]))
            all_ids.append(ids.new_full((rows, left * config.vae.chunk_size), settings.fill_id))
            break
        if left:
            text.read(ids)
    stream.end()
    # 7. Cut to the number of new tokens, and fill up what follows the end of a row.
    new = ended(torch.cat(all_ids, dim=1)[:, : settings.new_tokens], settings)
    sequences = torch.cat([start, new], dim=1)
    return (
        TokComGenerateOutput(sequences, torch.cat(all_latents, dim=1))
        if settings.return_dict_in_generate
        else sequences
    )


def denoise_text(
    model: Any, input_ids: torch.Tensor, noise_level: float, num_steps: int, sampler: str | None, generator: Any
) -> torch.Tensor:
    """VAE latents of known tokens (rows, length), mixed with noise and denoised; arguments of `denoise_reconstruct`.

    With a context, each block of `block_size` chunks (of one chunk, if `block_size` does not divide the row) gets the state
    after the tokens that really precede it.
    """
    if num_steps < 1 or not 0.0 <= noise_level <= 1.0:
        raise ValueError(f"num_steps must be at least 1 and noise_level in [0, 1], got {num_steps} and {noise_level}.")
    config = model.config
    sampler = check_sampler(config.sampler if sampler is None else sampler, config)
    # 1. Encode the text, and mix in the noise.
    clean = model.standardize(model.encode(input_ids))
    if noise_level == 1.0:
        return model.unstandardize(clean)
    level = torch.full((len(clean),), noise_level).to(clean)
    x = interpolate(draw_noise(model, clean.shape, 1.0, generator), clean, level)
    # 2. Cut it into blocks, and read what precedes each.
    size = config.block_size or x.shape[1]
    size = size if x.shape[1] % size == 0 else 1
    before = None
    if model.context is not None:
        starts = torch.arange(0, input_ids.shape[1], size * config.vae.chunk_size)
        _, before = read_before(model, input_ids, starts)
    # 3. Follow the flow for all blocks at once.
    denoise = Predictions(model, lambda x_t, t, earlier: predict(model, x_t, t, before, earlier))
    times = step_times(config, denoising_steps(num_steps, noise_level), noise_level)
    blocks = sample(denoise, x.reshape(-1, size, x.shape[2]), times, sampler, config.noise_std, generator)
    return model.unstandardize(blocks.reshape(x.shape))


def draw_noise(model: Any, shape, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """x0 ~ N(0, (noise_std · temperature)²), drawn on the CPU so that a seed gives the same noise on every device."""
    noise = torch.randn(shape, generator=generator) * (model.config.noise_std * temperature)
    return noise.to(execution_device(model), model.dtype)


def execution_device(model: Any) -> torch.device:
    """The device on which the model computes; of a model with offloaded weights, accelerate's hooks know it."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
    place = next((place for place in places if place is not None), None)
    return torch.device(model.device if place is None else place)


def ended(ids: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """Ids (rows, tokens) in which `fill_id` replaces everything after the first end token of each row."""
    if not settings.eos_token_ids:
        return ids
    end = torch.isin(ids, torch.tensor(settings.eos_token_ids, device=ids.device))
    after = nn.functional.pad(end.cummax(dim=1).values[:, :-1], (1, 0))
    return ids.masked_fill(after, settings.fill_id)


def all_ended(ids: list[torch.Tensor], settings: GenerationSettings) -> bool:
    """Whether every row holds an end token."""
    so_far = torch.cat(ids, dim=1)
    end = torch.tensor(settings.eos_token_ids, device=so_far.device, dtype=so_far.dtype)
    return bool(torch.isin(so_far, end).any(dim=1).all())
