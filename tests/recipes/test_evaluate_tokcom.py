"""The baseline, the evaluation, the speed benchmark and the ablations, end to end at toy size on a saved tiny model."""

import inspect
import json
import math
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tokcom_hf import TokComConfig, TokComModel
from tokcom_hf.cli import RecipeError, parse_recipe, read_yaml
from tokcom_hf.data.text_evaluation import TextSource, full_rows, load_source
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.trainers.tokcom_budget import tokcom_budget

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = [
    "the",
    "a",
    "quick",
    "brown",
    "fox",
    "dog",
    "jumps",
    "over",
    "runs",
    "under",
    "lazy",
    "red",
    "old",
    "new",
    "house",
]


def call(recipe: str, *arguments: str) -> None:
    """Runs a recipe's main() in this process."""
    before = sys.argv
    sys.argv = [recipe, *map(str, arguments)]
    try:
        runpy.run_path(str(RECIPES / recipe), run_name="recipe")["main"]()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n\n\n".join(" ".join(generator.choice(WORDS) for _ in range(60)) for _ in range(200)))
    return file


@pytest.fixture(scope="module")
def tokcom(tmp_path_factory, corpus) -> Path:
    """An untrained TokCom folder with tokenizer and the trainer states that a training run leaves."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokcom")
    tokenizer = train_tokenizer([corpus.read_text()], 300)
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64,
    }  # fmt: skip
    config = TokComConfig(
        vae=shape | {"vocab_size": len(tokenizer) + 1, "latent_size": 8},
        denoiser=shape | {"self_conditioning": True},
        eos_token_id=tokenizer.eos_token_id,
        max_chunks=8,
        clean_prefix=True,
        mse_weight=1.0,
    )
    TokComModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for stage, epochs in (("vae", 0.02), ("denoiser", 0.04)):
        checkpoint = folder / stage / "checkpoint-7"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": epochs}))
    return folder


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, corpus, tokcom) -> Path:
    out = tmp_path_factory.mktemp("baseline") / "ar"
    call("train_ar_baseline.py", "--match_tokcom", tokcom, "--train_file", corpus, "--output_dir", out, "--head_dim", 8,
         "--per_device_train_batch_size", 2, "--use_cpu", "true", "--report_to", "none")  # fmt: skip
    return out


@pytest.mark.slow
def test_the_baseline_matches_size_and_compute(baseline, tokcom, corpus):
    budget = json.loads((baseline / "budget.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(baseline)
    assert budget["parameters"] == model.num_parameters() == pytest.approx(budget["tokcom"]["parameters"], rel=0.02)
    # Equal compute to within half a step.
    assert budget["flops"] == pytest.approx(budget["tokcom"]["flops"], abs=0.51 * budget["flops"] / budget["steps"])
    rows = len(load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train)
    assert budget["tokcom"]["vae_tokens"] == pytest.approx(0.02 * rows * 32)
    assert budget["tokcom"]["tokens"] == pytest.approx(0.06 * rows * 32)
    parts = [budget["tokcom"][f"{part}_flops"] for part in ("vae", "encode", "denoiser")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(budget["tokcom"]["flops"])
    # Two stages of training on these tokens cost more than one forward pass of the encoder over the same ones would.
    assert parts[0] / budget["tokcom"]["vae_tokens"] > 2 * parts[1] / (rows * 32)


@pytest.mark.slow
def test_equal_tokens_means_equal_tokens(tmp_path, tokcom, corpus):
    out = tmp_path / "ar"
    call("train_ar_baseline.py", "--match_tokcom", tokcom, "--budget", "tokens", "--train_file", corpus, "--output_dir", out,
         "--head_dim", 8, "--per_device_train_batch_size", 2, "--use_cpu", "true", "--report_to", "none")  # fmt: skip
    budget = json.loads((out / "budget.json").read_text())
    assert budget["tokens"] == pytest.approx(budget["tokcom"]["tokens"], abs=32)


def test_an_epoch_of_text_given_several_times_has_so_many_rows(tmp_path, tokcom, corpus):
    rows = load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train
    model = TokComModel.from_pretrained(tokcom)
    folder = tmp_path / "copies"
    shutil.copytree(tokcom, folder)
    torch.manual_seed(0)  # self-conditioning is drawn
    once = tokcom_budget(folder, model, rows, draws=1)
    (folder / "results.json").write_text(json.dumps({"rows": 3 * len(rows)}))
    torch.manual_seed(0)
    thrice = tokcom_budget(folder, model, rows, draws=1)
    for name in ("tokens", "vae_flops", "encode_flops", "denoiser_flops"):
        assert thrice[name] == pytest.approx(3 * once[name])
    assert once["tokens"] == pytest.approx(0.06 * len(rows) * 32)


@pytest.mark.slow
def test_the_evaluation_prints_and_writes_every_row(tmp_path, tokcom, baseline, corpus, capsys):
    out = tmp_path / "evaluation"
    call("evaluate_tokcom.py", "--model", tokcom, "--train_file", corpus, "--baselines", baseline, "--output_dir", out,
         "--num_samples", 6, "--frontier_samples", 5, "--num_prefixes", 10, "--prefix_length", 8, "--frontier_steps", 1, 16,
         50, "--block_sizes", 2, 0, "--seeds", 0, 1, "--accuracy_rows", 4)  # fmt: skip
    result = json.loads((out / "evaluation.json").read_text())
    assert list(result["rows"]) == [
        "held-out text", "unigram", "Kneser-Ney 5-gram", "shuffled train chunks", "TokCom, one step", "TokCom, 16 steps",
        "TokCom, block 2", "TokCom, block all", "autoregressive ar (equal compute)",
    ]  # fmt: skip
    held_out, unigram = (result["rows"][name]["kn_perplexity"]["mean"] for name in ("held-out text", "unigram"))
    assert held_out < unigram
    # The dial's end is the parallel row itself: same seeds, same model, same settings.
    parallel, dial = (result["rows"][name]["entropy"] for name in ("TokCom, 16 steps", "TokCom, block all"))
    assert parallel == dial
    assert len(result["frontier"]["TokCom"]) == 6 and len(result["frontier"]["autoregressive ar (equal compute)"]) == 4
    assert set(result["comparisons"]["steps"]) == {"temperature 0", "temperature 1"}
    for name in ("accuracy_against_noise.png", "denoising.png", "frontier.png", "samples.txt"):
        assert (out / name).stat().st_size > 500
    printed = capsys.readouterr().out
    assert "BrierLM" in printed and "16 steps / 50 steps at temperature 0" in printed


@pytest.mark.slow
def test_speed_and_quality_stand_side_by_side(tmp_path, tokcom, baseline, corpus):
    call("benchmarks/generation_speed.py", "--model", tokcom, "--baseline", baseline, "--train_file", corpus, "--tokens", 32,
         "--batch_sizes", 2, "--num_steps", 2, "--block_sizes", 0, 4, "--repeats", 3, "--output_dir", tmp_path)  # fmt: skip
    rows = json.loads((tmp_path / "generation_speed.json").read_text())["rows"]
    assert [row["block_size"] for row in rows] == [0, 4]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["autoregressive seconds"] / row["TokCom seconds"])
        assert row["TokCom kn_perplexity_held_out"] > 1 and row["autoregressive entropy"] > 0


@pytest.mark.slow
def test_brier_lm_of_both_kinds_on_the_same_prefixes(tmp_path, tokcom, baseline, corpus, capsys):
    """A TokCom that writes token after token; `evaluate_tokcom.py` finds the same numbers from the same draws."""
    torch.manual_seed(1)
    values = TokComConfig.from_pretrained(tokcom).to_dict()
    values["vae"] |= {"encoder": "embedding"}
    values["denoiser"] |= {"self_conditioning": False, "attention": "block_causal"}
    values |= {
        "clean_latents": "posterior_mean", "noise_likelihood": True, "scale_input": True, "token_time_std": 1.0,
        "sampler": "commit", "block_size": 1, "mse_weight": 0.0, "standardize_latents": True,
    }  # fmt: skip
    config = TokComConfig.from_dict(values)
    folder = tmp_path / "one_by_one"
    TokComModel(config).save_pretrained(folder)
    for file in tokcom.glob("token*"):
        shutil.copy(file, folder)
    out = tmp_path / "brier"
    arguments = ("--train_file", corpus, "--prefix_length", 8)
    call("benchmarks/brier_lm.py", "--models", folder, folder, "--baselines", baseline, "--output_dir", out,
         "--prefixes", 40, "--draws", 2, "--temperatures", 1, 1.5, *arguments)  # fmt: skip
    result = json.loads((out / "brier_lm.json").read_text())
    assert set(result["rows"]) == {str(folder), f"{folder} at 1.5", str(baseline)}
    # An untrained model's loss is that of a guess, more so where it is flattened.
    hot, usual = (result["rows"][name]["next_token_loss"] for name in (f"{folder} at 1.5", str(folder)))
    assert abs(hot - math.log(300)) < abs(usual - math.log(300)) and hot != usual
    for row in result["rows"].values():
        assert row["prefixes"] == 40 and 4 < row["next_token_loss"] < 7 and row["brier_1"] < 100
    ours, theirs = result["rows"][str(folder)], result["rows"][str(baseline)]
    found = result["differences"][f"{folder} minus {baseline}"]
    assert found["difference"] == pytest.approx(ours["brier_lm"] - theirs["brier_lm"])
    assert (out / "brier_lm.png").stat().st_size > 5000
    assert "BrierLM" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="cannot write token after token"):
        call("benchmarks/brier_lm.py", "--models", tokcom, "--output_dir", out, *arguments)
    with pytest.raises(RecipeError, match="not a TokCom model"):
        call("benchmarks/brier_lm.py", "--models", baseline, "--output_dir", out, *arguments)


def test_ablations_train_what_changed_and_reuse_the_rest(tmp_path, corpus, capsys):
    config = tmp_path / "rows.yaml"
    config.write_text(f"""
