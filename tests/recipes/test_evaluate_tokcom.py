"""The baseline, the evaluation, the speed benchmark and the ablations, end to end at toy size on a saved tiny model."""

import inspect
import json
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
        context=dict(shape),
        eos_token_id=tokenizer.eos_token_id,
        max_chunks=8,
        noise_std=1.0,
        mse_weight=1.0,
        context_dropout=0.1,
        block_sizes=[1, 2, 0],
        block_size=1,
        num_steps=2,
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
    parts = [budget["tokcom"][f"{part}_flops"] for part in ("vae", "denoiser")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(budget["tokcom"]["flops"])
    assert budget["tokcom"]["encode_flops"] == budget["tokcom"]["distilled_flops"] == 0


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
    once = tokcom_budget(folder, model, rows, draws=2)
    (folder / "results.json").write_text(json.dumps({"rows": 3 * len(rows)}))
    thrice = tokcom_budget(folder, model, rows, draws=2)
    for name in ("tokens", "vae_flops", "denoiser_flops", "flops"):
        assert thrice[name] == pytest.approx(3 * once[name])
    assert once["tokens"] == pytest.approx(0.06 * len(rows) * 32)


def test_the_budget_counts_every_stage(tmp_path, tokcom, corpus):
    rows = load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train
    folder = tmp_path / "stages"
    shutil.copytree(tokcom, folder)
    model = TokComModel.from_pretrained(folder)
    both = tokcom_budget(folder, model, rows, draws=4)
    assert both["parameters"] == sum(p.numel() for p in model.parameters())
    # Three stages where the distilled model is asked for; its student takes one step.
    checkpoint = folder / "distilled" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": 0.01}))
    model.config.num_steps = 1
    all_three = tokcom_budget(folder / "distilled", model, rows, draws=4)
    assert all_three["distilled_tokens"] == pytest.approx(0.01 * len(rows) * 32)
    assert all_three["distilled_flops"] > 0
    assert all_three["flops"] == pytest.approx(both["flops"] + all_three["distilled_flops"])
    assert tokcom_budget(folder, model, rows, draws=4)["flops"] == pytest.approx(both["flops"])
    shutil.rmtree(folder / "denoiser" / "checkpoint-7")
    with pytest.raises(FileNotFoundError, match="No complete checkpoint in"):
        tokcom_budget(folder, model, rows)


def test_without_a_context_the_corpus_is_encoded_once(tmp_path, tokcom, corpus):
    rows = load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train
    folder = tmp_path / "documented"
    shutil.copytree(tokcom, folder)
    values = TokComConfig.from_pretrained(tokcom).to_dict()
    values |= {"context": None, "block_sizes": [0], "block_size": 0, "context_dropout": 0.0}
    values["denoiser"] |= {"context_size": None}
    found = tokcom_budget(folder, TokComModel(TokComConfig.from_dict(values)), rows, draws=2)
    # A training step costs more than one forward pass of the encoder over the same tokens.
    assert found["vae_flops"] / found["vae_tokens"] > 2 * found["encode_flops"] / (len(rows) * 32) > 0


@pytest.mark.slow
def test_the_evaluation_prints_and_writes_every_row(tmp_path, tokcom, baseline, corpus, capsys):
    out = tmp_path / "evaluation"
    call("evaluate_tokcom.py", "--model", tokcom, "--train_file", corpus, "--baselines", baseline, "--output_dir", out,
         "--num_samples", 6, "--frontier_samples", 5, "--num_prefixes", 10, "--prefix_length", 8, "--frontier_steps", 1, 8,
         32, "--frontier_temperatures", 0, 1, "--frontier_best_of", 2, "--frontier_guidance", 2, "--draws", 3,
         "--block_sizes", 1, 0, "--seeds", 0, 1, "--accuracy_rows", 4, "--judge_model", baseline)  # fmt: skip
    result = json.loads((out / "evaluation.json").read_text())
    assert list(result["rows"]) == [
        "held-out text", "unigram", "Kneser-Ney 5-gram", "shuffled train chunks", "heads alone", "TokCom, noise removed",
        "TokCom, one step", "TokCom, 2 steps", "TokCom, block 1", "TokCom, block all", "autoregressive ar (equal compute)",
    ]  # fmt: skip
    held_out, unigram = (result["rows"][name]["kn_perplexity"]["mean"] for name in ("held-out text", "unigram"))
    assert held_out < unigram
    # One end of the dial is the model's own row: same seeds, same model, same settings.
    own, dial, other = (
        result["rows"][name]["entropy"] for name in ("TokCom, 2 steps", "TokCom, block 1", "TokCom, block all")
    )
    assert own == dial != other
    # Controls: without noise one text, with it as many as rows; a VAE that was not trained; a judge for every row.
    distinct = {name: row.get("distinct_rows", {}).get("mean") for name, row in result["rows"].items()}
    assert distinct["TokCom, noise removed"] == 1 and distinct["TokCom, 2 steps"] == 6
    assert 0 <= result["reconstruction"]["untrained_token_accuracy"] < 0.2
    assert all(row["judge_perplexity"]["mean"] > 1 for row in result["rows"].values())
    found = result["brier_lm_differences"]
    assert set(found) == {"heads alone", "autoregressive ar (equal compute)"}
    assert found["heads alone"]["brier_2_low"] <= found["heads alone"]["brier_2_difference"]
    assert len(result["nats_per_token"]["TokCom's heads"]) == 4
    # 3 numbers of steps at 2 temperatures, guidance at both, best_of where there is noise.
    assert len(result["frontier"]["TokCom"]) == 9 and len(result["frontier"]["autoregressive ar (equal compute)"]) == 4
    assert set(result["comparisons"]["steps"]) == {"temperature 0", "temperature 1"}
    for name in ("accuracy_against_noise.png", "denoising.png", "frontier.png", "samples.txt"):
        assert (out / name).stat().st_size > 500
    printed = capsys.readouterr().out
    assert "TokCom minus heads alone: BrierLM" in printed and "8 steps / 32 steps at temperature 0" in printed


@pytest.mark.slow
def test_the_documented_model_is_evaluated_as_one_block(tmp_path, tokcom, corpus):
    values = TokComConfig.from_pretrained(tokcom).to_dict()
    values |= {"context": None, "block_sizes": [0], "block_size": 0, "context_dropout": 0.0}
    values["denoiser"] |= {"context_size": None}
    folder, out = tmp_path / "documented", tmp_path / "evaluation"
    TokComModel(TokComConfig.from_dict(values)).save_pretrained(folder)
    for file in tokcom.glob("token*"):
        shutil.copy(file, folder)
    arguments = ("--model", folder, "--train_file", corpus, "--output_dir", out)
    call("evaluate_tokcom.py", *arguments, "--num_samples", 5, "--frontier_samples", 5, "--num_prefixes", 5, "--seeds", 0,
         "--prefix_length", 8, "--draws", 2, "--frontier_steps", 1, "--frontier_temperatures", 1,
         "--accuracy_rows", 4)  # fmt: skip
    result = json.loads((out / "evaluation.json").read_text())
    assert (
        "heads alone" not in result["rows"] and result["rows"]["TokCom, noise removed"]["distinct_rows"]["mean"] == 1
    )
    assert result["parameters"]["TokCom's context"] == 0 and result["nats_per_token"] == {}
    # No guidance: it was not trained for it.
    assert [point["guidance_scale"] for point in result["frontier"]["TokCom"]] == [1.0, 1.0]
    with pytest.raises(RecipeError, match="has no context: it denoises a row as one block"):
        call("evaluate_tokcom.py", *arguments, "--block_sizes", 4)


@pytest.mark.slow
def test_speed_and_quality_stand_side_by_side(tmp_path, tokcom, baseline, corpus):
    threads = torch.get_num_threads()
    try:
        call("benchmarks/generation_speed.py", "--model", tokcom, "--baseline", baseline, "--train_file", corpus,
             "--tokens", 32, "--batch_sizes", 2, "--num_steps", 2, "--block_sizes", 0, 4, "--repeats", 3,
             "--num_prefixes", 6, "--prefix_length", 8, "--draws", 2, "--output_dir", tmp_path)  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "generation_speed.json").read_text())
    rows = result["rows"]
    assert result["threads"] == 1
    assert [row["block_size"] for row in rows] == [0, 4]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["autoregressive seconds"] / row["TokCom seconds"])
        assert row["TokCom kn_perplexity_held_out"] > 1 and row["autoregressive entropy"] > 0
        assert row["TokCom tokens/s"] == pytest.approx(64 / row["TokCom seconds"]) and "TokCom brier_lm" in row


