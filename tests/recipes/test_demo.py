"""recipes/demo.py: what its four tabs compute on tiny models, the page, and the page in a browser."""

import importlib.util
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.chromium import PROGRAM, Page
from tests.helpers.recipes import load
from tokcom_hf import LFQProcessor, PrunedVLM
from tokcom_hf.evaluation.tokcom_reconstruction import token_and_chunk_accuracy
from tokcom_hf.metrics.codebook import codebook_usage

RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = "how many red squares are there ?"
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
MISSING = [*(["gradio (pip install '.[demo]')"] * (not HAS_GRADIO)), *(["Chromium"] * (PROGRAM is None))]


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model for every tab, as its recipe leaves one."""
    build = load("pipeline_threads")
    builders = {
        "tokcom": build.build_tokcom, "vqgan": build.build_vqgan, "pruned": build.build_pruned_vlm,
        "images": build.build_lfq,
    }  # fmt: skip
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("demo")
    for name, builder in builders.items():
        builder(root / name)
    return {name: root / name for name in builders}


@pytest.fixture(scope="module")
def pipes(demo, paths):
    """Tab's option -> its pipeline, on the CPU."""
    tasks = {
        "tokcom": "tokcom-generation", "vqgan": "vq-reconstruction", "pruned": "pruned-image-text-to-text",
        "images": "lfq-image-text",
    }  # fmt: skip
    return {name: demo.ModelFolder(str(paths[name]), task, "").pipeline() for name, task in tasks.items()}


# ---------------------------------------------------------------------- folders
def test_a_missing_folder_names_its_command_and_one_made_later_is_used(demo, paths, tmp_path):
    path = tmp_path / "later"
    folder = demo.ModelFolder(str(path), "vq-reconstruction", "accelerate launch recipes/train_vqgan.py")
    assert (
        "`accelerate launch recipes/train_vqgan.py`" in folder.status() and "later` holds no model" in folder.status()
    )
    with pytest.raises(FileNotFoundError, match=r"later holds no model yet.*launch recipes/train_vqgan\.py makes it"):
        folder.pipeline()
    path.symlink_to(paths["vqgan"])
    steps = []
    pipe = folder.pipeline(lambda share, desc: steps.append(desc))
    assert steps == [f"Loading {path}", "Running"] and folder.pipeline() is pipe
    assert "loaded at the first click" in folder.status()


# ---------------------------------------------------------------------- text
def test_writing_is_the_pipelines_and_minus_one_is_the_models_block_size(demo, pipes):
    pipe = pipes["tokcom"]
    text, said = demo.text.write(pipe, "a red", 5, -1, 3, 1.0, 4)
    options = {"num_generate_chunks": 5, "num_steps": 3, "seed": 4}
    assert text == pipe("a red", **options)[0]["generated_text"] and said.startswith("20 tokens in ")
    assert (
        demo.text.write(pipe, "a red", 5, 4, 3, 1.0, 4)[0]
        == pipe("a red", block_size=4, **options)[0]["generated_text"]
    )
    cold = [demo.text.write(pipe, "a red", 5, -1, 3, 0.0, seed)[0] for seed in (1, 2)]
    assert cold[0] == cold[1] != text
    nothing = demo.text.write(pipe, "", 5, 0, 3, 1.0, 4)[0]
    assert nothing == pipe(num_chunks=5, num_steps=3, block_size=0, seed=4)[0]["generated_text"]


def test_wrong_tokens_are_marked_and_markup_in_a_text_stays_text(demo, pipes):
    tokenizer = pipes["tokcom"].tokenizer
    ids = torch.tensor(tokenizer("a red circle", add_special_tokens=False).input_ids)
    other = ids.clone()
    other[1:3] = tokenizer("?", add_special_tokens=False).input_ids[0]
    pieces, accuracy = demo.text.marked(tokenizer, other, ids)
    assert [wrong for _, wrong in pieces] == [None, "wrong", None] and accuracy == (len(ids) - 2) / len(ids)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode(other)
    shown = demo.text.as_html([("<b>", None), ("&", "wrong")])
    assert "&lt;b&gt;" in shown and re.search(r"<mark [^>]*>&amp;</mark>", shown) and shown.count("<mark") == 1