run:
  train_config: {RECIPES / "configs/latent/train_tokcom.yaml"}
  start: {{vae.hidden_size: 32, vae.intermediate_size: 64, vae.latent_size: 16, denoiser.hidden_size: 32,
    denoiser.intermediate_size: 64, denoiser.num_hidden_layers: 1, run.length: 32, run.tokenizer_vocab_size: 300,
    max_steps: 2, save_steps: 2, eval_steps: 2, per_device_train_batch_size: 2, metric_rows: 2, sample_chunks: 2,
    sample_steps: 1, sample_every: 0, use_cpu: true}}
  num_samples: 5
  seeds: [0, 1]
  num_prefixes: 6
  generate: {{num_steps: 2}}
  rows:
    - {{name: noise, train: {{flow.noise_std: 2.0}}}}
    - {{name: renoise, generate: {{sampler: renoise}}}}
""")
    arguments = ("--config", config, "--train_file", corpus, "--output_dir", tmp_path / "out")
    call("benchmarks/tokcom_ablations.py", *arguments)
    table = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert list(table) == ["start", "noise", "renoise"]
    assert not (tmp_path / "out" / "renoise").exists()
    # Same VAE, other flow.
    key = "token_accuracy_sigma_0.5"
    assert table["noise"]["accuracies"][key] == table["start"]["accuracies"][key]
    assert json.loads((tmp_path / "out" / "noise" / "config.json").read_text())["noise_std"] == 2.0
    assert table["renoise"]["accuracies"] == table["start"]["accuracies"]
    capsys.readouterr()
    call("benchmarks/tokcom_ablations.py", *arguments)
    assert "training" not in capsys.readouterr().out


@pytest.mark.slow
def test_compression_rows_differ_in_chunk_size_alone(tmp_path, corpus, tokcom, capsys):
    options = [f"vae.{name}" for name in ("hidden_size=32", "intermediate_size=64", "latent_size=16")]
    options += ["use_cpu=true", "per_device_train_batch_size=4", "vae_training.save_steps=2"]
    call("benchmarks/vae_compression.py", "--train_file", corpus, "--chunk_sizes", 2, 8, "--tokenizers", tokcom,
         "--length", 32, "--max_steps", 2, "--output_dir", tmp_path, "--options", *options)  # fmt: skip
    table = json.loads((tmp_path / "vae_compression.json").read_text())
    assert [row["chunk_size"] for row in table.values()] == [2, 8]
    assert len({row["vocabulary"] for row in table.values()}) == 1
    for row in table.values():
        assert {"token_accuracy_sigma_0.5", "rare_token_accuracy", "random_token_accuracy"} <= set(row)
    assert (tmp_path / "accuracy_against_noise.png").stat().st_size > 1000
    with pytest.raises(RecipeError, match="got 32 and 5"):
        call("benchmarks/vae_compression.py", "--chunk_sizes", 5, "--length", 32, "--output_dir", tmp_path)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_every_ablation_row_names_options_that_exist(size):
    """Overrides must parse for train_tokcom, build its configs, and be arguments of `generate`."""
    training = runpy.run_path(str(RECIPES / "train_tokcom.py"), run_name="recipe")
    ablations = read_yaml((RECIPES / "configs" / size / "tokcom_ablations.yaml").read_text())["run"]
    assert (RECIPES.parent / ablations["train_config"]).is_file()
    names = [row["name"] for row in ablations["rows"]]
    assert len(names) == len(set(names)) >= 20
    known = set(inspect.signature(TokComModel.generate).parameters)
    for row in [{"name": "start"}, *ablations["rows"]]:
        assert set(row) <= {"name", "train", "model", "generate"}
        if "model" in row:
            # An earlier row's, with nothing to train.
            assert row["model"] in names[: names.index(row["name"])] and "train" not in row
        assert set(ablations["generate"] | row.get("generate", {})) <= known, row["name"]
        overrides = ablations["start"] | row.get("train", {})
        flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value).lower())]
        values = parse_recipe("", training["SECTIONS"], RECIPES.parent / ablations["train_config"], flags)
        vae = TokComConfig().vae.__class__(**values["vae"])
        TokComConfig(**values["flow"] | {"vae": vae.to_dict(), "denoiser": values["denoiser"]})


def test_a_validation_file_of_its_own(tmp_path, tokcom, corpus):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(["zebra"] * 300))
    rows = load_source(TextSource(train_file=str(corpus), validation_file=str(other)), 32, str(tokcom))
    assert "zebra zebra" in rows.tokenizer.decode(full_rows(rows.validation)[1])
    assert len(rows.train) > len(load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train)
    with pytest.raises(ValueError, match="two are needed"):
        other.write_text("zebra")
        full_rows(
            load_source(TextSource(train_file=str(corpus), validation_file=str(other)), 32, str(tokcom)).validation
        )


def test_bad_input_is_one_sentence(tmp_path, tokcom, corpus):
    with pytest.raises(RecipeError, match="multiple of the chunk size 4, got 6"):
        call("evaluate_tokcom.py", "--model", tokcom, "--train_file", corpus, "--prefix_length", 6)
    with pytest.raises(RecipeError, match="compute or tokens, got 'time'"):
        call("train_ar_baseline.py", "--match_tokcom", tokcom, "--budget", "time")
    with pytest.raises(RecipeError, match="Give --match_tokcom FOLDER"):
        call("train_ar_baseline.py", "--parameters", 100_000)
    with pytest.raises(RecipeError, match="No ablation row nothing"):
        call("benchmarks/tokcom_ablations.py", "--only", "nothing", "--output_dir", tmp_path)
    (tokcom / "empty").mkdir(exist_ok=True)
    with pytest.raises(RecipeError, match="No trained model in"):
        call("evaluate_tokcom.py", "--model", tokcom / "empty", "--train_file", corpus)


def test_temperature_is_the_posteriors_where_tokens_are_predicted():
    with_temperature = runpy.run_path(str(RECIPES / "evaluate_tokcom.py"))["with_temperature"]

    def setting(clean_latents: str, heat: float | None) -> dict[str, float]:
        return with_temperature(SimpleNamespace(config=SimpleNamespace(clean_latents=clean_latents)), heat)

    assert setting("posterior_mean", None) == {"posterior_temperature": 1.0}
    assert setting("posterior_mean", 0.9) == {"posterior_temperature": 0.9}
    assert setting("latent", None) == {"temperature": 0.0}
    assert setting("latent", 0.9) == {"temperature": 0.9}


def test_the_frontier_of_commit_measures_no_step_count_twice():
    recipe = runpy.run_path(str(RECIPES / "evaluate_tokcom.py"), run_name="recipe")
    grids = []
    recipe["frontiers"].__globals__["frontier"] = lambda make, grid, **arguments: grids.append(grid) or []
    run = recipe["RunArguments"](frontier_steps=[1, 2, 4, 8, 50], frontier_temperatures=[1.0], seeds=[0])
    vae = SimpleNamespace(chunk_size=4)
    for sampler, steps in (("commit", [1, 2, 4]), ("euler", [1, 2, 4, 8, 50])):
        model = SimpleNamespace(config=SimpleNamespace(sampler=sampler, clean_latents="posterior_mean", vae=vae))
        recipe["frontiers"](run, model, None, None, 16)
        assert [point["num_steps"] for point in grids.pop()] == steps