@pytest.mark.slow
def test_brier_lm_of_all_kinds_on_the_same_prefixes(tmp_path, tokcom, baseline, corpus, capsys):
    torch.manual_seed(1)
    other = tmp_path / "other"
    TokComModel(TokComConfig.from_pretrained(tokcom)).save_pretrained(other)
    out = tmp_path / "brier"
    arguments = ("--train_file", corpus, "--prefix_length", 8)
    call("benchmarks/brier_lm.py", "--models", tokcom, other, "--baselines", baseline, "--output_dir", out,
         "--prefixes", 40, "--draws", 3, *arguments)  # fmt: skip
    result = json.loads((out / "brier_lm.json").read_text())
    heads = f"{tokcom}, heads alone"
    assert list(result["rows"]) == [str(tokcom), heads, str(other), f"{other}, heads alone", str(baseline)]
    for row in result["rows"].values():
        assert row["prefixes"] == 40 and 4 < row["next_token_nats"] < 7 and row["brier_1"] < 100
    differences = result["differences"]
    assert set(differences) == {
        f"{tokcom} minus {heads}", f"{other} minus {other}, heads alone", f"{tokcom} minus {baseline}",
        f"{other} minus {baseline}", "TokCom minus heads alone, seeds averaged",
        "TokCom minus autoregressive, seeds averaged",
    }  # fmt: skip
    ours, theirs = result["rows"][str(tokcom)], result["rows"][heads]
    found = differences[f"{tokcom} minus {heads}"]
    assert found["brier_1_difference"] == pytest.approx(ours["brier_1"] - theirs["brier_1"])
    assert found["brier_1_low"] <= found["brier_1_difference"] <= found["brier_1_high"]
    mean = differences["TokCom minus autoregressive, seeds averaged"]["brier_1_difference"]
    each = [differences[f"{folder} minus {baseline}"]["brier_1_difference"] for folder in (tokcom, other)]
    assert mean == pytest.approx(sum(each) / 2)
    assert (out / "brier_lm.png").stat().st_size > 5000
    assert "BrierLM" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="not a TokCom model"):
        call("benchmarks/brier_lm.py", "--models", baseline, "--output_dir", out, *arguments)
    with pytest.raises(RecipeError, match="must be at least 2, got 40 and 1"):
        call("benchmarks/brier_lm.py", "--models", tokcom, "--prefixes", 40, "--draws", 1, *arguments)


