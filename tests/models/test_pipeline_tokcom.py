"""pipeline("tokcom-generation")."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig, pipeline, set_seed

import tokcom_hf
from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.models.pipeline_tokcom import FORWARD_ARGUMENTS

TASK = "tokcom-generation"
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
SHORT = {"num_steps": 2, "num_chunks": 3, "num_generate_chunks": 2}


@pytest.fixture(scope="module", params=["documented", "context"])
def parts(request):
    """A model without or with a context, and its tokenizer."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 4, 280)
    torch.manual_seed(0)
    vae = {"vocab_size": len(tokenizer) + 1, "latent_size": 16, "fixed_norm": True, "chunk_projection": "all", **SHAPE}
    kind = {"clean_prefix": True}
    if request.param == "context":
        kind = {"context": SHAPE, "block_size": 1, "context_dropout": 0.1}
    config = TokComConfig(
        vae=vae, denoiser=SHAPE, standardize_latents=True, noise_std=1.0, eos_token_id=tokenizer.eos_token_id, **kind
    )
    model = TokComModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model, tokenizer


@pytest.fixture(scope="module")
def pipe(parts):
    model, tokenizer = parts
    return pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", **SHORT)


def test_nothing_a_string_and_a_list(pipe):
    nothing, one, many = pipe(seed=0), pipe("the fox", seed=0), pipe(["the fox", "a lazy brown dog"], seed=0)
    assert [set(row) for row in nothing] == [{"generated_text"}]
    assert one[0]["generated_text"].startswith("the fox")
    assert len(many) == 2 and all(len(row) == 1 for row in many)
    assert many[1][0]["generated_text"].startswith("a lazy brown dog")
    assert pipe([]) == []
    assert pipe(iter(["the fox"]), seed=0) == pipe(("the fox",), seed=0) == [one]


def test_the_model_is_called_once_for_a_list_and_per_batch_with_batch_size(pipe, monkeypatch):
    shapes = []
    generate = type(pipe.model).generate

    def spy(self, input_ids=None, **options):
        shapes.append(None if input_ids is None else len(input_ids))
        return generate(self, input_ids, **options)

    monkeypatch.setattr(type(pipe.model), "generate", spy)
    prompts = ["the", "quick", "brown fox"]
    pipe(prompts)
    pipe(prompts, batch_size=2)
    pipe(prompts, num_return_sequences=2)
    pipe()
    # A prompt is read once for all that is written after it.
    assert shapes == [3, 2, 1, 3, None]