def test_reconstruction_without_noise_is_the_models_and_noise_costs_tokens(demo, pipes, monkeypatch):
    pipe = pipes["tokcom"]
    ids, count = demo.text.token_rows(pipe, TEXT)
    assert (
        ids.shape[1] % 4 == 0 and ids[0, :count].tolist() == pipe.tokenizer(TEXT, add_special_tokens=False).input_ids
    )
    pieces, said = demo.text.reconstruct(pipe, TEXT, 0.0, 0)
    decoded = pipe.model.reconstruct(ids)[:, :count]
    assert pieces == demo.text.marked(pipe.tokenizer, decoded[0], ids[0, :count])[0]
    # A pair that loses nothing: what is wrong is the noise's doing.
    monkeypatch.setattr(pipe.model, "encode", lambda ids: ids.view(1, -1, 4).float())
    monkeypatch.setattr(pipe.model, "decode", lambda latents: latents.round().long().clamp(0, 279).flatten(1))
    pieces, said = demo.text.reconstruct(pipe, TEXT, 0.0, 0)
    assert pieces == [(TEXT, None)] and said.startswith(f"100.0% of {count} tokens right")
    _, noisy = demo.text.reconstruct(pipe, TEXT, 0.01, 0)
    assert float(noisy.split("%")[0]) < 100 and noisy == demo.text.reconstruct(pipe, TEXT, 0.01, 0)[1]
    with pytest.raises(ValueError, match="makes no token"):
        demo.text.reconstruct(pipe, "", 0.0, 0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "multistep", "renoise"])
def test_the_last_step_of_denoising_is_what_denoise_reconstruct_gives(demo, pipes, monkeypatch, sampler):
    pipe = pipes["tokcom"]
    monkeypatch.setattr(pipe.model.config, "sampler", sampler)
    ids, count = demo.text.token_rows(pipe, TEXT)
    rows = list(demo.text.denoise(pipe, TEXT, 0.5, 6, 3))
    assert [(step, round(t, 6)) for step, t, _, _ in rows] == [(0, 0.5), (1, 0.666667), (2, 0.833333), (3, 1.0)]
    generator = torch.Generator().manual_seed(3)
    expected = pipe.model.denoise_reconstruct(ids, 0.5, 6, generator=generator)[:, :count]
    accuracy = token_and_chunk_accuracy(expected, ids[:, :count], torch.ones_like(expected), 1)["token_accuracy"]
    assert rows[-1][2:] == demo.text.marked(pipe.tokenizer, expected[0], ids[0, :count])
    assert rows[-1][3] == pytest.approx(accuracy)
    tables = list(demo.denoise_text(pipe, TEXT, 0.5, 6, 3))
    assert [table.count("<tr>") for table in tables] == [2, 3, 4, 5]


# ---------------------------------------------------------------------- image codes
def test_code_maps_and_the_use_of_codes(demo, pipes):
    codes = torch.arange(1024).view(32, 32)
    pixels = np.asarray(demo.image_codes.code_map(codes)).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 900  # nearly as many colours as codes
    one = demo.image_codes.code_map(torch.tensor([[5, 9], [9, 5]]))
    assert one.getpixel((0, 0)) == one.getpixel((1, 1)) != one.getpixel((1, 0)) == one.getpixel((0, 1))
    image = demo.image_codes.example_image(3)
    seen, rebuilt, coded, table = demo.image_codes.reconstruct(pipes["vqgan"], image)
    result = pipes["vqgan"](image)
    assert seen.size == rebuilt.size == (16, 16) and rebuilt.tobytes() == result["image"].tobytes()
    assert coded.tobytes() == demo.image_codes.code_map(torch.tensor(result["codes"])).tobytes()
    usage = codebook_usage(torch.tensor(result["codes"]), 16)
    assert (
        f"| {usage['active']} ({usage['utilization']:.1%}" in table and f"{usage['normalized_entropy']:.3f} |" in table
    )
    with pytest.raises(ValueError, match="no image"):
        demo.image_codes.reconstruct(pipes["vqgan"], None)


# ---------------------------------------------------------------------- pruning
def layers_of(table: str) -> list[list[int]]:
    cells = next(line for line in table.splitlines() if "per layer" in line).split("|")[2:4]
    return [list(map(int, cell.split())) for cell in cells]