@pytest.mark.slow
def test_nats_by_place_of_every_sampler(tmp_path, tokcom, baseline, corpus, capsys):
    arguments = ("--train_file", corpus, "--prefix_length", 8, "--output_dir", tmp_path)
    call("benchmarks/nats_by_place.py", "--models", tokcom, "--judges", baseline, "--num_steps", 2, 1, "--prefixes", 30,
         "--draws", 3, *arguments)  # fmt: skip
    rows = json.loads((tmp_path / "nats_by_place.json").read_text())["rows"]
    assert list(rows) == [
        "held-out text", f"{tokcom}, 2 steps", f"{tokcom}, 1 step", f"{tokcom}, heads alone", f"{tokcom}, context alone",
        str(baseline),
    ]  # fmt: skip
    for name, row in rows.items():
        own = name.startswith(str(tokcom))
        assert ("excess" in row) == own and all(len(row[key]) == 4 for key in ("excess", "hits_error") if own)
    for row in rows.values():
        assert len(row["nats_by_place"]) == 4 and row["prefixes"] == 30
        assert sum(row["nats_by_place"]) / 4 == pytest.approx(row["nats"]) == row["nats_by_judge"][str(baseline)]
    # The judge has seen this text for a few steps; untrained heads draw from all tokens alike.
    assert rows["held-out text"]["nats"] < rows[str(baseline)]["nats"] < rows[f"{tokcom}, heads alone"]["nats"]
    assert rows["held-out text"]["entropy"] < rows[f"{tokcom}, heads alone"]["entropy"]
    assert "token 4" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="--judges one causal language model"):
        call("benchmarks/nats_by_place.py", "--models", tokcom, *arguments)
    with pytest.raises(RecipeError, match="not a TokCom model"):
        call("benchmarks/nats_by_place.py", "--models", baseline, "--judges", baseline, *arguments)
    with pytest.raises(RecipeError, match="must share the tokenizer"):
        other = tmp_path / "other"
        values = TokComConfig.from_pretrained(tokcom).to_dict()
        values["vae"]["vocab_size"] = values["context"]["vocab_size"] = 100
        values["vae"].pop("omni_token_id", None)
        TokComModel(TokComConfig.from_dict(values)).save_pretrained(other)
        call("benchmarks/nats_by_place.py", "--models", tokcom, other, "--judges", baseline, *arguments)


