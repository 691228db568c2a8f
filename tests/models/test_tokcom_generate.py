"""`TokComModel.generate` as users of transformers call it, and every argument acts or raises."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from tests.helpers.tokcom_tools import SHAPE, VAE, seeded, small
from tokcom_hf.models import tokcom_generation
from tokcom_hf.models.tokcom_denoise import Predictions, denoise
from tokcom_hf.models.tokcom_flow_matching import sample, step_times

STILL = {"num_steps": 3, "do_sample": False}


def writer(kind: str, **changes):
    """A model whose text depends on every input; without an end token. Blocks of two chunks behind a context."""
    own = {"clean_prefix": True} if kind == "tokcom" else {"context_dropout": 0.1}
    vae = VAE | {"chunk_projection": "all", "fixed_norm": True}
    return small(kind, **{"vae": vae, "standardize_latents": True, "eos_token_id": None} | own | changes)


@pytest.fixture(scope="module", params=["tokcom", "context", "posterior"])
def model(request):
    return writer(request.param)


@pytest.fixture(scope="module")
def blocks():
    return writer("context")


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(1, 50, (2, 7), generator=seeded())


@pytest.fixture
def noise_of_rows(monkeypatch):
    """Makes the noise of generation a function of the row and the call: the same row gets the same in any batch."""

    def start(*rows: int, copies: int = 1) -> None:
        calls = iter(range(1000))

        def draw(model, shape, temperature, generator):
            call = next(calls)
            drawn = [
                torch.randn(shape[1:], generator=seeded(100 * row + 10 * copy + call))
                for row in rows for copy in range(copies)
            ]  # fmt: skip
            return torch.stack(drawn) * temperature

        monkeypatch.setattr(tokcom_generation, "draw_noise", draw)

    return start


# ---------------------------------------------------------------- lengths and prompts
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_so_many_tokens_as_asked_for(model, prompt, count):
    ids = model.generate(input_ids=prompt, max_new_tokens=count, generator=seeded(), num_steps=2)
    assert ids.shape == (2, 7 + count) and torch.equal(ids[:, :7], prompt)
    chunks = -(-count // 4)
    whole = model.generate(prompt, num_generate_chunks=chunks, generator=seeded(), num_steps=2)
    assert torch.equal(ids, whole[:, : 7 + count])
    assert torch.equal(ids, model.generate(prompt, max_length=7 + count, generator=seeded(), num_steps=2))
    alone = model.generate(max_new_tokens=count, batch_size=3, generator=seeded(), num_steps=2)
    assert alone.shape == (3, count)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a batch one longer than the longest, filled with a token that the model must not see."""
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), 33), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_prompt_in_a_padded_batch_is_the_prompt_alone(model, side, copies, noise_of_rows):
    rows = [torch.randint(1, 50, (length,), generator=seeded(length)) for length in range(1, 10)]
    ids, mask = padded(rows, side)
    options = {"max_new_tokens": 18, "num_steps": 3, "num_return_sequences": copies}
    given = ids.clone(), mask.clone()
    noise_of_rows(*range(9), copies=copies)
    batch = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ids, given[0]) and torch.equal(mask, given[1])
    assert torch.equal(batch[:, :10], ids.repeat_interleave(copies, 0)) and batch.shape == (9 * copies, 28)
    for index, row in enumerate(rows):
        noise_of_rows(index, copies=copies)
        alone = model.generate(row[None], **options)
        own = batch[index * copies : (index + 1) * copies]
        assert torch.equal(own[:, 10:], alone[:, len(row) :]), index
    assert len({tuple(row) for row in batch[:, 10:].tolist()}) > 6 * copies


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_with_an_earlier_prediction_too(self_conditioning, noise_of_rows):
    rows = [torch.randint(1, 50, (length,), generator=seeded(length)) for length in (7, 2)]
    ids, mask = padded(rows, "left")
    for kind in ("tokcom", "context", "posterior"):
        # The posterior of tokens has no use for an earlier prediction.
        own = {"self_conditioning": self_conditioning and kind != "posterior"}
        model = writer(kind, denoiser=SHAPE | own)
        noise_of_rows(0, 1)
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, num_steps=3)
        for index, row in enumerate(rows):
            noise_of_rows(index)
            alone = model.generate(row[None], max_new_tokens=12, num_steps=3)
            assert torch.equal(batch[index, 8:], alone[0, len(row) :])


