"""The five pipelines: every form of input, options that act or are refused, folders, threads, random numbers."""

import base64
import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoProcessor, GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import tokcom_hf
from tests.helpers.recipes import load
from tokcom_hf.models.pipeline_prompts import as_prompt, chat_prompt, pair, render
from tokcom_hf.models.shared_private_sampling import GumbelNoise, private_options, warpers

ROOT = Path(__file__).parents[2]
bench = load("pipeline_threads")
NAMES = list(bench.BUILDERS)
VQ = ["vq-reconstruction", "vq-tokenize"]
VLM = ["lfq-image-text on a VLM", "pruned-image-text-to-text"]
SHORT = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model folder per pipeline, as `save_pretrained` of the model and its processors writes it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    for number, (_, build) in enumerate(bench.BUILDERS.values()):
        build(root / str(number))
    return {name: root / str(number) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def pipes(folders):
    return {name: pipeline(bench.BUILDERS[name][0], model=str(folders[name]), device="cpu") for name in NAMES}


@pytest.fixture
def pipe(request, pipes):
    return pipes[request.param]


def on(*names):
    return pytest.mark.parametrize("pipe", names, indirect=True)


def ask(pipe, name: str, index: int):
    inputs, options = bench.request(name, index)
    return bench.plain(pipe(*inputs, **options))


# ---------------------------------------------------------------------- state of a call
@pytest.mark.parametrize("name", NAMES)
def test_threads_that_share_a_pipeline_never_mix_requests(pipes, name):
    assert bench.differences(pipes[name], name, threads=4, requests=12) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_call_neither_seeds_nor_reads_the_global_random_numbers(pipes, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [ask(pipes[name], name, index) for index in (1, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert [ask(pipes[name], name, index) for index in (1, 3)] == first


@on("lfq-image-text", "pruned-image-text-to-text")
def test_without_a_seed_the_global_one_decides_and_a_generator_can_be_given(pipe):
    options = {"do_sample": True, "max_new_tokens": 12} | ({"mode": "text"} if hasattr(pipe, "image_decoder") else {})
    torch.manual_seed(1)
    first, second = pipe("a red circle", **options), pipe("a red circle", **options)
    torch.manual_seed(1)
    assert pipe("a red circle", **options) == first != second
    given = pipe("a red circle", generator=torch.Generator().manual_seed(4), **options)
    assert given == pipe("a red circle", seed=4, **options)
    with pytest.raises(ValueError, match="either seed or generator"):
        pipe("a red circle", seed=4, generator=torch.Generator(), **options)


def test_private_sampling_has_the_distribution_of_generate(pipes):
    model, scores = pipes["lfq-image-text"].model, torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    options = {"do_sample": True, "temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.99}
    config = GenerationConfig(**options)
    config._eos_token_tensor = None
    theirs = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu", model_kwargs={})
    rewritten = private_options(model, options, torch.Generator().manual_seed(3))
    own = rewritten["logits_processor"]
    assert [type(one) for one in own] == [*map(type, theirs), GumbelNoise] and rewritten["do_sample"] is False
    probabilities = theirs(None, scores).softmax(-1)[0]
    assert 1 < int((probabilities > 0).sum()) < 12
    noisy = GumbelNoise(torch.Generator().manual_seed(1))
    logits = warpers({**dict.fromkeys(("top_h", "epsilon_cutoff", "eta_cutoff")), **options})(None, scores)
    drawn = noisy(None, logits.expand(200_000, -1)).argmax(-1).bincount(minlength=12) / 200_000
    assert torch.allclose(drawn, probabilities, atol=0.005) and bool((drawn[probabilities == 0] == 0).all())


@on("lfq-image-text", "pruned-image-text-to-text")
def test_what_generate_reads_from_its_configuration_the_pipeline_reads_too(pipe):
    config = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=4)
    mode = {"mode": "text"} if hasattr(pipe, "image_decoder") else {}
    greedy = pipe("a red circle", do_sample=False, max_new_tokens=4, **mode)
    assert pipe("a red circle", generation_config=config, seed=1, **mode) == greedy
    assert pipe("a red circle", generate_kwargs={"do_sample": True, "top_k": 1, "max_new_tokens": 4}, **mode) == greedy
    with pytest.raises(ValueError, match="num_beams=2 with do_sample=True"):
        pipe("a red circle", do_sample=True, num_beams=2, **mode)
    assert pipe("a red circle", do_sample=False, num_beams=2, max_new_tokens=4, **mode) is not None
    with pytest.raises(ValueError, match="given twice"):
        pipe("a red circle", max_new_tokens=3, generate_kwargs={"max_new_tokens": 4})


# ---------------------------------------------------------------------- forms of input
@on(*NAMES)
def test_lists_generators_and_data_sets(pipe, request):
    name = request.node.callspec.params["pipe"]
    if name in VQ:
        rows, key, options = [bench.picture(index) for index in range(3)], "image", {}
    else:
        rows, key = bench.TEXTS[:3], "text"
        options = {"num_steps": 2, "num_generate_chunks": 1, "seed": 0} if name == "tokcom-generation" else SHORT
        options = options | ({"mode": "text"} if name.startswith("lfq") else {})
    expected = bench.plain(pipe(rows, batch_size=1, **options))
    assert len(expected) == 3 and bench.plain(pipe(tuple(rows), batch_size=1, **options)) == expected
    asked = []
    lazy = pipe((asked.append(row) or row for row in rows), **options)
    assert not asked and bench.plain(next(iter(lazy))) == expected[0] and len(asked) == 1
    assert bench.plain(list(lazy)) == expected[1:]
    table = datasets.Dataset.from_dict({key: rows, "label": [0, 1, 2]})
    assert len(list(pipe(table, **options))) == 3
    assert bench.plain(list(pipe(KeyDataset(table, key), batch_size=1, **options))) == bench.plain(
        list(pipe(table, batch_size=1, **options))
    )
    assert bench.plain(pipe(rows, batch_size=2, num_workers=2, **options)) == bench.plain(
        pipe(rows, batch_size=2, **options)
    )
    for wrong in ({"batch_size": 0}, {"num_workers": -1}):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            pipe(rows, **wrong)


@on("vq-tokenize", "lfq-image-text", *VLM)
def test_batches_give_what_single_requests_give(pipe, request):
    name = request.node.callspec.params["pipe"]
    if name == "vq-tokenize":
        rows, options = [bench.picture(index) for index in range(5)], {}
    elif name == "lfq-image-text":
        rows, options = bench.TEXTS, {"do_sample": False, "num_image_tokens": 4}
    else:
        rows = [{"image": bench.picture(i), "text": f"<image> {text}"} for i, text in enumerate(bench.TEXTS)]
        rows[1:1] = ["a red circle", bench.chat(7)]
        options = SHORT | ({"mode": "text"} if name.startswith("lfq") else {})
    alone = [pipe(row, **options) for row in rows]
    strip = lambda result: [{k: v for k, v in one.items() if k != "token_report"} for one in result]  # noqa: E731
    flat = (lambda result: strip(result)) if name.startswith(("vq", "pruned")) else bench.plain
    for size in (2, 3, len(rows)):
        assert flat(pipe(rows, batch_size=size, **options)) == flat(alone)


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/picture.png" else 404)
        self.end_headers()
        if self.path == "/picture.png":
            self.wfile.write(self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One picture as PIL image, path, Path, URL and data URI."""
    picture, buffer = bench.picture(3), io.BytesIO()
    picture.save(buffer, "PNG")
    path = tmp_path_factory.mktemp("images") / "picture.png"
    path.write_bytes(buffer.getvalue())
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    server.content = buffer.getvalue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/picture.png"
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    yield {"pil": picture, "str": str(path), "path": path, "url": url, "data": data}
    server.shutdown()
    server.server_close()


@on(*VQ, *VLM)
def test_an_image_may_be_a_pil_image_a_path_a_url_or_a_data_uri(pipe, request, sources):
    name = request.node.callspec.params["pipe"]
    mode = {"mode": "text"} if name.startswith("lfq") else {}

    def answer(source, **options):
        if name in VQ:
            return bench.plain(pipe(source, **options))
        return bench.plain(pipe({"image": source, "text": "<image> a red circle"}, **SHORT, **mode, **options))

    answers = [answer(source) for source in sources.values()]
    assert all(one == answers[0] for one in answers)
    with pytest.raises(ValueError, match="allow_urls is off"):
        answer(sources["url"], allow_urls=False)
    assert answer(sources["data"], allow_urls=False, timeout=5) == answers[0]
    with pytest.raises(ValueError, match="gone"):
        answer(sources["url"].replace("picture.png", "gone"))
    for wrong in (str(sources["path"]) + ".gone.png", "no image, no file"):
        with pytest.raises(ValueError, match=r"no such file|is no image"):
            answer(wrong)


def test_postscript_is_not_opened_whatever_it_is_called(pipes, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, data):
        with pytest.raises(ValueError, match="not an image of the formats"):
            pipes["pruned-image-text-to-text"]({"image": source, "text": "<image> a"})
        with pytest.raises(ValueError, match="not an image of the formats"):
            pipes["vq-tokenize"](source)


@on(*VLM)
def test_images_and_text_apart_and_chats_as_in_transformers(pipe, request):
    mode = {"mode": "text"} if request.node.callspec.params["pipe"].startswith("lfq") else {}
    options = SHORT | mode
    one, two, text = bench.picture(1), bench.picture(2), "<image> a red circle"
    alone = pipe({"image": one, "text": text}, **options)
    assert pipe(images=one, text=text, **options) == pipe(one, text=text, **options) == alone
    assert pipe(images=[one], text=text, **options) == pipe(text, images=one, **options) == alone
    both = pipe(images=[one, two], text=[text, text], batch_size=1, **options)
    assert both == [alone, pipe({"image": two, "text": text}, **options)]
    assert pipe(images=[[one], [two]], text=[text, text], batch_size=1, **options) == both
    spread = pipe(images=[one, two, two], text=[text, f"{text} <image>"], batch_size=1, **options)
    assert spread == [alone, pipe({"images": [two, two], "text": f"{text} <image>"}, **options)]
    chat = [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "a red circle"}]}]
    asked = pipe(chat, **options)
    assert asked == pipe(text=chat, **options) == pipe(images=chat, **options) == alone
    empty = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red circle"}]}]
    assert pipe(text=empty, images=one, **options) == asked and pipe(text=[empty, chat], images=[[one], []], **options)
    assert pipe([chat, empty_of(chat, two)], batch_size=1, **options) == both
    full = pipe(chat, return_full_text=True, **options)
    full, short = (full, asked) if isinstance(full, dict) else (full[0], asked[0])
    assert [message["role"] for message in full["generated_text"]] == ["user", "assistant"]
    assert full["generated_text"][-1]["content"] == short["generated_text"]
    assert full["generated_text"][:-1] == chat
    written = [{"role": "user", "content": "<image> a red circle"}]
    assert pipe(text=written, images=one, **options) == alone
    whole = pipe("a red circle", return_full_text=True, **options)
    whole = whole if isinstance(whole, dict) else whole[0]
    assert whole["generated_text"].startswith("a red circle")


def empty_of(chat, image):
    return [{"role": "user", "content": [{"type": "image", "image": image}, *chat[0]["content"][1:]]}]


@on(*VLM)
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ({"image": None, "text": "<image> a"}, {}, ValueError, "put one '<image>' per image"),
        ({"imagse": 1, "text": "a"}, {}, ValueError, "got the keys"),
        ({"text": 3}, {}, ValueError, "got the keys"),
        ([1, 2], {}, TypeError, "Inputs must be texts"),
        (None, {}, TypeError, "Nothing to answer"),
        (None, {"text": ["<image> a", "b"], "images": []}, ValueError, "one '<image>' per image"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, ValueError, "'text' or 'image', got 'video'"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, ValueError, "image part without an image"),
    ],
)
def test_requests_that_cannot_be_read_say_why(pipe, inputs, options, error, message):
    with pytest.raises(error, match=message):
        pipe(inputs, **options)


@on("tokcom-generation", "lfq-image-text", *VLM)
def test_half_a_surrogate_pair_is_named(pipe):
    with pytest.raises(ValueError, match=r"at character \d+, half of a surrogate pair"):
        pipe("abc\ud83d")


def test_prompts_pair_and_render(pipes):
    assert as_prompt("a").images == [] and as_prompt({"text": "a", "images": [1, 2]}).images == [1, 2]
    messages = [
        {"role": "user", "content": [{"type": "image", "url": "x.png"}]},
        {"role": "assistant", "content": "y"},
    ]
    assert as_prompt(messages).images == ["x.png"] and chat_prompt(messages).messages == messages
    written = [{"role": "user", "content": "<image> what ?"}]
    assert chat_prompt(written, ["y.png"]).images == ["y.png"]
    assert pair([written, "b <image>"], ["y.png", "z.png"])[1].images == ["z.png"]
    with pytest.raises(ValueError, match="1 image"):
        chat_prompt(messages, ["more"])
    with pytest.raises(ValueError, match=r"3 image.*2 texts"):
        pair(["<image>", "<image>"], [1, 2, 3])

    class Plain:
        image_token = "<img>"

    assert render(as_prompt({"image": 1, "text": "<image> {a}"}), Plain()) == ("<img> {a}", True)
    single = [{"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "what?"}]}]
    assert render(as_prompt(single), Plain()) == ("<img>\nwhat?", True)
    with pytest.raises(ValueError, match="no chat_template"):
        render(as_prompt(messages), Plain())


# ---------------------------------------------------------------------- keywords
@on(*NAMES)
def test_unknown_keywords_are_named_at_construction_and_call(pipe, request, folders):
    name = request.node.callspec.params["pipe"]
    given = bench.picture(0) if name in VQ else "a red circle"
    for wrong, meant in (("batch_sise", "batch_size"), ("no_such_option", "")):
        with pytest.raises(TypeError, match=f"Unknown argument '{wrong}'.*{meant}"):
            pipe(given, **{wrong: 1})
    with pytest.raises(TypeError, match="Unknown argument 'no_such_option'"):
        pipeline(bench.BUILDERS[name][0], model=pipe.model, **parts(pipe), device="cpu", no_such_option=1)


@on(*NAMES)
def test_parts_named_by_a_path_are_loaded(pipe, request, folders):
    name = request.node.callspec.params["pipe"]
    paths = dict.fromkeys(parts(pipe), Path(folders[name]))
    again = pipeline(bench.BUILDERS[name][0], model=pipe.model, **paths, device="cpu")
    assert {part: type(value) for part, value in parts(again).items()} == {k: type(v) for k, v in parts(pipe).items()}
    with pytest.raises(TypeError, match="one input or a list of them, got int"):
        again(5)


@on("lfq-image-text")
def test_an_image_of_no_tokens_is_refused(pipe):
    with pytest.raises(ValueError, match="num_image_tokens must be >= 1"):
        pipe("a red circle", num_image_tokens=0)


def parts(pipe):
    return {
        name: value
        for name in ("tokenizer", "processor", "image_processor")
        if (value := getattr(pipe, name)) is not None and (name == "processor" or pipe.processor is None)
    }


@on("pruned-image-text-to-text")
def test_a_mode_is_that_of_the_call_and_options_of_the_construction_hold(pipe):
    row = {"image": bench.picture(0), "text": "<image> a red circle"}
    before = pipe.model.pruning_mode
    tokens = {mode: pipe(row, pruning_mode=mode, **SHORT)["token_report"] for mode in ("hard", "origin")}
    assert tokens["hard"]["flops_ratio"] < tokens["origin"]["flops_ratio"] == 1.0 and pipe.model.pruning_mode == before
    other = pipeline(
        "pruned-image-text-to-text", model=pipe.model, processor=pipe.processor, pruning_mode="origin", max_new_tokens=1,
        device="cpu", batch_size=2, num_return_sequences=2, do_sample=True, seed=3,
    )  # fmt: skip
    first, second = other(row)
    assert first["token_report"]["flops_ratio"] == 1.0 and len(first["generated_text"].split()) <= 1
    assert other(row) == [first, second] == other([row])[0]


@on("lfq-image-text")
def test_sampling_is_among_the_ids_that_the_mode_allows(pipe):
    greedy = pipe("a red circle", do_sample=False, num_image_tokens=4)[0]["token_ids"]
    assert pipe("a red circle", top_k=1, num_image_tokens=4, seed=0)[0]["token_ids"] == greedy
    start, end = pipe.model.lfq_token_range
    several = pipe("a red circle", top_k=2, num_image_tokens=16, num_return_sequences=4, seed=0)
    drawn = {token for row in several for token in row["token_ids"]}
    assert len(drawn) > 1 and all(start <= token < end for token in drawn)
    with pytest.raises(ValueError, match="leave max_new_tokens out"):
        pipe("a red circle", max_new_tokens=3)


@on("lfq-image-text")
def test_braces_are_plain_text(pipe):
    before = pipe.processor.image_prompt
    try:
        pipe.processor.image_prompt = '{"draw": "{caption}"} to'
        assert pipe('a {red} "circle" {0} {', seed=0)[0]["images"][0].size == (16, 16)
        assert pipe("a {", seed=0, guidance_scale=2.0)[0]["images"]
    finally:
        pipe.processor.image_prompt = before


@on("vq-reconstruction", "lfq-image-text", *VLM)
def test_dtype(pipe, request, folders):
    name = request.node.callspec.params["pipe"]
    other = pipeline(
        bench.BUILDERS[name][0], model=str(folders[name]), dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert other.model.dtype == torch.bfloat16 and other.device.type == "cpu"
    assert ask(other, name, 1) and ask(other, name, 2)


# ---------------------------------------------------------------------- folders
FRESH = """
import hashlib, json, pickle, sys
{block}
from transformers import pipeline

def plain(value):
    if hasattr(value, "tobytes"):
        return [list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {{key: plain(item) for key, item in value.items()}}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

def answers(pipe, name):
    return [plain(pipe(*inputs, **options)) for inputs, options in given[name]]

with open(sys.argv[1], "rb") as file:
    jobs, given = pickle.load(file)
for task, folder, name in jobs:
    pipe = pipeline(*([task] if task else []), model=folder, trust_remote_code=True, device="cpu")
    assert pipe.task == name.split(" ")[0], (pipe.task, name)
    assert type(pipe).__module__.startswith("transformers_modules") == {blocked}, type(pipe)
    first = answers(pipe, name)
    print(json.dumps([name, first]))
    if task is None and {blocked}:
        pipe.save_pretrained(folder + "_again")
        assert answers(pipeline(model=folder + "_again", trust_remote_code=True, device="cpu"), name) == first, name
"""
BLOCK = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tokcom_hf":
            raise ImportError("tokcom_hf is not installed")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [True, False])
def test_a_folder_alone_brings_every_pipeline_back(pipes, folders, tmp_path, blocked):
    jobs, given, expected = [], {}, {}
    for number, (name, (task, _)) in enumerate(bench.BUILDERS.items()):
        given[name] = [bench.request(name, index) for index in (1, 4)]
        expected[name] = [ask(pipes[name], name, index) for index in (1, 4)]
        # What the model and its processors wrote, by the task's name and, where it is the folder's first, without.
        jobs.append((task, str(folders[name]), name))
        if name != "vq-tokenize":
            jobs.append((None, str(folders[name]), name))
        # What the pipeline wrote, away from everything it came from.
        pipes[name].save_pretrained(tmp_path / str(number))
        jobs.append((None, str(tmp_path / str(number)), name))
    file = tmp_path / "jobs.pkl"
    file.write_bytes(pickle.dumps((jobs, given)))
    code = FRESH.format(block=BLOCK if blocked else "import tokcom_hf", blocked=blocked)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment, timeout=600,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs)
    for name, answers in found:
        assert answers == json.loads(json.dumps(hashed(expected[name]))), name


def hashed(value):
    """A result of `bench.plain` as the fresh process prints it."""
    if isinstance(value, tuple):
        return [list(value[0]), hashlib.sha256(value[1]).hexdigest()]
    if isinstance(value, dict):
        return {key: hashed(item) for key, item in value.items()}
    return [hashed(item) for item in value] if isinstance(value, list) else value


@on("lfq-image-text on a VLM", "pruned-image-text-to-text", "vq-tokenize")
def test_a_saved_pipeline_holds_all_its_parts(pipe, request, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    again = pipeline(model=str(tmp_path / "moved"), trust_remote_code=True, device="cpu")
    again.save_pretrained(tmp_path / "second")
    names = {str(path.relative_to(tmp_path / "second")) for path in (tmp_path / "second").rglob("*")}
    task = request.node.callspec.params["pipe"].split(" ")[0]
    parts = {"vq-tokenize": {"preprocessor_config.json", "pipeline_vqgan.py"}}
    parts["lfq-image-text"] = {
        "processor_config.json",
        "base_processor",
        "image_decoder/config.json",
        "pipeline_lfq.py",
    }
    parts["pruned-image-text-to-text"] = {"processor_config.json", "base/config.json", "pipeline_pruned_vlm.py"}
    assert parts[task] <= names
    name = request.node.callspec.params["pipe"]
    final = pipeline(model=str(tmp_path / "second"), trust_remote_code=True, device="cpu")
    assert [ask(final, name, index) for index in (0, 1)] == [ask(pipe, name, index) for index in (0, 1)]
    with pytest.raises(ValueError, match=r"pipe\.push_to_hub"):
        pipe.save_pretrained(tmp_path / "third", push_to_hub=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_with_the_package_no_trust_is_asked_for_and_none_is_needed(folders):
    for name in NAMES:
        task = bench.BUILDERS[name][0]
        assert type(pipeline(task, model=str(folders[name]))).__module__.startswith("tokcom_hf.")
    config = tokcom_hf.VQGANConfig.from_pretrained(folders["vq-tokenize"])
    assert list(config.custom_pipelines) == ["vq-reconstruction"] and "vq-tokenize" not in config.custom_pipelines
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied.custom_pipelines) is type(config.custom_pipelines)
        assert copied.to_dict() == config.to_dict()


# ---------------------------------------------------------------------- trust
EVIL = "open({marker!r}, 'w').close()\n"


def test_trust_in_the_model_does_not_run_the_decoders_code(folders, tmp_path, monkeypatch):
    """Neither beside the model, nor below the working directory, nor where another repository is named."""
    marker, model = tmp_path / "executed", tmp_path / "model"
    shutil.copytree(folders["lfq-image-text"], model)
    for path in (model / "image_decoder").glob("*.py"):
        path.write_text(EVIL.format(marker=str(marker)) + path.read_text())
    shutil.copytree(model / "image_decoder", tmp_path / "image_decoder")
    monkeypatch.chdir(tmp_path)
    pipe = pipeline("lfq-image-text", model=str(model), trust_remote_code=True, device="cpu")
    assert type(pipe.image_decoder).__name__ == "VQGAN" and pipe("a red circle", seed=0)[0]["images"]
    pipe = pipeline(
        "lfq-image-text", model=str(model), image_decoder=str(tmp_path / "image_decoder"), trust_remote_code=True,
        device="cpu",
    )  # fmt: skip
    assert pipe("a red circle", seed=0)[0]["images"] and not marker.exists()
    # A model built in memory has no folder: what lies in the working directory is not its decoder.
    built = tokcom_hf.LFQExpandedModel.from_pretrained(folders["lfq-image-text"])
    built.config.name_or_path = ""
    processor = AutoProcessor.from_pretrained(folders["lfq-image-text"])
    other = pipeline("lfq-image-text", model=built, processor=processor, device="cpu")
    assert other.image_decoder is None and not marker.exists()


def test_another_decoder_needs_a_flag_of_its_own(folders, tmp_path):
    marker, decoder = tmp_path / "executed", tmp_path / "decoder"
    shutil.copytree(folders["lfq-image-text"] / "image_decoder", decoder)
    config = json.loads((decoder / "config.json").read_text())
    config["model_type"] = "somebodys_decoder"
    config["auto_map"] = {"AutoConfig": "decoder.Config", "AutoModel": "decoder.Model"}
    (decoder / "config.json").write_text(json.dumps(config))
    (decoder / "decoder.py").write_text(
        EVIL.format(marker=str(marker)) + "from tokcom_hf import VQGAN, VQGANConfig\n"
        "class Config(VQGANConfig):\n    model_type = 'somebodys_decoder'\n"
        "class Model(VQGAN):\n    config_class = Config\n"
    )
    options = {"model": str(folders["lfq-image-text"]), "image_decoder": str(decoder), "device": "cpu"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("lfq-image-text", trust_remote_code=True, **options)
    assert not marker.exists()
    pipe = pipeline("lfq-image-text", decoder_trust_remote_code=True, **options)
    assert marker.exists() and pipe("a red circle", seed=0)[0]["images"]


def test_a_decoder_on_the_hub_is_read_from_the_models_own_commit(folders, monkeypatch):
    """The model came from `user/name` at a commit: its decoder is looked for there, and nowhere else."""
    asked = []

    def absent(name, file, revision=None, **options):
        asked.append((name, file, revision))

    model = tokcom_hf.LFQExpandedModel.from_pretrained(folders["lfq-image-text"])
    model.config.name_or_path, model.config._commit_hash = "user/name", "f" * 40
    processor = AutoProcessor.from_pretrained(folders["lfq-image-text"])
    monkeypatch.setattr("tokcom_hf.models.pipeline_lfq.cached_file", absent)
    pipe = pipeline("lfq-image-text", model=model, processor=processor, device="cpu")
    assert pipe.image_decoder is None and asked == [("user/name", "image_decoder/config.json", "f" * 40)]
    ids = pipe("a red circle", num_image_tokens=4, seed=0)[0]
    assert ids["images"] == [ids["token_ids"]] and ids["generated_text"].count("<lfq:") == 4