@pytest.mark.slow
def test_ablations_train_what_changed_and_reuse_the_rest(tmp_path, corpus, capsys):
    config = tmp_path / "rows.yaml"
    config.write_text(f"""
run:
  train_config: {RECIPES / "configs/tiny/train_tokcom.yaml"}
  start: {{vae.hidden_size: 32, vae.intermediate_size: 64, vae.latent_size: 16, vae.num_hidden_layers: 1,
    denoiser.hidden_size: 32, denoiser.intermediate_size: 64, denoiser.num_hidden_layers: 1, context.hidden_size: 32,
    context.intermediate_size: 64, context.num_hidden_layers: 1, run.length: 32, run.tokenizer_vocab_size: 300,
    run.threads: 1, max_steps: 2, save_steps: 2, eval_steps: 2, per_device_train_batch_size: 2, metric_rows: 2,
    sample_chunks: 2, sample_steps: 1, sample_every: 0, use_cpu: true}}
  num_samples: 5
  seeds: [0, 1]
  num_prefixes: 6
  draws: 2
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
    key = "token_accuracy_sigma_0.7"
    assert table["start"]["accuracies"]["next_token_nats"] > 0
    assert table["noise"]["accuracies"][key] == table["start"]["accuracies"][key]
    assert json.loads((tmp_path / "out" / "noise" / "config.json").read_text())["noise_std"] == 2.0
    assert table["renoise"]["accuracies"] == table["start"]["accuracies"]
    capsys.readouterr()
    call("benchmarks/tokcom_ablations.py", *arguments)
    assert "training" not in capsys.readouterr().out


def test_an_ablation_row_of_another_configuration_is_trained_whole_with_the_starting_rows_tokenizer(tmp_path):
    recipe = runpy.run_path(str(RECIPES / "benchmarks" / "tokcom_ablations.py"), run_name="recipe")
    commands = []
    run = lambda command, **options: commands.append(command) or SimpleNamespace(returncode=0)  # noqa: E731
    recipe["train"].__globals__["subprocess"] = SimpleNamespace(run=run, STDOUT=None)
    row = {"name": "other", "config": "other.yaml", "train": {"run.dataset_name": None, "flow.block_sizes": [1, 4]}}
    folder = recipe["train"](row, recipe["RunArguments"](start={"save": True}), TextSource(), tmp_path)
    flags = " ".join(commands[0])
    assert folder == tmp_path / "other" and "--config other.yaml" in flags and "--run.stage both" in flags
    assert f"--run.tokenizer {tmp_path / 'start'}" in flags
    assert "--save true" in flags and "--run.dataset_name none" in flags and "--flow.block_sizes 1 4" in flags


def test_every_ablation_row_names_options_that_exist():
    """Overrides must parse for train_tokcom, build its configs, and be arguments of `generate`."""
    training = runpy.run_path(str(RECIPES / "train_tokcom.py"), run_name="recipe")
    ablations = read_yaml((RECIPES / "configs" / "tiny" / "tokcom_ablations.yaml").read_text())["run"]
    start = "recipes/configs/tiny/train_tokcom.yaml"
    names = [row["name"] for row in ablations["rows"]]
    assert len(names) == len(set(names)) >= 20
    known = set(inspect.signature(TokComModel.generate).parameters)
    for row in [{"name": "start"}, *ablations["rows"]]:
        assert set(row) <= {"name", "config", "train", "model", "generate"}
        if "model" in row:
            # An earlier row's, with nothing to train.
            assert row["model"] in names[: names.index(row["name"])] and "train" not in row
        assert set(ablations.get("generate", {}) | row.get("generate", {})) <= known, row["name"]
        overrides = ablations["start"] | row.get("train", {})
        flags = [text for key, value in overrides.items() for text in (f"--{key}", str(value).lower())]
        values = parse_recipe("", training["SECTIONS"], RECIPES.parent / row.get("config", start), flags)
        vae = TokComConfig().vae.__class__(**values["vae"])
        parts = {"vae": vae.to_dict(), "denoiser": values["denoiser"], "context": values["context"] or None}
        config = TokComConfig(**values["flow"] | parts)
        # The documented system has none; the rows of its own configuration change one thing of it.
        assert (config.context is None) == ("paper" in row.get("config", "")), row["name"]


def test_a_validation_file_of_its_own(tmp_path, tokcom, corpus):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(["zebra"] * 300))
    rows = load_source(TextSource(train_file=str(corpus), validation_file=str(other)), 32, str(tokcom))
    assert "zebra zebra" in rows.tokenizer.decode(full_rows(rows.validation)[1])
    assert len(rows.train) > len(load_source(TextSource(train_file=str(corpus)), 32, str(tokcom)).train)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        other.write_text("zebra")
        full_rows(
            load_source(TextSource(train_file=str(corpus), validation_file=str(other)), 32, str(tokcom)).validation
        )


def test_bad_input_is_one_sentence(tmp_path, tokcom, corpus):
    with pytest.raises(RecipeError, match="multiple of the chunk size 4, got 6"):
        call("evaluate_tokcom.py", "--model", tokcom, "--train_file", corpus, "--prefix_length", 6)
    with pytest.raises(RecipeError, match=r"two draws, got \[0, 1, 2\] and 1"):
        call("evaluate_tokcom.py", "--model", tokcom, "--train_file", corpus, "--draws", 1)
    with pytest.raises(RecipeError, match="compute or tokens, got 'time'"):
        call("train_ar_baseline.py", "--match_tokcom", tokcom, "--budget", "time")
    with pytest.raises(RecipeError, match="Give --match_tokcom FOLDER"):
        call("train_ar_baseline.py", "--parameters", 100_000)
    with pytest.raises(RecipeError, match="No ablation row nothing"):
        call("benchmarks/tokcom_ablations.py", "--only", "nothing", "--output_dir", tmp_path)
    (tokcom / "empty").mkdir(exist_ok=True)
    with pytest.raises(RecipeError, match="No trained model in"):
        call("evaluate_tokcom.py", "--model", tokcom / "empty", "--train_file", corpus)
