"""`TokComModel.generate` as users of transformers call it, and every argument acts or raises."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from .tokcom_tools import SHAPE, small

ARGUMENTS = {"num_steps": 3, "do_sample": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["bidirectional", "block_causal"])
def model(request):
    denoiser = SHAPE | {"attention": request.param}
    return small("tokcom", denoiser=denoiser, clean_prefix=True, block_size=2, eos_token_id=None)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(1, 50, (2, 7), generator=seeded())


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


def test_three_names_of_a_prompt(model, prompt):
    expected = model.generate(prompt, max_new_tokens=4, **ARGUMENTS)
    for name in ("prompt_ids", "input_ids", "inputs"):
        assert torch.equal(model.generate(**{name: prompt}, max_new_tokens=4, **ARGUMENTS), expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("copies", [1, 2])
def test_padding_is_not_seen_and_stands_where_it_stood(model, side, copies):
    rows = [torch.arange(1, 1 + length) for length in (7, 2, 4)]
    ids, mask = torch.full((3, 9), 33), torch.zeros(3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        start = {"left": 9 - len(row), "right": 0, "both": (9 - len(row)) // 2}[side]
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = row, 1
    arguments = ARGUMENTS if copies == 1 else {"num_steps": 3, "num_return_sequences": copies}
    if copies > 1:
        model = small("tokcom", denoiser=model.config.denoiser.to_dict(), block_size=2, eos_token_id=None)
        model._noise = lambda shape, generator: torch.zeros(shape)
    ids, mask = ids.clone(), mask.clone()
    batch = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **arguments)
    assert torch.equal(batch[:, :9], ids.repeat_interleave(copies, 0)) and batch.shape == (3 * copies, 15)
    compact = model.generate(prompt_ids=ids, prompt_mask=mask, max_new_tokens=6, **arguments)
    for index, row in enumerate(rows):
        expected = model.generate(row[None], max_new_tokens=6, **arguments)[0]
        assert torch.equal(batch[index * copies, 9:], expected[len(row) :])
        assert torch.equal(compact[index * copies, : len(row) + 6], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(1, 2).long(), "prompt_ids": torch.ones(1, 2).long()}, "names of the same argument"),
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
        ({"do_sample": False, "temperature": 0.7}, "give one of the two"),
        ({"do_sample": True, "temperature": 0.0}, "above 0"),
        ({"do_sample": False, "num_return_sequences": 2}, "would repeat it"),
        ({"do_sample": False, "sampler": "renoise"}, "draws noise at every step"),
        ({"sampler": "Euler"}, "sampler must be one of"),
        ({"time_grid": "linear"}, "time_grid must be one of"),
        ({"guidance_scale": 2.0, "block_size": 0}, "needs something to be guided by"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"eos_token_id": 51}, "eos_token_id must be in 0 … 50"),
    ],
)
def test_arguments_that_contradict_or_do_not_act_raise(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"num_steps": 1, "max_new_tokens": None, **arguments})


@pytest.mark.parametrize("name", ["top_k", "num_beams", "max_new_token", "stopping_criteria", "num_stepz", "seed"])
def test_unknown_keywords_are_named(model, name):
    with pytest.raises(TypeError, match=name):
        model.generate(max_new_tokens=4, **{name: 1})


def test_wrong_kinds_are_named(model):
    with pytest.raises(TypeError, match="float32"):
        model.generate(input_ids=torch.ones(1, 4))
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


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"time_grid": "cosine"}, "time_grid"),
        ({"final_clean_pass": True}, "final_clean_pass"),
        ({"temperature": 0.5}, "temperature"),
    ],
)
def test_commit_refuses_what_it_does_not_use(arguments, name):
    vae = {"vocab_size": 51, "latent_size": 32, "encoder": "embedding", **SHAPE}
    flow = {
        "clean_latents": "posterior_mean",
        "noise_likelihood": True,
        "token_time_std": 1.0,
        "standardize_latents": True,
    }
    model = small("tokcom", vae=vae, denoiser=SHAPE, sampler="commit", **flow)
    with pytest.raises(ValueError, match=f"'commit' does not use {name}"):
        model.generate(max_new_tokens=4, **arguments)
    ids = [model.generate(max_new_tokens=7, do_sample=False) for _ in range(2)]
    assert torch.equal(*ids) and ids[0].shape == (1, 7)


def test_samplers_and_grids_of_denoise_reconstruct_are_checked_at_every_level(model):
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match="sampler must be one of"):
        model.denoise_reconstruct(ids, noise_level=1.0, sampler="magic")


# ---------------------------------------------------------------- what is random
def test_without_sampling_nothing_is_random(model, prompt):
    torch.manual_seed(1)
    one = model.generate(prompt, max_new_tokens=8, **ARGUMENTS)
    torch.manual_seed(2)
    assert torch.equal(one, model.generate(prompt, max_new_tokens=8, **ARGUMENTS))
    assert not torch.equal(one, model.generate(prompt, max_new_tokens=8, num_steps=3, generator=seeded(3)))
    still = small(
        "tokcom", denoiser=model.config.denoiser.to_dict(), clean_prefix=True, block_size=2, eos_token_id=None
    )
    still._noise = lambda shape, generator: torch.zeros(shape)
    assert torch.equal(one, still.generate(prompt, max_new_tokens=8, num_steps=3))


def test_sampling_draws_tokens_at_the_temperature(model):
    draw = lambda **more: model.generate(max_new_tokens=32, num_steps=2, generator=seeded(5), **more)  # noqa: E731
    greedy, sampled = draw(), draw(do_sample=True)
    assert not torch.equal(greedy, sampled)
    assert torch.equal(sampled, draw(temperature=1.0)) and torch.equal(sampled, draw(do_sample=True, temperature=1.0))
    assert not torch.equal(sampled, draw(do_sample=True, temperature=5.0))
    assert torch.equal(greedy, draw(temperature=0.0))


def test_threads_generate_as_one_thread_does(model):
    requests = [(torch.randint(1, 50, (1, 2 + n % 5), generator=seeded(n)), n) for n in range(12)]

    def run(request):
        ids, seed = request
        return model.generate(ids, max_new_tokens=6, num_steps=2, temperature=1.0, generator=seeded(seed))

    expected = [run(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(run, requests), expected))


# ---------------------------------------------------------------- end of a sequence
def test_end_and_padding_tokens(model):
    draw = lambda **more: model.generate(  # noqa: E731
        max_new_tokens=60, batch_size=3, num_steps=2, temperature=5.0, generator=seeded(), block_size=0, **more
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
    plain = model.generate(max_new_tokens=40, num_steps=2, temperature=5.0, generator=seeded(), block_size=2)
    end, streamer = int(plain[0, 13]), Recorder()
    settings = {"max_new_tokens": 40, "num_steps": 2, "temperature": 5.0, "block_size": 2}
    ids = model.generate(**settings, generator=seeded(), eos_token_id=end, streamer=streamer)
    first = ids[0].tolist().index(end)
    assert ids.shape == (1, 40) and streamer.parts[0].shape == (1, 0)
    assert torch.cat(streamer.parts[1:]).tolist() == ids[0, : first + 1].tolist()


def test_blocks_are_streamed_as_they_are_finished(monkeypatch, model):
    order, streamer = [], Recorder()
    flow = model._flow
    monkeypatch.setattr(model, "_flow", lambda *a, **k: (order.append("block"), flow(*a, **k))[1])
    streamer.put = lambda value: order.append(value.shape[-1])
    model.generate(max_new_tokens=11, num_steps=1, block_size=1, streamer=streamer)
    assert order == [0, "block", 1, 1, 1, 1, "block", 1, 1, 1, 1, "block", 1, 1, 1]


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
    model = small("tokcom", eos_token_id=7)
    assert model.can_generate() and model.generation_config.eos_token_id == 7
    model.generation_config.num_steps = 2
    model.generation_config.max_new_tokens = 6
    model.generation_config.pad_token_id = 3
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
    model = small("tokcom", eos_token_id=7)
    draw = lambda m: m.generate(max_new_tokens=60, num_steps=1, temperature=5.0, generator=seeded())[0].tolist()  # noqa: E731
    model.config.eos_token_id = None
    free = draw(model)
    model.config.eos_token_id = free[4]
    assert set(draw(model)[free.index(free[4]) :]) == {free[4]}
    model.generation_config.eos_token_id = free[9]
    assert set(draw(model)[free.index(free[9]) :]) == {free[9]}
    model.save_pretrained(tmp_path)
    assert draw(AutoModel.from_pretrained(tmp_path)) == draw(model)
