"""Columns about folders: loading them elsewhere, and what they must hold."""

import json
import shutil

import torch
from cells import Bench, NotApplicable, column, in_words, load
from parts import use_part
from rows import Row, difference, outputs, tensors


def _looked(bench: Bench, kind: str, row: Row) -> dict:
    found = bench.process(kind)[row.name]
    assert "error" not in found, found["error"]
    return found


def _same_outputs(row: Row, model, expected: dict, what: str = "outputs") -> None:
    gap = difference(expected, outputs(row, model))
    assert gap == 0, f"{what} differ by {gap:g}"


@column("AutoModel, fresh process")
def fresh_process(row: Row, bench: Bench) -> None:
    found, expected = _looked(bench, "package", row), bench.expected(row)
    for auto_class in dict.fromkeys(("AutoModel", row.auto_class)):
        assert found[auto_class]["module"].startswith("tokcom_hf.models."), found[auto_class]["module"]
        gap = difference(expected, found[auto_class]["outputs"])
        assert gap == 0, f"{auto_class}: outputs differ by {gap:g}"


@column("remote code, package blocked")
def remote_code(row: Row, bench: Bench) -> None:
    found, expected = _looked(bench, "remote", row), bench.expected(row)
    for auto_class in dict.fromkeys(("AutoModel", row.auto_class)):
        assert found[auto_class]["module"].startswith("transformers_modules."), found[auto_class]["module"]
        gap = difference(expected, found[auto_class]["outputs"])
        assert gap == 0, f"{auto_class}: outputs differ by {gap:g}"
    if row.generate is not None:
        torch.manual_seed(0)
        assert torch.equal(found["generated"], row.generate(bench.model(row)))


@column("AutoConfig, AutoTokenizer, AutoProcessor")
def auto_parts(row: Row, bench: Bench) -> str:
    config = load(row, bench.saved(row)).config
    told = json.loads(config.to_json_string(use_diff=False))
    parts = {}
    for kind in ("package", "remote"):
        found = _looked(bench, kind, row)
        assert found["config"]["class"] == type(config).__name__
        ours, theirs = (_without_paths(values) for values in (told, found["config"]["values"]))
        assert ours == theirs, {k: (ours.get(k), theirs.get(k)) for k in ours | theirs if ours.get(k) != theirs.get(k)}
        for part, made in found["parts"].items():
            parts.setdefault(part, []).append(made["made"])
    assert set(parts) == set(row.parts)
    if row.parts:
        memory = _parts_in_memory(row, bench)
        for part, (package, remote) in parts.items():
            assert difference(memory[part], package) == 0 and difference(package, remote) == 0
            assert sum(value.numel() for value in package.values()) > 5
    return ", ".join(("AutoConfig", *row.parts))


def _without_paths(values: dict) -> dict:
    dropped = ("_name_or_path", "auto_map", "transformers_version", "dtype", "custom_pipelines")
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in dropped
    }


def _parts_in_memory(row: Row, bench: Bench) -> dict:
    """What the tokenizer or processor makes before it was ever saved."""
    (part,) = row.parts
    return {part: use_part(row.make_part(bench.model(row)))}


@column("sharded save")
def sharded(row: Row, bench: Bench) -> str:
    notes = []
    for number, model in enumerate(bench.kinds(row)):
        folder, expected = bench.path(row, "sharded", str(number)), outputs(row, model)
        model.save_pretrained(folder, max_shard_size="4KB")
        shards = list(folder.glob("*-of-*.safetensors"))
        # What refers to its base has only a few small tensors.
        assert len(shards) > 1 or number, f"one file only: {sorted(path.name for path in folder.iterdir())}"
        _same_outputs(row, load(row, folder), expected)
        notes.append(str(len(shards) or 1))
    return f"{' and '.join(notes)} files"