def test_a_list_gives_what_generate_gives_for_the_padded_batch(pipe, parts):
    model, tokenizer = parts
    prompts = ["the fox", "a lazy brown dog"]
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    width = max(map(len, rows))
    # The pipeline pads on the left; what stands in the padding does not matter, nor on which side it is.
    ids = torch.tensor([row + [3] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(5)
    expected = model.generate(ids, attention_mask=mask, generator=generator, num_steps=2, num_generate_chunks=2)
    texts = [row[0]["generated_text"] for row in pipe(prompts, seed=5)]
    written = [row + new for row, new in zip(rows, expected[:, width:].tolist())]
    assert texts == tokenizer.batch_decode(written, skip_special_tokens=True)


def test_seeds_and_the_global_seed_make_output_reproducible(pipe):
    assert pipe(seed=1) == pipe(seed=1) != pipe(seed=2)
    set_seed(3)
    first = pipe()
    second = pipe()
    set_seed(3)
    assert pipe() == first != second
    generator = torch.Generator().manual_seed(1)
    assert pipe(generator=generator) == pipe(seed=1)
    # Batches of one call must not repeat each other's noise.
    same = pipe(["the fox", "the fox"], batch_size=1, seed=1)
    assert same[0] != same[1]


def test_several_sequences_per_prompt_and_the_continuation_alone(pipe):
    whole = pipe(["the fox", "a dog"], seed=0, num_return_sequences=3)
    rest = pipe(["the fox", "a dog"], seed=0, num_return_sequences=3, return_full_text=False)
    assert [len(rows) for rows in whole] == [3, 3] and len(pipe(num_return_sequences=3)) == 3
    for prompt, full, short in zip(["the fox", "a dog"], whole, rest):
        assert [prompt + row["generated_text"] for row in short] == [row["generated_text"] for row in full]
    assert len({row["generated_text"] for row in whole[0]}) > 1
    config = GenerationConfig(num_return_sequences=3, do_sample=True)
    assert [len(rows) for rows in pipe(["the fox", "a dog"], seed=0, generation_config=config)] == [3, 3]


def test_options_of_generation_act(pipe):
    context = pipe.model.context is not None
    plain = pipe("the fox", seed=0)
    assert pipe("the fox", seed=0, best_of=1, guidance_scale=1.0) == plain
    changed = [{"num_steps": 3}, {"sampler": "heun"}, {"temperature": 2.0}]
    if context:
        changed += [{"block_size": 0}, {"guidance_scale": 3.0}]
    for options in changed:
        assert pipe("the fox", seed=0, **options) != plain, options
    several = [[pipe("the fox", seed=seed, best_of=draws) for seed in range(4)] for draws in (1, 4)]
    assert several[0] != several[1]
    assert pipe("the fox", temperature=0.0) == pipe("the fox", do_sample=False, seed=3) != plain
    if not context:
        with pytest.raises(ValueError, match="in a model with a context"):
            pipe("the fox", block_size=1)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, ValueError, "makes no token"),
        (["the fox", ""], {}, ValueError, "makes no token"),
        (3, {}, TypeError, "takes one input or a list of them, got int"),
        (["the fox", None], {}, TypeError, "must be strings"),
        ("the fox", {"num_stpes": 3}, TypeError, "Unknown argument 'num_stpes'"),
        ("the fox", {"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ("the fox", {"num_generate_chunks": 0}, ValueError, "at least 1"),
        ("the fox", {"num_return_sequences": 0}, ValueError, "num_return_sequences"),
        ("the fox", {"sampler": "magic"}, ValueError, "sampler must be one of"),
        ("the fox", {"posterior_temperature": 0.5}, TypeError, "Unknown argument 'posterior_temperature'"),
        ("the fox", {"temperature": 0.0, "num_return_sequences": 2}, ValueError, "At temperature 0"),
    ],
)
def test_bad_calls_say_what_is_wrong(pipe, prompt, options, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt, **options)


def test_another_tokenizer_is_refused(parts):
    other = train_tokenizer(["the quick brown fox"], 270)
    with pytest.raises(ValueError, match="tokens but the model was trained with 280"):
        pipeline(TASK, model=parts[0], tokenizer=other, device="cpu")


@pytest.mark.slow
def test_a_saved_pipeline_runs_where_the_package_is_not_installed(pipe, tmp_path):
    assert pipe.model.__class__.__module__.startswith(tokcom_hf.__name__)
    pipe.save_pretrained(tmp_path / "first")
    code = f"""
import sys
sys.modules["tokcom_hf"] = None
from transformers import pipeline
pipe = pipeline({TASK!r}, model={str(tmp_path / "first")!r}, trust_remote_code=True, device="cpu")
pipe.save_pretrained({str(tmp_path / "second")!r})
again = pipeline(model={str(tmp_path / "second")!r}, trust_remote_code=True, device="cpu")
for one in (pipe, again):
    short = dict(seed=7, num_steps=2, num_chunks=3, num_generate_chunks=2)
    print(repr([one(**short), one(["the fox", "dog"], **short)]))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = repr([pipe(seed=7), pipe(["the fox", "dog"], seed=7)])
    assert result.stdout.splitlines() == [expected, expected]


def test_every_argument_of_generate_can_be_given():
    own = set(inspect.signature(TokComModel.generate).parameters)
    own -= {"self", "input_ids", "attention_mask", "batch_size", "return_dict_in_generate"}
    assert set(FORWARD_ARGUMENTS) == own