def test_the_slider_sets_how_many_vision_tokens_go_on(demo, pipes, paths):
    image, question, answer = demo.pruning.example_question(str(paths["pruned"]), 1)
    assert question.endswith("?") and " " not in answer
    # Trained for 8 of 16 tokens, then 5, then 2: half of the tokens is the training's own budget.
    expected = {1.0: [16, 10, 4, 4], 0.5: [8, 5, 2, 2], 0.3: [5, 3, 1, 1], 0.01: [1, 1, 1, 1]}
    for share, layers in expected.items():
        pictures, table = demo.pruning.answer(pipes["pruned"], image, question, share)
        assert layers_of(table) == [[16] * 4, layers]
        kept = [int(re.search(r": (\d+) of 16 kept", caption)[1]) for _, caption in pictures]
        assert kept == list(dict.fromkeys(layers))
    flops = re.findall(r"\((\d+\.\d)%\)", table)
    assert flops[0] == "100.0" and float(flops[1]) < 50
    own = pipes["pruned"]({"image": image, "text": f"<image> {question}"}, pruning_mode="origin", max_new_tokens=16)
    assert f"| **{own['generated_text']}** |" in table


def test_patches_that_go_are_dark_and_words_that_the_model_lacks_are_named(demo, pipes, monkeypatch):
    image = Image.new("RGBA", (96, 64), (0, 0, 0, 0))  # transparent: white to the model
    pictures, table = demo.pruning.answer(pipes["pruned"], image, "how many zebras are there ?", 0.3)
    shares = [float((np.asarray(picture)[: picture.width, :, 0] == 255).mean()) for picture, _ in pictures]
    assert shares == pytest.approx([5 / 16, 3 / 16, 1 / 16])
    assert table.endswith("Not in the model's vocabulary: zebras.")
    monkeypatch.setattr(demo.pruning, "kept_grids", lambda *_: [])  # as for images that are no squares
    pictures, table = demo.pruning.answer(pipes["pruned"], image, "how many circles are there ?", 0.3)
    assert pictures == [] and table.endswith("No picture: this model's tokens make no square grid of patches.")
    for picture, question in ((None, "how many ?"), (image, " ")):
        with pytest.raises(ValueError, match="an image and a question"):
            demo.pruning.answer(pipes["pruned"], picture, question, 0.3)


def test_the_budget_of_pruners_alone_of_a_ratio_and_of_a_strategy(demo, pipes):
    base = pipes["pruned"].model.base
    config = pipes["pruned"].model.layer_pruner.config.to_dict() | {"keep_tokens": [8, 2]}
    pruners = PrunedVLM.from_base(base, layer_pruner=type(pipes["pruned"].model.layer_pruner.config)(**config))
    demo.pruning.set_budget(pruners, 16, 0.25)
    assert pruners.layer_pruner.config.keep_tokens == [4, 1]
    ratio = pipes["pruned"].model.token_merger.config.to_dict() | {"target_merge_tokens": None, "merge_ratio": 0.25}
    merger = PrunedVLM.from_base(base, type(pipes["pruned"].model.token_merger.config)(**ratio))
    demo.pruning.set_budget(merger, 16, 0.5)
    assert merger.token_merger.tokens_kept(16) == 8
    strategy = PrunedVLM.from_base(base, strategy="divprune", keep=3)
    demo.pruning.set_budget(strategy, 16, 0.5)
    assert strategy.config.keep == 8


# ---------------------------------------------------------------------- drawing
def test_drawings_follow_caption_number_and_seed(demo, pipes, monkeypatch):
    caption = demo.drawing.example_caption(0)
    assert caption.startswith("a ") and caption != demo.drawing.example_caption(1)
    draw = lambda *values: [image.tobytes() for image in demo.drawing.draw(pipes["images"], *values)[0]]  # noqa: E731
    first = draw(caption, 3, 1.5, 1.0, 0)
    assert len(first) == 3 and first == draw(caption, 3, 1.5, 1.0, 0) != draw(caption, 3, 1.5, 1.0, 1)
    assert first != draw(caption, 3, 4.0, 1.0, 0)
    assert demo.drawing.draw(pipes["images"], caption, 3, 1.5, 1.0, 0)[1].startswith("48 tokens in ")
    with pytest.raises(ValueError, match="no caption"):
        draw(" ", 1, 1.5, 1.0, 0)
    monkeypatch.setattr(pipes["images"], "image_decoder", None)
    with pytest.raises(ValueError, match="no image_decoder/"):
        draw(caption, 1, 1.5, 1.0, 0)
    assert isinstance(pipes["images"].processor, LFQProcessor)