@column("variant")
def variant(row: Row, bench: Bench) -> None:
    for number, model in enumerate(bench.kinds(row)):
        folder, expected = bench.path(row, "variant", str(number)), outputs(row, model)
        model.save_pretrained(folder, variant="second")
        assert not list(folder.glob("model.safetensors"))
        _same_outputs(row, load(row, folder, variant="second"), expected)
        for wanted in ({}, {"variant": "third"}):
            try:
                load(row, folder, **wanted)
            except OSError as error:
                in_words(error, "safetensors", "third", "variant")
            else:
                raise AssertionError(f"a folder of variant 'second' loads with {wanted}")


@column("loaded and saved again elsewhere")
def saved_again(row: Row, bench: Bench) -> None:
    for number, model in enumerate(bench.kinds(row)):
        expected = outputs(row, model)
        first, second, third = (bench.path(row, f"again{step}", str(number)) for step in range(3))
        model.save_pretrained(first)
        load(row, first).save_pretrained(second)
        shutil.rmtree(first)
        _same_outputs(row, load(row, second), expected, "after the second saving outputs")
        # A third time under another name: nothing refers to where the folder was.
        load(row, second).save_pretrained(third)
        second.rename(second.with_name("moved_" + second.name))
        _same_outputs(row, load(row, third), expected, "after the third saving outputs")


@column("bf16 and fp16 load, float32 input")
def half_precision(row: Row, bench: Bench) -> str:
    notes = []
    with torch.no_grad():
        expected = bench.expected(row) | tensors(bench.model(row)(**row.inputs(), **row.undecided))
    for dtype, bound in ((torch.bfloat16, 0.15), (torch.float16, 0.05)):
        model = load(row, bench.saved(row), dtype=dtype)
        share = sum(p.numel() for p in model.parameters() if p.dtype == dtype) / model.num_parameters()
        assert share > 0.5 and model.dtype == dtype, f"{share:.0%} of the weights are {dtype}"
        found = outputs(row, model)
        assert all(value.isfinite().all() for value in found.values())
        with torch.no_grad():
            found |= tensors(model(**row.inputs(), **row.undecided))
        for name in row.smooth or [name for name, value in expected.items() if value.is_floating_point()]:
            there = expected[name].abs() < 6e4  # an excluded id has the lowest number of its type
            gap = (found[name].float() - expected[name])[there].abs().mean() / expected[name][there].abs().mean()
            assert gap < bound, f"{name} in {dtype} is {gap:.3f} of its size away from float32"
        if row.generate is not None:
            row.generate(model)
        notes.append(f"{share:.0%}")
    return "of the weights are half: " + ", ".join(notes)


@column('dtype="auto"')
def automatic_dtype(row: Row, bench: Bench) -> None:
    assert {p.dtype for p in load(row, bench.saved(row), dtype="auto").parameters()} == {torch.float32}
    half, folder = load(row, bench.saved(row), dtype=torch.bfloat16), bench.path(row, "bf16")
    half.save_pretrained(folder)
    again = load(row, folder, dtype="auto")
    ours, theirs = half.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype and torch.equal(theirs[name], value), name
    assert torch.bfloat16 in {p.dtype for p in again.parameters()}
    _same_outputs(row, again, outputs(row, half))


@column("resize_token_embeddings")
def resize(row: Row, bench: Bench) -> str:
    model, expected = bench.model(row), bench.expected(row)
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        rows = None
    try:
        model.resize_token_embeddings(200 if rows is None else rows + 8)
    except (ValueError, NotImplementedError, AttributeError) as error:
        if rows is None:
            raise NotApplicable("it has no vocabulary; transformers refuses") from error
        assert isinstance(error, ValueError), repr(error)
        in_words(error, "resize", "resized")
        _same_outputs(row, model, expected, "after the refusal outputs")
        return "refused in words"
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows + 8
    found = outputs(row, model)
    for name, value in expected.items():
        if name.endswith("generated"):
            continue  # new ids take part in the choice
        old = found[name][..., : value.shape[-1]] if name.endswith("logits") else found[name]
        assert torch.allclose(old, value, atol=1e-6), f"{name} of old ids has changed"
    folder = bench.path(row, "resized")
    model.save_pretrained(folder)
    _same_outputs(row, load(row, folder), found)
    return "works"
