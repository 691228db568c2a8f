"""Columns about training: adapters, Trainer, two ranks, and what is left of it on disk."""

import shutil

import peft
import torch
from cells import Bench, NotApplicable, column, in_words, load
from rows import Row, difference, loss_of, outputs
from transformers import PrinterCallback, Trainer, TrainingArguments


def trained(row: Row, model, steps: int = 1, lr: float = 1e-2):
    """`model` after some steps on what may train; every such weight that has a gradient moves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss_of(row, model).backward()
        optimizer.step()
    return model.eval()


def _adapted(row: Row, bench: Bench, config: peft.LoraConfig) -> str:
    """Trains an adapter, saves and loads it, merges it: nothing changes in any of these."""
    model = bench.model(row)
    if not any(isinstance(module, torch.nn.Linear) for module in model.modules()):
        try:
            peft.get_peft_model(model, config)
        except ValueError as error:
            in_words(error, "linear", "target")
            raise NotApplicable("it has no linear layer; peft refuses") from error
        raise AssertionError("an adapter without a layer to adapt")
    tuned = peft.get_peft_model(model, config)
    start = {name: value.clone() for name, value in tuned.state_dict().items()}
    trained(row, tuned)
    moved = [name for name, value in tuned.state_dict().items() if not torch.equal(value, start[name])]
    assert any("lora_" in name for name in moved), "no adapter has moved"
    for wanted in config.modules_to_save or ():
        assert any(f"{wanted}.modules_to_save" in name for name in moved), f"{wanted} has not moved"
    frozen = [name for name in moved if "lora_" not in name and "modules_to_save" not in name]
    buffers = {name for name, _ in tuned.named_buffers()}
    assert not set(frozen) - buffers, f"moved although frozen: {frozen[:3]}"
    expected, plain = outputs(row, tuned), bench.expected(row)
    assert difference(plain, expected) > 0, "the adapter does nothing"
    folder = bench.path(row, "adapter", *(config.modules_to_save or ()))
    tuned.save_pretrained(folder)
    base = bench.model(row)
    base.load_state_dict(base.state_dict() | _buffers(tuned, base))
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    gap = difference(expected, outputs(row, again))
    assert gap < 1e-5, f"after loading the adapter outputs differ by {gap:g}"
    if any("parametrizations" in name for name in start):
        return "not merged: the spectral norm scales every weight anew"
    merged = tuned.merge_and_unload().eval()
    close_outputs(expected, outputs(row, merged))
    return ""


def _buffers(tuned, base) -> dict:
    """Statistics that a training step has moved and that no adapter holds."""
    names = {name for name, _ in base.named_buffers()}
    inner = {name.replace(".base_layer.", "."): value for name, value in tuned.get_base_model().state_dict().items()}
    return {name: inner[name] for name in names if name in inner}


def close_outputs(expected: dict, found: dict) -> None:
    """Merging adds in another order: equal but for the last bits, decisions included."""
    for name, value in expected.items():
        if value.is_floating_point():
            bound = 1e-4 * float(value.abs().max().clamp(min=1))
            gap = float((value - found[name]).abs().max())
            assert gap < bound, f"after merging {name} differs by {gap:g}"


@column("LoRA, all-linear")
def lora(row: Row, bench: Bench) -> str:
    return _adapted(row, bench, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@column("LoRA, modules_to_save")
def lora_and_modules(row: Row, bench: Bench) -> str:
    linear = [name for name, module in bench.model(row).named_modules() if isinstance(module, torch.nn.Linear)]
    saved = list(row.modules_to_save)
    targets = [name for name in linear if not {*saved, "lm_head"} & set(name.split("."))][-2:]
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    return _adapted(row, bench, config)


@column("plain Trainer")
def plain_trainer(row: Row, bench: Bench) -> str:
    model = bench.model(row)
    inputs = row.inputs()
    if row.labels is None:
        with torch.no_grad():
            assert getattr(model(**inputs), "loss", None) is None
        raise NotApplicable("it has no loss of its own: a trainer of a whole that it is part of trains it")
    inputs |= row.labels(inputs)
    columns = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    data = [{name: value[index] for name, value in columns.items()} for index in range(2)]
    folder = bench.path(row, "trainer")
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    evaluated = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        whole = float(bench.model(row)(**columns).loss)
    assert abs(evaluated - whole) < 1e-4 * max(1, abs(whole)), f"eval_loss {evaluated}, of the whole batch {whole}"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss == loss for loss in losses)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved, "nothing has moved"
    trainer.save_model()
    gap = difference(outputs(row, model.eval()), outputs(row, load(row, folder)))
    assert gap == 0, f"what the trainer saved differs by {gap:g}"
    return f"loss {losses[0]:.3f}, then {losses[1]:.3f}"


@column("2 ranks")
def two_ranks(row: Row, bench: Bench) -> str:
    found = bench.process("ranks")[row.name]
    assert "error" not in found, found["error"]
    assert found["trained"] > 0 and found["moved"] > 0
    assert found["gap"] < 1e-4, f"gradients are {found['gap']:g} away from the mean of both rows' own"
    assert found["apart"] == 0, f"after two steps the ranks' weights are {found['apart']:g} apart"
    return f"gradients of {found['trained']} weights"


@column("round trip of everything")
def round_trip(row: Row, bench: Bench) -> str:
    """Trained a step, LoRA merged, frozen, cast, saved in shards, loaded, saved again elsewhere, loaded: difference 0."""
    for number, model in enumerate(bench.kinds(row)):
        trained(row, model)
        linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
        if linear:
            config = peft.LoraConfig(r=2, target_modules=linear[:3] + linear[-1:], init_lora_weights=False)
            tuned = peft.get_peft_model(model, config)
            for parameter in tuned.get_base_model().parameters():
                parameter.requires_grad_(True)  # what is adapted and everything else train together
            model = trained(row, tuned).merge_and_unload()
        model = model.requires_grad_(False).to(torch.bfloat16).eval()
        expected = outputs(row, model)
        assert difference(
            {k: v.float() for k, v in bench.expected(row).items()}, {k: v.float() for k, v in expected.items()}
        )
        first, second = bench.path(row, "trip", str(number)), bench.path(row, "trip_again", str(number))
        model.save_pretrained(first, max_shard_size="4KB")
        loaded = load(row, first, dtype="auto")
        gap = difference(expected, outputs(row, loaded))
        assert gap == 0, f"loaded: outputs differ by {gap:g}"
        loaded.save_pretrained(second, max_shard_size="6KB")
        del loaded
        shutil.rmtree(first)
        gap = difference(expected, outputs(row, load(row, second, dtype="auto")))
        assert gap == 0, f"saved again and loaded: outputs differ by {gap:g}"
    return "difference 0"