# ---------------------------------------------------------------- blocks
@torch.no_grad()
def from_scratch(model, prompt, tokens, size, steps, noise, guidance=1.0, sampler="euler"):
    """Generation as the formulas say it: the context reads the whole text anew before every block."""
    text, chunks = prompt, -(-tokens // 4)
    for start in range(0, chunks, size or chunks):
        count = min(size or chunks, chunks - start)
        state = model.context(text)[:, -1]

        def denoise(x, t, state=state):
            time = torch.full((len(x),), t)
            told = model.denoiser(x, time, context=state).clean_latents
            free = model.denoiser(x, time).clean_latents
            return free + guidance * (told - free)

        clean = sample(denoise, noise(count), step_times(model.config, steps), sampler)
        text = torch.cat([text, model.decode(model.unstandardize(clean))], dim=1)
    return text[:, : prompt.shape[1] + tokens]


@pytest.mark.parametrize("size", [1, 2, 3, 0])
@pytest.mark.parametrize("length", [0, 5, 8])
def test_cached_blocks_equal_reading_the_text_anew(blocks, size, length):
    prompt = torch.randint(1, 50, (2, length), generator=seeded(3))
    options = {"max_new_tokens": 18, "num_steps": 3, "block_size": size, "generator": seeded(1)}
    ids = blocks.generate(prompt, **options) if length else blocks.generate(batch_size=2, **options)
    draws = seeded(1)
    expected = from_scratch(blocks, prompt, 18, size, 3, lambda count: torch.randn(2, count, 16, generator=draws))
    assert torch.equal(ids, expected)


@pytest.mark.parametrize(("size", "sampler"), [(1, "euler"), (2, "euler"), (1, "multirate"), (2, "multirate")])
def test_the_guess_follows_the_text_so_far_and_each_draw_itself(size, sampler, noise_of_rows):
    own = {"heads_first": True, "token_order": 0.5} if sampler == "multirate" else {}
    model = writer("posterior", sampler=sampler, **own)
    prompt = torch.randint(1, 50, (2, 5), generator=seeded(3))
    ids = model.generate(prompt, max_new_tokens=16, num_steps=3, block_size=size, generator=seeded(1))
    text, draws = prompt, seeded(1)
    for _ in range(4 // size):
        with torch.no_grad():
            before = model.context(text)[:, -1]
            noise = torch.randn(2, size, 16, generator=draws)
            predictions = Predictions(
                model, lambda x, t, earlier, before=before: denoise(model, x, torch.full((2,), t), before, earlier)
            )
            clean = sample(predictions, noise, step_times(model.config, 3), sampler)
            text = torch.cat([text, model.decode(model.unstandardize(clean))], dim=1)
    assert torch.equal(ids, text)
    # Of two draws side by side, each is that of a call of its own.
    noise_of_rows(0, 1, copies=2)
    both = model.generate(prompt, max_new_tokens=4, num_steps=3, num_return_sequences=2)
    noise_of_rows(0, 1, copies=2)
    best = model.generate(prompt, max_new_tokens=4, num_steps=3, best_of=2)
    assert all(any(torch.equal(row, other) for other in both[2 * i : 2 * i + 2]) for i, row in enumerate(best))


def test_the_block_size_of_the_config_is_the_default(blocks, prompt):
    options = {"max_new_tokens": 20, "num_steps": 2}
    text = {size: blocks.generate(prompt, block_size=size, generator=seeded(), **options) for size in (None, 0, 1, 2)}
    assert torch.equal(text[None], text[2]) and not torch.equal(text[2], text[1]) and not torch.equal(text[2], text[0])


def test_the_last_block_is_as_short_as_what_is_left(blocks):
    sizes = []
    handle = blocks.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    blocks.generate(max_new_tokens=17, num_steps=1, block_size=2)
    blocks.generate(max_new_tokens=17, num_steps=1, block_size=0)
    blocks.generate(max_new_tokens=5, num_steps=1, block_size=16)
    handle.remove()
    assert sizes == [2, 2, 1, 5, 2]


def test_the_steps_and_the_sampler_of_the_config_are_the_defaults():
    model, seen = writer("context", num_steps=5, step_power=2.0, sampler="heun"), []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(round(args[1].item(), 4)))
    model.generate(num_chunks=2)
    times = [round((u / 5) ** 2, 4) for u in range(5)]
    assert seen == sorted(times + times[1:])
    seen.clear()
    model.generate(num_chunks=2, num_steps=2, sampler="euler")
    assert seen == [0.0, 0.25]


def test_a_prompt_is_read_once_for_all_its_continuations(blocks, prompt):
    read = []
    handle = blocks.context.model.register_forward_pre_hook(
        lambda module, args, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    options = {"max_new_tokens": 16, "num_steps": 2, "generator": seeded()}
    together = blocks.generate(prompt, num_return_sequences=3, **options)
    handle.remove()
    assert read == [(2, 8), (6, 8)]
    repeated = blocks.generate(prompt.repeat_interleave(3, 0), **options | {"generator": seeded()})
    assert torch.equal(together, repeated) and len({tuple(row) for row in together.tolist()}) > 2


def test_several_continuations_are_those_of_a_repeated_prompt(model, prompt):
    draw = lambda ids, **more: model.generate(ids, max_new_tokens=8, num_steps=2, generator=seeded(), **more)  # noqa: E731
    assert torch.equal(draw(prompt, num_return_sequences=3), draw(prompt.repeat_interleave(3, 0)))
    alone = model.generate(max_new_tokens=8, num_steps=2, batch_size=2, num_return_sequences=3, generator=seeded())
    assert alone.shape == (6, 8) and len({tuple(row) for row in alone.tolist()}) > 2


# ---------------------------------------------------------------- guidance, best of several draws
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_guidance_is_a_step_away_from_what_is_likely_without_the_context(blocks, prompt, sampler):
    def draw(scale):
        return blocks.generate(
            prompt, max_new_tokens=16, num_steps=3, guidance_scale=scale, sampler=sampler, generator=seeded(1)
        )

    for scale in (1.0, 1.5, 0.0):
        draws = seeded(1)
        noise = lambda count, draws=draws: torch.randn(2, count, 16, generator=draws)  # noqa: E731
        assert torch.equal(draw(scale), from_scratch(blocks, prompt, 16, 2, 3, noise, scale, sampler)), scale
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"):
        draw(float("nan"))
    assert not torch.equal(draw(1.5), draw(1.0)) and not torch.equal(draw(4.0), draw(1.5))


@torch.no_grad()
def test_the_nearest_of_several_draws_is_kept(model, prompt):
    options = {"max_new_tokens": 8, "num_steps": 2, "block_size": 0, "return_dict_in_generate": True}
    best = model.generate(prompt, best_of=5, generator=seeded(), **options)
    every = model.generate(prompt, num_return_sequences=5, generator=seeded(), **options)
    texts, latents = every.sequences[:, 7:].view(2, 5, 8), every.latents.view(2, 5, 2, 16)
    again = model.standardize(model.encode(texts.flatten(0, 1))).view(2, 5, 2, 16)
    distance = (again - model.standardize(latents)).square().mean(dim=(2, 3))
    chosen = distance.argmin(dim=1)
    assert set(chosen.tolist()) != {0} and distance.std() > 0
    for row in range(2):
        assert torch.equal(best.sequences[row, 7:], texts[row, chosen[row]])
        assert torch.equal(best.latents[row], latents[row, chosen[row]])


@torch.no_grad()
def test_the_nearest_draw_is_found_without_the_scales_of_the_order():
    """In the flow's space the first token of a chunk would outweigh the others; all count alike."""
    model = writer("posterior", token_order=1.4, standardize_latents=True)
    scaled = torch.linalg.eigvals(model.order.scale).abs()
    assert scaled.max() / scaled.min() > 2
    options = {"max_new_tokens": 4, "num_steps": 2, "block_size": 1, "return_dict_in_generate": True}
    differ = 0
    for seed in range(8):
        best = model.generate(best_of=6, generator=seeded(seed), **options)
        every = model.generate(batch_size=6, generator=seeded(seed), **options)
        own = model.standardize(model.encode(every.sequences)) - model.standardize(every.latents)
        nearest = model.order.undo(own).square().mean(dim=(1, 2)).argmin()
        assert torch.equal(best.sequences[0], every.sequences[nearest])
        differ += int(own.square().mean(dim=(1, 2)).argmin() != nearest)
    assert differ > 0


def test_later_blocks_follow_the_draw_that_was_kept(blocks, prompt):
    options = {"max_new_tokens": 12, "num_steps": 2, "best_of": 3, "block_size": 1}
    ids = blocks.generate(prompt, **options, generator=seeded())
    generator = seeded()
    text = prompt
    for _ in range(3):
        text = blocks.generate(text, **options | {"max_new_tokens": 4}, generator=generator)
    assert torch.equal(ids, text)


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(1, 2)}, "there is no prompt"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, "must have the prompt's shape"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}, "at least one token"),
        ({"input_ids": torch.ones(2).long()}, r"\(batch, length\)"),
        ({"max_new_tokens": 4, "max_length": 9}, "max_new_tokens and max_length say the same thing twice"),
        ({"max_new_tokens": 4, "num_chunks": 1}, "say the same thing twice"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"input_ids": torch.ones(1, 5).long(), "max_length": 5}, "nothing is left"),
        ({"num_generate_chunks": 2}, "num_generate_chunks does not apply without a prompt"),
        ({"input_ids": torch.ones(1, 5).long(), "num_chunks": 2}, "num_chunks does not apply with a prompt"),
        ({"input_ids": torch.ones(1, 5).long(), "batch_size": 2}, "there are 1 prompts"),
        ({"temperature": -0.5}, "temperature must not be negative"),
        ({"temperature": float("nan")}, "temperature must not be negative"),
        ({"temperature": float("inf")}, "temperature must not be negative, and must be finite"),
        ({"do_sample": False, "temperature": 0.7}, "Give one of the two"),
        ({"do_sample": True, "temperature": 0.0}, "Give one of the two"),
        ({"do_sample": False, "num_return_sequences": 2}, "At temperature 0"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "At temperature 0"),
        ({"temperature": 0.0, "best_of": 2}, "must be 1, got 1 and 2"),
        ({"best_of": 0}, "best_of must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_chunks": -3}, "at least 1, got -3"),
        ({"block_size": -1}, "block_size must be 0"),
        ({"sampler": "Euler"}, "sampler must be one of"),
        ({"sampler": "commit"}, "sampler must be one of"),
        ({"input_ids": torch.tensor([[3, 77]])}, "input_ids must be in 0 … 50"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"eos_token_id": 51}, "eos_token_id must be in 0 … 50"),
    ],
)
def test_arguments_that_contradict_or_do_not_act_raise(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"num_steps": 1, "max_new_tokens": None, **arguments})


