"""Every data set and collator can be sent to worker processes that start afresh, as on macOS and Windows."""

import importlib
import pickle
import pkgutil
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import tokcom_hf.data
import tokcom_hf.small_models
from tokcom_hf import LFQProcessor, PrunedVLMConfig, VQGANImageProcessor
from tokcom_hf.data.caption_images import CaptionImageCollator, CaptionImages, CaptionTokens, PixelRows, draw_scenes
from tokcom_hf.data.captions import JointLFQCollator, scene_caption_rows
from tokcom_hf.data.image_limit import ImageLimit
from tokcom_hf.data.images import FolderImages, HubImages, ImageDataset, ProceduralImages, RandomCrops
from tokcom_hf.data.latent_rows import LatentRows
from tokcom_hf.data.packed_vqa import PackedVQACollator
from tokcom_hf.data.packing import PackedTextDataset, StreamedTextDataset
from tokcom_hf.data.scene_patches import ScenePatchDataset
from tokcom_hf.data.scene_questions import SceneQuestionDataset
from tokcom_hf.data.text import iterate_documents
from tokcom_hf.data.tokenizers import train_tokenizer
from tokcom_hf.data.vqa import VQACollator, VQADataset, scene_rows
from tokcom_hf.data.vqa_tasks import TaskCollator
from tokcom_hf.small_models.small_internvl import scene_tile_processor
from tokcom_hf.small_models.small_llama import _Captions
from tokcom_hf.small_models.small_vlm import scene_processor


@pytest.fixture(scope="module")
def processor():
    return VQGANImageProcessor(16, size_divisor=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    return folder


@pytest.fixture(scope="module")
def sets(processor, folder, tmp_path_factory):
    scenes = draw_scenes(3, 0)
    tokenizer = train_tokenizer(["a few words of text"] * 9, 300)
    file = tmp_path_factory.mktemp("latents") / "latents.npy"
    np.save(file, np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    text = file.with_name("corpus.txt")
    text.write_text("a few words of text\n\n\nand some more of them")
    packed = PackedTextDataset(np.arange(24, dtype=np.int32), 12, 0)
    rows = datasets.Dataset.from_dict({"image": [str(folder / "0.png"), str(folder / "1.png")]})
    return [
        ProceduralImages(3, processor),
        FolderImages(folder, processor, cache=True),
        HubImages(rows.cast_column("image", datasets.Image()), processor),
        RandomCrops(folder, processor, 2),
        PixelRows(CaptionImages(scenes, 16), processor),
        CaptionImages(scenes, 16),
        CaptionTokens(["a", "b"], torch.arange(8).view(2, 2, 2)),
        VQADataset([{"image": folder / "0.png", "questions": ["q"], "answers": [["a"]], "types": ["t"]}]),
        SceneQuestionDataset(2, 0, 16, {"count": 1}),
        ScenePatchDataset(2, 0, scene_processor(32, 8).image_processor, 32, 4),
        LatentRows(packed, file, torch.zeros(4), torch.ones(4)),
        packed,
        StreamedTextDataset(partial(iterate_documents, str(text)), tokenizer, 8),
        _Captions(["a red circle"], scene_tile_processor(16, 1).tokenizer),
    ]


def defined(suffix: str, base: type | None = None) -> set[type]:
    """Classes of the modules of `data` and `small_models`, by the end of their name or by their base class."""
    rooms = (tokcom_hf.data, tokcom_hf.small_models)
    names = [f"{room.__name__}.{m.name}" for room in rooms for m in pkgutil.iter_modules(room.__path__)]
    modules = [importlib.import_module(name) for name in names]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    ours = {kind for kind in kinds if kind.__module__ in names}
    return {kind for kind in ours if kind.__name__.endswith(suffix) or (base is not None and issubclass(kind, base))}


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def test_every_data_set_gives_the_same_rows_after_pickling(sets):
    assert {type(data) for data in sets} == defined("Dataset", torch.utils.data.Dataset) - {ImageDataset}
    for data in sets:
        for again in (
            pickle.loads(pickle.dumps(data)),
            pickle.loads(pickle.dumps(torch.utils.data.Subset(data, [0]))),
        ):
            if isinstance(again, torch.utils.data.Subset):
                if not isinstance(data, torch.utils.data.IterableDataset):
                    assert same(again[0], data[0]), type(data).__name__
            elif isinstance(data, torch.utils.data.IterableDataset):
                assert all(map(same, again, data)) and sum(1 for _ in again) > 0
            else:
                assert len(again) == len(data) > 0
                assert all(same(again[index], data[index]) for index in range(len(data))), type(data).__name__


def test_caches_and_mapped_files_are_not_sent(sets):
    for data in sets:
        for index in range(0 if isinstance(data, torch.utils.data.IterableDataset) else len(data)):
            data[index]
    size = {type(data).__name__: len(pickle.dumps(data)) for data in sets}
    again = next(pickle.loads(pickle.dumps(data)) for data in sets if isinstance(data, LatentRows))
    assert isinstance(again.latents, np.memmap)
    assert size["FolderImages"] < 6 * 16 * 16 * 3 and size["ProceduralImages"] < 3 * 16 * 16 * 3


def test_every_collator_gives_the_same_batch_after_pickling():
    tiles, vlm = scene_tile_processor(32, 4), scene_processor(32, 8)
    captions, questions = scene_caption_rows(2, 0, 1, image_size=32), scene_rows(2, 0, image_size=32)
    lfq = LFQProcessor(tiles.tokenizer, len(tiles.tokenizer), 2)
    codes = CaptionTokens([row["caption"] for row in captions.rows], torch.arange(8).view(2, 4) % 4)
    # 16 tokens of each picture, of which a strategy keeps 4.
    limit = ImageLimit(vlm, 24, 4, PrunedVLMConfig(strategy="uniform", keep=4).tokens_kept)
    cases = [
        (VQACollator(vlm), questions),
        (TaskCollator(VQACollator(vlm, image_limit=limit)), questions),
        (PackedVQACollator(vlm), questions),
        (JointLFQCollator(tiles), captions),
        (CaptionImageCollator(lfq), codes),
    ]
    assert {type(collator) for collator, _ in cases} == defined("Collator")
    for collator, data in cases:
        rows = [data[index] for index in range(2)]
        assert same(pickle.loads(pickle.dumps(collator))(rows), collator(rows)), type(collator).__name__


def test_worker_processes_that_start_afresh_read_an_image_folder(folder, processor):
    images = FolderImages(folder, processor, cache=True)
    images[0]
    train = torch.utils.data.Subset(images, [4, 1, 5, 0])
    loader = torch.utils.data.DataLoader(train, batch_size=1, num_workers=2, multiprocessing_context="spawn")
    read = [batch["pixel_values"][0] for batch in loader]
    assert len(read) == 4
    for pixels, index in zip(read, train.indices):
        torch.testing.assert_close(pixels, images[index]["pixel_values"], atol=0.005, rtol=0)
