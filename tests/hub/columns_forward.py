"""Columns about `forward`: its arguments, where and how it computes."""

import contextlib

import accelerate
import torch
import torch.utils.checkpoint
from cells import Bench, NotApplicable, column, in_words, load
from rows import Row, difference, loss_of, outputs, tensors

# Graph breaks of a forward under torch.compile when this table was made; 0 for every other row. Those of vision-language
# models are their base's for the most part.
MOST_GRAPH_BREAKS = {
    "LayerPruner": 1, "PrunedVLM": 25, "LFQExpandedModel (VLM)": 17,
}  # fmt: skip


@contextlib.contextmanager
def counted(module, name: str):
    """Counts calls of `module.name` while it is open."""
    original, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    setattr(module, name, call)
    try:
        yield calls
    finally:
        setattr(module, name, original)


def _gradients(row: Row, model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    loss_of(row, model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@column("gradient checkpointing")
def checkpointing(row: Row, bench: Bench) -> str:
    model = bench.model(row)
    # transformers 5.24 has a new name for it, and a warning for the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if not model.supports_gradient_checkpointing:
        try:
            enable()
        except ValueError as error:
            in_words(error, "gradient checkpointing", "activation checkpointing")
            raise NotApplicable("it has no stack of layers to compute twice; transformers refuses") from error
        raise AssertionError("it takes gradient checkpointing, which it does not support")
    plain = _gradients(row, bench.model(row).train())
    enable({"use_reentrant": False})
    with counted(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator") as calls:
        checkpointed = _gradients(row, model.train())
    assert calls, "nothing was checkpointed"
    gap = difference(plain, checkpointed)
    assert gap == 0, f"gradients differ by {gap:g}"
    return f"{len(calls)} layers computed twice, gradients equal"


@column("sdpa = eager")
def attention(row: Row, bench: Bench) -> str:
    folder, functional = bench.saved(row), torch.nn.functional
    models = {}
    try:
        for name in ("sdpa", "eager"):
            models[name] = load(row, folder, attn_implementation=name)
    except ValueError as error:
        in_words(error, "attention", "scaled_dot_product_attention")
        load(row, folder, attn_implementation="eager")
        raise NotApplicable("it has one way to attend, or none; transformers refuses another") from error
    found, calls = {}, {}
    for name, model in models.items():
        with counted(functional, "scaled_dot_product_attention") as made:
            found[name] = outputs(row, model)
        calls[name] = len(made)
    assert calls["sdpa"] > calls["eager"], f"calls of scaled_dot_product_attention: {calls}"
    gap = difference(found["sdpa"], found["eager"])
    assert gap < 1e-4, f"outputs differ by {gap:g}"
    return f"differ by {gap:.0e}"


@column('device_map="auto"')
def device_map(row: Row, bench: Bench) -> None:
    model = load(row, bench.saved(row), device_map="auto")
    if not torch.cuda.is_available():
        gap = difference(bench.expected(row), outputs(row, model))
        assert gap == 0, f"outputs differ by {gap:g}"


def _exact_or_refused(row: Row, bench: Bench, make) -> str:
    """Outputs are those of the model in memory, or a ValueError says what to do instead."""
    try:
        model = make()
        found = outputs(row, model)
        made = None if row.generate is None else row.generate(model)
    except ValueError as error:
        in_words(error, "offload", "device_map")
        return "refused in words"
    expected = bench.expected(row)
    gap = difference(expected, {name: value.cpu() for name, value in found.items()})
    assert gap < 1e-6, f"outputs differ by {gap:g}"
    if made is not None:
        torch.manual_seed(0)
        assert torch.equal(made, row.generate(bench.model(row))), "generates something else"
    return "exact"


@column("CPU offload")
def cpu_offload(row: Row, bench: Bench) -> str:
    cpu = torch.device("cpu")
    model = bench.model(row)
    result = _exact_or_refused(row, bench, lambda: accelerate.cpu_offload(model, execution_device=cpu))
    assert any(p.device.type == "meta" for p in model.parameters()) or result != "exact", "nothing was offloaded"
    return result


@column("disk offload")
def disk_offload(row: Row, bench: Bench) -> str:
    cpu, folder = torch.device("cpu"), bench.path(row, "offload")
    model = bench.model(row)
    results = [_exact_or_refused(row, bench, lambda: accelerate.disk_offload(model, folder, execution_device=cpu))]

    def mixed():
        # Half of the parts on disk: what `device_map="auto"` does where memory is short.
        names = []
        for name, child in model.named_children():
            inner = [f"{name}.{below}" for below, _ in child.named_children()]
            # A part is split where it is the only one, as long as nothing lies beside its own parts.
            split = len(list(model.children())) == 1 and not list(child.parameters(recurse=False))
            names += inner if split else [name]
        places = {name: "disk" if number % 2 == 0 else "cpu" for number, name in enumerate(names)}
        # accelerate brings whole modules back, not single tensors.
        places |= {name: "cpu" for name in model.state_dict() if "." not in name}
        return load(row, bench.saved(row), device_map=places, offload_folder=bench.path(row, "offload2"))

    results.append(_exact_or_refused(row, bench, mixed))
    return ", ".join(dict.fromkeys(results))


@column("return_dict=False")
def plain_tuple(row: Row, bench: Bench) -> None:
    model = bench.model(row)
    inputs = row.inputs()
    inputs |= row.labels(inputs) if row.labels is not None else {}
    with torch.no_grad():
        torch.manual_seed(0)
        named = model(**inputs, return_dict=True)
        torch.manual_seed(0)
        plain = model(**inputs, return_dict=False)
    assert type(plain) is tuple, f"a {type(plain).__name__}"
    assert hasattr(named, "to_tuple"), f"with return_dict=True a {type(named).__name__}"
    wanted = named.to_tuple()
    assert len(plain) == len(wanted), f"{len(plain)} values instead of {len(wanted)}"
    assert list(tensors(plain)) == list(tensors(wanted)) and difference(tensors(wanted), tensors(plain)) == 0


@column("an unknown keyword is refused")
def unknown_keyword(row: Row, bench: Bench) -> str:
    model = bench.model(row)
    calls = {
        "forward": lambda: model(**row.inputs(), unknown_optoin=1),
        "from_pretrained": lambda: load(row, bench.saved(row), unknown_optoin=1),
    }
    if row.generate is not None:
        generate = model.generate
        model.generate = lambda *args, **kwargs: generate(*args, **kwargs, unknown_optoin=1)
        calls["generate"] = lambda: row.generate(model)
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            assert "unknown_optoin" in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name} takes unknown_optoin=1 and does nothing with it")
    return ", ".join(calls)


@column("hidden states and attentions")
def inner_states(row: Row, bench: Bench) -> str:
    told = []
    for option, field in (("output_hidden_states", "hidden_states"), ("output_attentions", "attentions")):
        model = load(row, bench.saved(row), attn_implementation="eager")
        try:
            with torch.no_grad():
                output = model(**row.inputs(), **{option: True})
        except (TypeError, ValueError) as error:
            in_words(error, option)
            told.append("refused")
            continue
        states = getattr(output, field, None)
        assert isinstance(states, tuple) and len(states) >= 2, f"{option} gave {type(states).__name__}"
        assert all(torch.is_tensor(state) and state.isfinite().all() for state in states)
        assert not torch.equal(states[0], states[-1])
        told.append("given")
    return f"hidden states {told[0]}, attentions {told[1]}"


@column("torch.compile")
def compiled(row: Row, bench: Bench) -> str:
    import torch._dynamo as dynamo

    model = bench.model(row)
    dynamo.reset()
    dynamo.utils.counters.clear()
    faster = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.manual_seed(0)
        found = tensors(faster(**row.inputs()))
        breaks = sum(dynamo.utils.counters["graph_break"].values())
        graphs = dynamo.utils.counters["stats"]["unique_graphs"]
        torch.manual_seed(0)
        expected = tensors(model(**row.inputs()))
    dynamo.reset()
    assert graphs > 0, "nothing was compiled"
    gap = difference(expected, found)
    assert gap == 0, f"outputs differ by {gap:g}"
    most = MOST_GRAPH_BREAKS.get(row.name, 0)
    assert breaks <= most, f"{breaks} graph breaks, {most} before"
    return f"{breaks} graph breaks, {graphs} graphs"