def test_options_of_models_with_a_context_are_refused_without_one(prompt):
    documented = writer("tokcom")
    for size in (1, 2):
        with pytest.raises(ValueError, match="in a model with a context, positive; got"):
            documented.generate(prompt, block_size=size)
    with pytest.raises(ValueError, match="needs a model trained with context_dropout above 0"):
        documented.generate(prompt, guidance_scale=1.5)
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5 needs a model trained with context_dropout"):
        writer("context", context_dropout=0.0).generate(prompt, guidance_scale=1.5)


@pytest.mark.parametrize(
    "name",
    ["top_k", "num_beams", "max_new_token", "stopping_criteria", "num_stepz", "seed", "time_grid", "token_lag",
     "posterior_temperature", "final_clean_pass"],
)  # fmt: skip
def test_unknown_keywords_are_named(model, name):
    with pytest.raises(TypeError, match=name):
        model.generate(max_new_tokens=4, **{name: 1})


def test_wrong_kinds_are_named(model):
    with pytest.raises(TypeError, match="float32"):
        model.generate(input_ids=torch.ones(1, 4))
    with pytest.raises(TypeError, match="bool"):
        model.generate(input_ids=torch.ones(1, 4).bool())
    with pytest.raises(TypeError, match="list"):
        model.generate(input_ids=[[1, 2]])
    with pytest.raises(TypeError, match="put and end"):
        model.generate(max_new_tokens=4, streamer=print)
    for name in ("max_new_tokens", "num_chunks", "num_steps"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got 1.5"):
            model.generate(**{name: 1.5})
    with pytest.raises(ValueError, match=r"both at least 1, got \(0, 4\)"):
        model.generate(torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="pad_token_id must be in 0"):
        model.generate(num_chunks=1, pad_token_id=9999)
    with pytest.raises(TypeError, match="must be a GenerationConfig"):
        model.generate(generation_config={"max_new_tokens": 4})


# ---------------------------------------------------------------- what is random
@pytest.mark.parametrize("sampler", ["euler", "heun", "multistep", "multirate", "renoise"])
def test_other_noise_is_another_text_and_no_noise_is_one_text(model, prompt, sampler):
    if sampler == "multirate" and model.posterior is None:
        pytest.skip("follows the evidence of a TokenPosterior")

    def draw(**more):
        return model.generate(prompt, max_new_tokens=16, num_steps=3, sampler=sampler, **more)

    assert torch.equal(draw(generator=seeded(1)), draw(generator=seeded(1)))
    assert not torch.equal(draw(generator=seeded(1)), draw(generator=seeded(2)))
    still = draw(temperature=0.0, generator=seeded(1))
    torch.manual_seed(5)
    others = [draw(temperature=0.0, generator=seeded(2)), draw(do_sample=False), draw(temperature=0)]
    assert all(torch.equal(still, other) for other in others)
    assert not torch.equal(still, draw(generator=seeded(1)))


def test_without_a_generator_the_global_seed_counts(model):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(max_new_tokens=16, num_steps=2))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_temperature_is_the_factor_of_all_noise(model, sampler, monkeypatch):
    predict, started = tokcom_generation.predict, []
    monkeypatch.setattr(
        tokcom_generation,
        "predict",
        lambda model, x, t, *more: (started.append((t, x)), predict(model, x, t, *more))[1],
    )
    draw = lambda **more: model.generate(  # noqa: E731
        max_new_tokens=32, num_steps=3, sampler=sampler, generator=seeded(5), **more
    )
    plain, tripled = draw(), draw(temperature=3.0)
    assert torch.equal(plain, draw(temperature=1.0)) and torch.equal(plain, draw(do_sample=True))
    assert torch.equal(plain, draw(do_sample=True, temperature=1.0)) and not torch.equal(plain, tripled)
    # The first block starts at as much more noise.
    starts = [x for t, x in started if t == 0]
    torch.testing.assert_close(starts[len(starts) // 5], 3 * starts[0])
    if model.posterior is None:
        # As if the model had been trained with so much noise.
        monkeypatch.setattr(model.config, "noise_std", 3.0)
        assert torch.equal(draw(), tripled)


def test_threads_generate_as_one_thread_does(model):
    requests = [(torch.randint(1, 50, (1, 2 + n % 5), generator=seeded(n)), n) for n in range(12)]

    def run(request):
        ids, seed = request
        return model.generate(ids, max_new_tokens=6, num_steps=2, generator=seeded(seed))

    expected = [run(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(run, requests), expected))


# ---------------------------------------------------------------- end of a sequence
def test_end_and_padding_tokens(model):
    draw = lambda **more: model.generate(  # noqa: E731
        max_new_tokens=60, batch_size=3, num_steps=2, generator=seeded(), **more
    )
    plain = draw()
    first, second = int(plain[0, 3]), int(plain[1, 5])
    ids = draw(eos_token_id=[first, second], pad_token_id=50)
    for row, free in zip(ids.tolist(), plain.tolist()):
        end = min(free.index(token) if token in free else 60 for token in (first, second))
        assert row[: end + 1] == free[: end + 1] and set(row[end + 1 :]) <= {50}
    alone = draw(eos_token_id=first)
    end = plain[0].tolist().index(first)
    assert (alone[0, end:] == first).all()


class Recorder:
    def __init__(self):
        self.parts, self.finished = [], 0

    def put(self, value):
        assert not self.finished
        self.parts.append(value.clone())

    def end(self):
        self.finished += 1


def test_a_streamer_gets_prompt_and_tokens_in_order(model, prompt):
    streamer = Recorder()
    ids = model.generate(prompt, max_new_tokens=7, num_steps=2, generator=seeded(), streamer=streamer)
    assert streamer.finished == 1 and torch.equal(streamer.parts[0], prompt)
    assert [part.shape for part in streamer.parts[1:]] == [(2,)] * 7
    assert torch.equal(torch.stack(streamer.parts[1:], dim=1), ids[:, 7:])


def test_a_streamer_hears_nothing_behind_the_end(model):
    plain = model.generate(max_new_tokens=40, num_steps=2, generator=seeded())
    end, streamer = int(plain[0, 13]), Recorder()
    settings = {"max_new_tokens": 40, "num_steps": 2}
    ids = model.generate(**settings, generator=seeded(), eos_token_id=end, streamer=streamer)
    first = ids[0].tolist().index(end)
    assert ids.shape == (1, 40) and streamer.parts[0].shape == (1, 0)
    assert torch.cat(streamer.parts[1:]).tolist() == ids[0, : first + 1].tolist()


def test_blocks_are_streamed_as_they_are_finished(monkeypatch, blocks):
    order, streamer = [], Recorder()
    decode = blocks.decode
    monkeypatch.setattr(blocks, "decode", lambda latents: (order.append("block"), decode(latents))[1])
    streamer.put = lambda value: order.append(value.shape[-1])
    blocks.generate(max_new_tokens=11, num_steps=1, block_size=1, streamer=streamer)
    assert order == [0, "block", 1, 1, 1, 1, "block", 1, 1, 1, 1, "block", 1, 1, 1]


def test_nothing_is_generated_behind_the_end_of_all_rows(blocks):
    options = {"max_new_tokens": 40, "num_steps": 2, "batch_size": 2, "block_size": 1}
    plain = blocks.generate(**options, generator=seeded())
    ends = [int(row[9]) for row in plain]
    passes = []
    handle = blocks.denoiser.register_forward_hook(lambda *_: passes.append(1))
    output = blocks.generate(
        **options, generator=seeded(), eos_token_id=ends, pad_token_id=50, return_dict_in_generate=True
    )
    handle.remove()
    first = [min(row.tolist().index(end) for end in ends if end in row.tolist()) for row in plain]
    assert len(passes) == 2 * (max(first) // 4 + 1) <= 2 * 3
    assert output.sequences.shape == (2, 40) and output.latents.shape == (2, 10, 16)
    for row, free, end in zip(output.sequences.tolist(), plain.tolist(), first):
        assert row[: end + 1] == free[: end + 1] and set(row[end + 1 :]) == {50}


def test_the_streamers_of_transformers_write_the_text(model, capsys):
    vocabulary = {f"w{index}": index for index in range(50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    settings = {"input_ids": ids, "max_new_tokens": 6, "num_steps": 2}
    expected = tokenizer.decode(model.generate(**settings, generator=seeded())[0, 3:])
    model.generate(**settings, generator=seeded(), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(model.generate, **settings, generator=seeded(), streamer=streamer)
        assert "".join(streamer).strip() == expected
        done.result()


# ---------------------------------------------------------------- generation_config
def test_a_generation_config_supplies_what_is_not_given(model, prompt):
    config = GenerationConfig(max_new_tokens=5, num_steps=2, sampler="heun", do_sample=True, temperature=2.0)
    direct = {"max_new_tokens": 5, "num_steps": 2, "sampler": "heun", "temperature": 2.0}
    ids = model.generate(prompt, generation_config=config, generator=seeded())
    assert torch.equal(ids, model.generate(prompt, **direct, generator=seeded()))
    longer = model.generate(prompt, generation_config=config, generator=seeded(), num_generate_chunks=2)
    assert longer.shape == (2, 15)
    # An explicit do_sample=False leaves the stored temperature out.
    still = model.generate(prompt, generation_config=config, do_sample=False)
    assert torch.equal(still, model.generate(prompt, max_new_tokens=5, num_steps=2, sampler="heun", do_sample=False))
    assert not torch.equal(still, ids)
    assert model.generate(prompt, generation_config=GenerationConfig(max_length=9), num_steps=1).shape == (2, 9)


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", 4), ("top_k", 50), ("repetition_penalty", 1.2), ("num_stepz", 8)]
)
def test_settings_without_a_meaning_are_refused(model, name, value):
    with pytest.raises(ValueError, match=f"generation_config.{name}={value} has no meaning"):
        model.generate(max_new_tokens=4, generation_config=GenerationConfig(**{name: value}))


def test_settings_that_change_nothing_are_taken(model):
    neutral = GenerationConfig(num_beams=1, top_p=1.0, use_cache=True, min_new_tokens=0, bos_token_id=3)
    ids = model.generate(max_new_tokens=4, num_steps=1, generation_config=neutral, generator=seeded())
    assert torch.equal(ids, model.generate(max_new_tokens=4, num_steps=1, generator=seeded()))


def test_the_generation_config_is_saved_and_loaded(tmp_path):
    model = writer("context", eos_token_id=7)
    assert model.can_generate() and model.generation_config.eos_token_id == 7
    model.generation_config.num_steps = 2
    model.generation_config.max_new_tokens = 6
    model.generation_config.pad_token_id = 3
    model.generation_config.block_size = 1
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert (stored["num_steps"], stored["max_new_tokens"], stored["eos_token_id"]) == (2, 6, 7)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.generation_config.num_steps == 2
    ids = again.generate(generator=seeded())
    assert torch.equal(ids, model.generate(generator=seeded())) and ids.shape == (1, 6)
    (tmp_path / "generation_config.json").unlink()
    old = AutoModel.from_pretrained(tmp_path)
    assert old.generate(num_steps=1, num_chunks=2).shape == (1, 8) and old.generation_config.eos_token_id == 7
    old.generation_config.num_steps = 3
    old.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).generation_config.num_steps == 3


def test_the_end_token_is_that_of_whichever_config_was_changed(tmp_path):
    model = writer("context", eos_token_id=7)
    draw = lambda m: m.generate(max_new_tokens=60, num_steps=1, generator=seeded())[0].tolist()  # noqa: E731
    model.config.eos_token_id = None
    free = draw(model)
    model.config.eos_token_id = free[4]
    assert set(draw(model)[free.index(free[4]) :]) == {free[4]}
    model.generation_config.eos_token_id = free[9]
    assert set(draw(model)[free.index(free[9]) :]) == {free[9]}
    model.save_pretrained(tmp_path)
    assert draw(AutoModel.from_pretrained(tmp_path)) == draw(model)
