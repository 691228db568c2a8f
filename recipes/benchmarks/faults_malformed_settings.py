"""Malformed configuration files and command lines, for the parser of all recipes and for every training recipe."""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults_malformed_check import Case, at_command_line

from tokcom_hf.cli import parse_recipe


@dataclass
class Settings:
    """One field of each type that recipes have."""

    number: int = 1
    rate: float = 0.1
    switch: bool = False
    name: str = "a"
    path: str | None = None
    limit: int | None = None
    layers: list[int] = field(default_factory=list)


SECTIONS = {"run": Settings}


def documents(canary: str) -> dict[str, bytes]:
    """File contents, by description, that are no configuration of `Settings`."""
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    texts = {
        "a list": "- run\n- number",
        "a text": "hello",
        "a number": "17",
        "true": "true",
        "a section that is a list": "run: [1, 2]",
        "a section that is a text": "run: fast",
        "a section that is a number": "run: 3",
        "an unknown section": "rnu:\n  number: 1",
        "an unknown option": "run:\n  nubmer: 1",
        "an option that is a number": "run:\n  1: 2",
        "a key that is a list": "run:\n  ? [a]\n  : 1",
        "a section of no name": "~:\n  number: 1",
        "a key twice": "run:\n  number: 1\n  number: 2",
        "a section twice": "run:\n  number: 1\nrun:\n  rate: 1.0",
        "a tab": "run:\n\tnumber: 1",
        "wrong indentation": "run:\n  number: 1\n rate: 2",
        "an open bracket": "run: {number: 1",
        "an open quote": "run:\n  name: 'a",
        "two documents": "run:\n  number: 1\n---\nrun:\n  number: 2",
        "an unknown alias": "run:\n  number: *missing",
        "an alias inside itself": "run: &a\n  path: *a",
        "a billion values": f"a0: &a0 x\n{laughs}\nrun:\n  name: *a11",
        "5000 open brackets": "run: " + "[" * 5000,
        "a text for a number": "run:\n  number: many",
        "a float for a whole number": "run:\n  number: 1.5",
        "true for a number": "run:\n  number: true",
        "a list for a number": "run:\n  number: [1]",
        "nothing for a number": "run:\n  number:",
        "a number with a zero in front": "run:\n  number: 010",
        "a time for a number": "run:\n  number: 1:30",
        "a number of 5000 digits for a rate": f"run:\n  rate: {'9' * 5000}",
        "a number of 400 digits for a rate": f"run:\n  rate: {'9' * 400}",
        "NaN": "run:\n  rate: .nan",
        "infinity": "run:\n  rate: -.inf",
        "a number that overflows": "run:\n  rate: 1e999",
        "a number for a switch": "run:\n  switch: 1",
        "yes for a switch": "run:\n  switch: yes",
        "a mapping for a text": "run:\n  name: {a: 1}",
        "a text for a list": "run:\n  layers: all",
        "texts in a list of numbers": "run:\n  layers: [a, b]",
        "a list in a list": "run:\n  layers: [[1]]",
        "a mapping for a list": "run:\n  layers: {a: 1}",
        "JSON lines": '{"run": {"number": 1}}\n{"run": {"number": 2}}',
        "a command": f'run:\n  name: !!python/object/apply:os.system ["touch {canary}"]',
        "a new object": f'run: !!python/object/new:os.system ["touch {canary}"]',
        "a module": "run:\n  name: !!python/module:os",
        "a name of Python": "run:\n  name: !!python/name:os.system",
        "a subprocess": f"run: !!python/object/apply:subprocess.check_output [[touch, {canary}]]",
        "an unknown tag": "run:\n  name: !secret a",
        "binary that is no base64": "run:\n  name: !!binary '*'",
    }
    bytes_of = {name: text.encode() for name, text in texts.items()}
    return bytes_of | {
        "UTF-16": "run:\n  number: 1".encode("utf-16"),
        "Latin-1": "run:\n  name: Größe".encode("latin-1"),
        "binary": bytes(range(256)),
        "zero bytes": bytes(100),
        "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    }


def command_lines(canary: str) -> dict[str, list[str]]:
    """Command lines, by description, that the parser of `Settings` must refuse."""
    return {
        "an unknown option": ["--nubmer", "1"],
        "an unknown section": ["--rnu.number", "1"],
        "a positional argument": ["number"],
        "one dash": ["-number", "1"],
        "two dashes alone": ["--"],
        "no name": ["--=3"],
        "a dot alone": ["--.", "3"],
        "a path of three": ["--run.number.more", "3"],
        "a text for a number": ["--number", "x"],
        "nothing for a number": ["--number"],
        "an empty number": ["--number="],
        "two numbers for one": ["--number", "1", "2"],
        "a float for a whole number": ["--number", "1.5"],
        "a number with a unit": ["--number", "3k"],
        "NaN": ["--rate", ".nan"],
        "infinity": ["--rate", ".inf"],
        "a word for NaN": ["--rate", "nan"],
        "a number that overflows": ["--rate", "1e999"],
        "maybe for a switch": ["--switch", "maybe"],
        "a list for a switch": ["--switch", "[true]"],
        "a text in a list of numbers": ["--layers", "1", "b"],
        "broken YAML": ["--number", "[1"],
        "broken YAML in a list": ["--layers", "1", "{"],
        "a tag": ["--number", f"!!python/object/apply:os.system ['touch {canary}']"],
        "deep brackets": ["--number", "[" * 5000],
        "a missing configuration": ["--config", "missing.yaml"],
        "a folder as configuration": ["--config", "."],
        "no configuration": ["--config"],
        "a zero byte": ["--number", "1\0"],
        "a zero byte in a configuration's name": ["--config", "a\0.yaml"],
        "a very long name": ["--" + "a" * 10_000, "1"],
    }


# Recipe -> description -> options that it must refuse before its first step, and words of which the message holds one.
TRAINING: dict[str, dict[str, tuple[list[str], tuple[str, ...]]]] = {
    "train_tokcom": {
        "an unknown stage": (["--stage", "vea"], ("stage",)),
        "a bad option of the last stage": (
            ["--stage", "all", "--distillation_training.learning_rate", "fast"],
            ("learn",),
        ),
        "an unknown flow": (["--flow.sampler", "rk45"], ("sampler",)),
        "heads that do not divide": (["--denoiser.num_attention_heads", "7"], ("heads",)),
        "a negative share": (["--validation_share", "-1"], ("validation_share",)),
        "a row that is no multiple": (["--length", "1023"], ("multiple",)),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "a missing file": (["--train_file", "missing.txt"], ("missing.txt",)),
        "two sources": (["--train_file", "small.txt", "--dataset_name", "b"], ("train_file", "dataset_name")),
        "strategies that do not agree": (
            ["--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps"],
            ("strategy",),
        ),
        "an option of another stage": (["--denoiser_training.eval_noise_levels", "2.0"], ("eval_noise_levels",)),
        "a batch size of zero": (["--per_device_train_batch_size", "0"], ("batch_size",)),
        "a learning rate below zero": (["--denoiser_training.learning_rate", "-1"], ("learning_rate",)),
        "a moment of one": (["--denoiser_training.adam_beta2", "1.0"], ("adam_beta2",)),
        "a vocabulary of a billion": (["--tokenizer_vocab_size", "1000000000"], ("vocab_size",)),
        "samples of no chunk": (["--sample_chunks", "0"], ("sample_chunks",)),
        "samples in no step": (["--sample_steps", "-1"], ("sample_steps",)),
        "a column of plain text": (["--text_column", "body"], ("text_column",)),
        "a configuration of no data set": (["--dataset_config", "en"], ("dataset_config",)),
        "a stream of no data set": (["--streaming", "true"], ("streaming",)),
        "fewer threads than none": (["--threads", "-1"], ("threads",)),
    },
    "train_vqgan": {
        "an unknown quantizer": (["--model.quantizer", "best"], ("quantizer",)),
        "a side that does not divide": (["--model.image_size", "17"], ("image_size",)),
        "a missing folder": (["--image_dir", "./missing"], ("missing",)),
        "two sources": (["--image_dir", "a", "--dataset_name", "b"], ("image_dir",)),
        "no images": (["--num_train", "0"], ("num_train",)),
        "a model that is not there": (["--init_from", "./missing"], ("missing",)),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "half precision without a GPU": (["--fp16", "--use_cpu"], ("fp16",)),
        "an unknown optimizer": (["--optim", "adamx"], ("adamx",)),
        "an unknown schedule": (["--lr_scheduler_type", "wavy"], ("wavy",)),
        "a negative codebook": (["--model.codebook_size", "-4"], ("codebook_size",)),
        "a codebook of a trillion": (["--model.codebook_size", "1000000000000"], ("codebook_size",)),
        "a larger codebook of no model": (["--expand_codebook", "128"], ("expand_codebook",)),
        "a column of no data set": (["--image_column", "picture"], ("image_column",)),
    },
    "train_token_pruning": {
        "both merge budgets": (["--merge_ratio", "0.4", "--target_merge_tokens", "40"], ("target_merge_tokens",)),
        "a missing base": (["--base_model", "./missing"], ("missing",)),
        "an unknown task": (["--task", "vqe"], ("task",)),
        "an unknown strategy": (["--strategy", "best"], ("strategy", "best")),
        "an unknown merger": (["--merger_type", "best"], ("merger_type",)),
        "a ratio of two": (["--merge_ratio", "2.0"], ("merge_ratio",)),
        "a prompt without {question}": (["--prompt", "hello"], ("prompt",)),
        "a held-out file that is missing": (["--eval_file", "missing.jsonl"], ("eval_file", "missing.jsonl")),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "half precision without a GPU": (["--fp16", "--use_cpu"], ("fp16",)),
        "an unknown type": (["--dtype", "float13"], ("dtype",)),
        "a run that is missing": (["--init_from", "./missing"], ("missing",)),
        "a step of no run": (["--init_step", "5"], ("init_step",)),
        "tokens of no strategy": (["--keep", "8"], ("keep",)),
        "a strategy without tokens": (["--strategy", "divprune"], ("keep",)),
    },
    "pretrain_vlm": {
        "too few numbers": (["--questions_per_type", "1", "2"], ("questions_per_type",)),
        "more objects than cells": (["--max_objects", "99"], ("max_objects",)),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "more shapes than there are": (["--num_shapes", "99"], ("num_shapes",)),
        "a single number of several": (["--questions_per_type", "3"], ("questions_per_type",)),
        "no questions": (["--eval_questions", "0"], ("eval_questions",)),
    },
    "pretrain_internvl": {
        "an unknown type": (["--types", "count", "smell"], ("types",)),
        "more objects than cells": (["--max_objects", "99"], ("max_objects",)),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
    },
    "train_joint_lfq": {
        "a missing base": (["--base", "./missing"], ("missing",)),
        "a file without its held-out part": (["--image_text_file", "missing.jsonl"], ("eval_file", "missing.jsonl")),
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "too many bits": (["--quantizer.output_dim", "99"], ("output_dim",)),
        "a folder of no file": (["--image_dir", "."], ("image_dir",)),
        "no images": (["--train_images", "0"], ("train_images",)),
        "a prompt without {question}": (["--prompt", "hello"], ("prompt",)),
        "a prompt without {caption}": (["--caption_prompt", "hello"], ("caption_prompt",)),
        "unknown features": (["--quantizer_input", "text"], ("quantizer_input",)),
        "an unknown start of new rows": (["--embedding_init_method", "best"], ("embedding_init_method",)),
        "an unknown number type": (["--dtype", "float13"], ("dtype",)),
    },
    "image_tokens": {
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "a folder of no file": (["--image_dir", "."], ("image_dir",)),
        "no images": (["--train_images", "0"], ("train_images",)),
        "a prompt without {caption}": (["--image_prompt", "hello"], ("image_prompt",)),
        "an unknown start of new rows": (["--embedding_init_method", "best"], ("embedding_init_method",)),
        "a share of two": (["--caption_drop", "2.0"], ("caption_drop",)),
        "a temperature of zero": (["--temperature", "0"], ("temperature",)),
        "an image of a billion": (["--image_size", "1000000000"], ("image_size",)),
        "a grid of a billion": (["--grid", "1000000000"], ("grid",)),
    },
    "search_token_pruning": {
        "an unknown strategy": (["--strategy", "best"], ("strategy", "best")),
        "a step of no run": (["--init_step", "5"], ("init_step",)),
        "no trials": (["--trials", "0"], ("trials",)),
        "an unknown type": (["--dtype", "float13"], ("dtype",)),
    },
    "train_ar_baseline": {
        "an unknown tracker": (["--report_to", "nothing_known"], ("report_to",)),
        "a missing file": (["--train_file", "missing.txt"], ("missing.txt",)),
    },
}


# Further options that let these recipes reach the wrong one quickly: a short text, a small model.
GIVEN = {
    "train_tokcom": ["--train_file", "small.txt", "--tokenizer_vocab_size", "257", "--length", "32"],
    "train_ar_baseline": ["--parameters", "100000", "--tokens", "1000"],
}


def cases(folder: Path) -> Iterator[Case]:
    """Writes the files into `folder` and yields the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    canary = os.environ.get("MALFORMED_CANARY", str(folder / "canary"))
    for number, (name, content) in enumerate(documents(canary).items()):
        path = folder / f"config_{number}.yaml"
        path.write_bytes(content)
        yield Case("YAML", name, partial(parse_recipe, "", SECTIONS, path, []), (path.name,))
    for name, text in {
        "empty": "",
        "a byte order mark": "\ufeffrun:\n  number: 2",
        "an alias": "run:\n  number: &n 3\n  limit: *n",
        "a number in quotation marks": 'run:\n  rate: "2e-05"',
    }.items():
        path = folder / f"good_{name.replace(' ', '_')}.yaml"
        path.write_text(text, encoding="utf-8")
        yield Case("YAML", name, partial(parse_recipe, "", SECTIONS, path, []), fine=True)
    read = partial(parse_recipe, "", SECTIONS)
    for name, argv in command_lines(canary).items():
        yield Case("command line", name, partial(at_command_line, read, argv), ("--", "argument", "onfig"))
    yield from training(folder)


def training(folder: Path) -> Iterator[Case]:
    """Wrong options of the training recipes, and output folders that they cannot create."""
    blocked = folder / "a_file"
    blocked.write_text("no folder", encoding="utf-8")
    Path("small.txt").write_text("A text of some words. " * 200, encoding="utf-8")
    for recipe, wrong in TRAINING.items():
        main = importlib.import_module(recipe).main
        out = ["--output_dir", str(folder / recipe), *GIVEN.get(recipe, ())]
        for name, (argv, words) in wrong.items():
            yield Case("command line", f"{recipe}: {name}", partial(at_command_line, main, [*out, *argv]), words)
        argv = ["--output_dir", str(blocked / "below"), *GIVEN.get(recipe, ())]
        yield Case("command line", f"{recipe}: below a file", partial(at_command_line, main, argv), ("a_file",))
