"""JSON lines that name images: what both readers of them take, what they refuse, and when."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokcom_hf import LFQProcessor
from tokcom_hf.data.caption_images import CaptionImageCollator
from tokcom_hf.data.captions import JointLFQCollator, read_image_text_jsonl
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.vqa import VQACollator, VQADataset, map_vqa_columns, read_vqa_jsonl, scene_rows
from tokcom_hf.data.vqa_sources import VQASourceArguments, load_vqa_rows
from tokcom_hf.small_models.small_internvl import scene_tile_processor
from tokcom_hf.small_models.small_vlm import scene_processor

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
READERS = [read_vqa_jsonl, read_image_text_jsonl]
ROW = {"image": "a.png", "question": "what ?", "answer": "this", "caption": "a thing"}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "outside.png")
    return folder


def write(folder, *rows, **options):
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(ROW | row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), **{"encoding": "utf-8"} | options)
    return path


def pixel(row):
    return row["image"].getpixel((0, 0))


# ----------------------------------------------------------------------------------------------------------- the opener
@pytest.mark.parametrize("read", READERS)
def test_images_are_read_upright_at_any_depth_on_white(folder, read):
    held = Image.Exif()
    held[0x112] = 8
    Image.new("RGB", (60, 30), "red").save(folder / "photo.webp", exif=held, lossless=True)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(folder / "deep.tif")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "clear.png")
    rows = read(write(folder, *({"image": name} for name in ("photo.webp", "deep.tif", "clear.png"))))
    assert rows[0]["image"].size == (30, 60) and rows[0]["image"].mode == "RGB"
    assert pixel(rows[1]) == (128,) * 3 and pixel(rows[2]) == (255,) * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
@pytest.mark.parametrize("read", READERS)
def test_separators_and_byte_order_marks_are_read(folder, read, separator, encoding):
    text = f"one{separator}two"
    rows = read(write(folder, {"question": text, "answer": text}, {}, encoding=encoding))
    assert len(rows) == 2 and rows[0]["questions"] == [text] and rows[0]["answers"] == [[text]]


# ------------------------------------------------------------------------------------------------------------- bad lines
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"', "not JSON"),
        ('["a.png", "what ?"]', "not a JSON object but an array"),
        ('{"image": "a.png", "caption": "\\ud83d", "question": "\\ud83d", "answer": "a"}', "half of a surrogate pair"),
        ({"question": 3}, "expected JSON with .*, but 'question' is 3, not a text"),
        ({"question": ["a"]}, "'question' is \\['a'\\], not a text"),
        ({"answer": []}, "'answer' is \\[\\], not a text or a list"),
        ({"answer": None}, "'answer' is None"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": [{"answer": "a"}]}, "'answer' is \\[\\{"),
        ({"image": 3}, "'image' is 3, not a path"),
        ({"image": ""}, "'image' is '', not a path"),
        ({"image": ["a.png"]}, "'image' is \\['a.png'\\]"),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_bad_lines_are_named(folder, read, line, message):
    path = write(folder, {}, {}, line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}"):
        read(path)


def test_numbers_are_answers_and_every_accepted_answer_is_kept(folder):
    for read in READERS:
        rows = read(write(folder, {"answer": 3, "type": 1}, {"answer": ["x", 2.5], "type": None}))
        assert [rows[index]["answers"] for index in range(2)] == [[["3"]], [["x", "2.5"]]]
        assert [rows[index]["types"] for index in range(2)] == [["1"], ["all"]]


@pytest.mark.parametrize("read", READERS)
def test_another_encoding_is_refused_at_its_line(folder, read):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not UTF-8 text"):
        read(write(folder, {}, {"question": "café ?"}, encoding="latin-1"))


# --------------------------------------------------------------------------------------------------------- broken images
@pytest.mark.parametrize("read", READERS)
def test_broken_images_are_found_before_a_row_is_read(folder, read):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.webp", "cut.tif"):
        noise.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "page.png").write_bytes(POSTSCRIPT)
    (folder / "empty.png").write_bytes(b"")
    names = ["cut.jpg", "cut.png", "cut.webp", "cut.tif", "page.png", "empty.png"]
    for name in names:
        with pytest.raises(ValueError, match=rf"1 image\(s\) cannot be read.*line 2: Cannot read image '.*{name}'"):
            read(write(folder, {}, {"image": name}))
    with pytest.raises(ValueError, match=r"6 image\(s\) cannot be read.*line 2: .*line 6: .*And 1 more"):
        read(write(folder, {}, *({"image": name} for name in names)))


def test_an_image_that_breaks_later_is_named_with_its_row(folder):
    rows = read_vqa_jsonl(write(folder, {}))
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Row 0: Cannot read image '.*a\.png'"):
        rows[0]


def test_hub_columns_are_read_by_the_same_opener(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    record = {"image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}, "question": "q", "answer": "a"}
    assert pixel(map_vqa_columns([record], "pope")[0]) == (255,) * 3
    with pytest.raises(ValueError, match=r"row 1 of 'pope': .*not an image of the formats"):
        map_vqa_columns([record, record | {"image": {"bytes": POSTSCRIPT, "path": None}}], "pope")
    with pytest.raises(ValueError, match="Row 0 of data set 'pope': the image is the text"):
        map_vqa_columns([record | {"image": str(tmp_path / "a.png")}], "pope")


# ----------------------------------------------------------------------------------------------------------------- trust
def outside(folder):
    return [
        "../outside.png",
        str(folder.parent / "outside.png"),
        str(folder / "a.png"),
        "pictures/../../outside.png",
        "./.././outside.png",
    ]


@pytest.mark.parametrize("read", READERS)
def test_paths_that_leave_the_folder_need_permission(folder, read):
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "a.png")
    for name in outside(folder):
        path = write(folder, {}, {"image": name})
        refused = r"rows\.jsonl, line 2: image .* (?:lies outside|is an absolute path).*--allow_outside true"
        with pytest.raises(ValueError, match=refused):
            read(path)
        with pytest.raises(ValueError, match=refused):
            read(path, image_dir=folder / "pictures")
        assert pixel(read(path, allow_outside=True)[1]) in ((0, 0, 255), (255, 0, 0))
    assert pixel(read(write(folder, {"image": "pictures/../a.png"}))[0]) == (255, 0, 0)
    with pytest.raises(ValueError, match="lies outside"):
        read(write(folder, {"image": "../nothing_here.png"}))


@pytest.mark.parametrize("read", READERS)
def test_links_in_the_folder_are_followed_but_not_left_upwards(folder, read):
    """`pictures/..` is the folder itself, not the parent of what `pictures` leads to."""
    (folder.parent / "store" / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), "lime").save(folder.parent / "store" / "deep" / "b.png")
    Image.new("RGB", (8, 8), "blue").save(folder.parent / "store" / "a.png")
    (folder / "pictures").symlink_to(folder.parent / "store" / "deep", target_is_directory=True)
    rows = read(write(folder, {"image": "pictures/b.png"}, {"image": "pictures/../a.png"}))
    assert [pixel(rows[0]), pixel(rows[1])] == [(0, 255, 0), (255, 0, 0)]


@pytest.mark.parametrize(
    "name",
    [
        "https://example.org/a.png",
        "http://127.0.0.1/a.png",
        "FILE:///etc/a.png",
        "s3://b/a.png",
        "data:image/png;base64,AA",
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_urls_are_refused_in_words(folder, read, name):
    for options in ({}, {"allow_outside": True}):
        with pytest.raises(ValueError, match=r"line 1: image .* is a URL; download it"):
            read(write(folder, {"image": name}), **options)


@pytest.mark.parametrize(
    "name", ["b.png", "shot 12:30.png", "a1:2.png", "folder", "x" * 300 + ".png", "a\0.png", "~/a.png"]
)
@pytest.mark.parametrize("read", READERS)
def test_missing_images_are_named_with_their_line(folder, read, name):
    (folder / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"line 1: image .* does not exist"):
        read(write(folder, {"image": name}))


def test_an_image_dir_that_is_no_folder_is_refused(folder):
    for read in READERS:
        for wrong in (folder / "a.png", folder / "none"):
            with pytest.raises(NotADirectoryError, match="does not exist or is not a folder"):
                read(write(folder, {}), image_dir=wrong)


def test_recipes_have_a_flag_for_it(folder):
    path = str(write(folder, {"image": "../outside.png"}))
    with pytest.raises(ValueError, match="lies outside"):
        load_vqa_rows(VQASourceArguments(eval_file=path), "base", training=False)
    source = VQASourceArguments(train_file=path, eval_file=path, allow_outside=True)
    assert [len(rows) for rows in load_vqa_rows(source, "base")] == [1, 1]


@pytest.mark.parametrize("name", ["train_joint_lfq", "image_tokens"])
def test_caption_recipes_take_a_folder_and_the_flag(folder, name):
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))
    path = str(write(folder, {"image": "outside.png"}))
    files = {"image_text_file": path, "eval_file": path}
    rows = recipe["build_data"](recipe["RunArguments"](**files, image_dir=str(folder.parent)))
    assert [pixel(part[0]) for part in rows] == [(0, 0, 255)] * 2
    write(folder, {"image": "../outside.png"})
    with pytest.raises(ValueError, match="lies outside"):
        recipe["build_data"](recipe["RunArguments"](**files))
    assert len(recipe["build_data"](recipe["RunArguments"](**files, allow_outside=True))[1]) == 1


# --------------------------------------------------------------------------------------------------------------- prompts
BRACES = '{question} Answer as {"answer": ...} or {} or {0} or {{x}}'


def test_other_braces_of_a_prompt_stay_as_they_are():
    class Echo:
        image_token = "<image>"
        tokenizer = scene_processor(32, 8).tokenizer

        def __call__(self, text, images=None, **options):
            self.said = text
            return self.tokenizer(text, **options)

    asked = "is {this} {question} ?"
    row = {"image": None, "questions": [asked, asked], "answers": [["a"], ["a"]], "types": ["t", "t"]}
    echo = Echo()
    follow_up = " {question} {more}"
    batch = VQACollator(echo, BRACES, follow_up)([row])
    assert echo.said == [asked + BRACES.removeprefix("{question}")]
    assert echo.tokenizer(f" {asked} {{more}}", add_special_tokens=False).input_ids[0] in batch["input_ids"][0]

    processor = scene_processor(32, 8)
    packed = PackedVQACollator(processor, "<image> " + BRACES)
    packed([scene_rows(1, 0, image_size=32)[0]])
    question = scene_rows(1, 0, image_size=32)[0]["questions"][0]
    assert f" {question}" + BRACES.removeprefix("{question}") in packed._cache

    tiles = scene_tile_processor(32, 4)
    image = Image.new("RGB", (32, 32))
    rows = [{"image": image, "questions": ["q"], "answers": [["a"]], "types": ["t"], "caption": "{a} red circle"}]
    batch = JointLFQCollator(tiles, caption_prompt='{"caption": "{caption}"}')(rows)
    expected = tiles.tokenizer('{"caption": "{a} red circle"}', add_special_tokens=False).input_ids
    assert batch["caption_ids"][0].tolist()[:-1] == expected

    lfq = LFQProcessor(tiles.tokenizer, len(tiles.tokenizer), 2, image_prompt='{"caption": "{caption}"}')
    batch = CaptionImageCollator(lfq)([{"caption": "{a} red circle", "codes": torch.tensor([1, 2])}])
    assert batch["input_ids"][0].tolist()[:-2] == expected


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: VQACollator(None, "<image> {quesiton}"), "prompt"),
        (lambda: VQACollator(None, follow_up=" next"), "follow_up"),
        (lambda: PackedVQACollator(None, "<image> what ?"), "prompt"),
        (lambda: JointLFQCollator(None, caption_prompt="{Caption}"), "caption_prompt"),
    ],
)
def test_a_prompt_without_its_placeholder_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"^{name} must contain \{{(question|caption)\}}"):
        make()


def test_rows_take_images_in_memory():
    rows = VQADataset([{"image": Image.new("RGBA", (8, 8), (0, 0, 0, 0))}, {"image": np.zeros((8, 8, 3), np.uint8)}])
    assert [pixel(rows[0]), pixel(rows[1])] == [(255,) * 3, (0,) * 3]