# ---------------------------------------------------------------------- the page
def test_options_that_cannot_be_used_and_a_missing_gradio_are_named(demo, monkeypatch):
    with pytest.raises(ValueError, match=r"--prompt must contain \{question\}"):
        demo.main(["--prompt", "<image> question"])
    with pytest.raises(ValueError, match="expected int, got 'x'"):
        demo.main(["--port", "x"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'tokcom_hf\[demo\]'"):
        demo.main(["--threads", "1"])


@pytest.mark.skipif(not HAS_GRADIO, reason=f"missing: {', '.join(MISSING[:1])}")
def test_the_page_has_four_tabs_and_loads_nothing_before_a_click(demo, paths, monkeypatch):
    monkeypatch.setattr(demo.ModelFolder, "pipeline", lambda *_: pytest.fail("a model was loaded"))
    page = demo.build(demo.DemoArguments(tokcom=str(paths["tokcom"])))
    texts = [str(part["props"].get("label")) for part in page.config["components"] if part["type"] == "tabitem"]
    assert texts == ["Text", "Image codes", "Pruning", "Drawing"] and page.analytics_enabled is False
    told = " ".join(
        str(part["props"].get("value")) for part in page.config["components"] if part["type"] == "markdown"
    )
    assert f"Model: `{paths['tokcom']}`" in told
    for command in ("train_vqgan.py", "train_token_pruning.py", "image_tokens.py"):
        assert f"`accelerate launch recipes/{command}` makes it" in told


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"missing: {' and '.join(MISSING)}")
def test_each_tab_is_used_once_in_a_browser(demo, paths, tmp_path, capsys):
    later = tmp_path / "image_tokens"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(path) for name, path in (paths | {"images": later}).items()}
    args = demo.DemoArguments(**folders, port=port)
    served = demo.serve(args)
    assert capsys.readouterr().out == f"Open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends the demo.\n"
    says = "document.body.innerText.includes({!r})".format
    pictures = "[...document.querySelectorAll('img')].filter(one => one.checkVisibility()).length >= {}".format
    try:
        with pytest.raises(OSError, match=f"on port {port} of 127.0.0.1; choose another --port"):
            demo.serve(args)
        with Page(f"http://127.0.0.1:{port}", tmp_path / "profile") as page:
            page.wait(says("fewer tokens"))
            for button, result in (("Write", "tokens a second"), ("Reconstruct", "tokens right"), ("Denoise", "1.00")):
                page.click(button)
                page.wait(says(result))
            page.wait("document.querySelectorAll('tr').length == 6")  # the head, the start and four of eight steps
            page.screenshot(tmp_path / "text.png")
            page.click("Image codes")
            page.click("Draw an example")
            page.wait(pictures(1))
            page.click("Reconstruct")
            page.wait(says("normalised entropy") + " && " + pictures(4))
            page.screenshot(tmp_path / "codes.png")
            page.click("Pruning")
            page.click("Draw an example")
            page.wait(pictures(1))
            page.click("Answer")
            page.wait(says("KV cache") + " && " + pictures(4))
            page.screenshot(tmp_path / "pruning.png")
            page.click("Drawing")
            page.wait(says("accelerate launch recipes/image_tokens.py"))
            page.click("Draw")
            page.wait(
                says("image_tokens holds no model yet")
            )  # the message of the click, without the Markdown's marks
            page.screenshot(tmp_path / "missing.png")
            later.symlink_to(paths["images"])
            page.click("Draw")
            page.wait(says("image tokens.") + " && " + pictures(4))
            page.click("Text")
            page.click("Drawing")
            page.wait(says("image_tokens, loaded at the first click"))
            page.screenshot(tmp_path / "drawing.png")
            asked = {url for url in page.requested() if not url.startswith(("data:", "blob:", "about:"))}
    finally:
        served.close()
    assert asked and all(url.startswith(f"http://127.0.0.1:{port}/") for url in asked)
    for name in ("text", "codes", "pruning", "missing", "drawing"):
        with Image.open(tmp_path / f"{name}.png") as image:
            # A page that shows something has more than a few colours.
            assert image.width == 1280 and len(image.convert("RGB").getcolors(1 << 24)) > 50, name
