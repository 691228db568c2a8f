"""Image data: reproducible scenes, folders with bad files, unusual images."""

import numpy as np
import pytest
import torch
from PIL import Image

from tokcom_hf.data.images import (
    FolderImages,
    HubImages,
    ImageSource,
    ProceduralImages,
    RandomCrops,
    image_datasets,
    procedural_scene,
)
from tokcom_hf.models.image_processing_vqgan import VQGANImageProcessor


@pytest.fixture
def processor():
    return VQGANImageProcessor(16, size_divisor=8)


def save(path, *arguments, mode="RGB", size=(20, 24), **options):
    Image.new(mode, size, *arguments).save(path, **options)
    return str(path)


def test_scenes_are_seeded_and_differ():
    first, again, other = (np.asarray(procedural_scene(seed, 32)) for seed in (3, 3, 4))
    assert first.shape == (32, 32, 3) and (first == again).all() and (first != other).any()


def test_cached_items_equal_fresh_ones(processor):
    images = ProceduralImages(4, processor)
    assert torch.allclose(images[2]["pixel_values"], images[2]["pixel_values"], atol=1e-6)
    assert not torch.equal(images[0]["pixel_values"], ProceduralImages(4, processor, first=4)[0]["pixel_values"])


def test_corrupt_files_are_skipped_and_counted(tmp_path, processor):
    save(tmp_path / "a.png", "red")
    save(tmp_path / "b.jpg", "blue")
    whole = (tmp_path / "b.jpg").read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "c.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:2000])
    (tmp_path / "d.jpg").write_bytes(b"")
    (tmp_path / "e.jpg").write_bytes(whole[:3] + b"not a picture")
    (tmp_path / "f.gif").write_bytes(b"GIF89a" + b"\0" * 9)
    with pytest.warns(UserWarning, match="Skipped 4 of 6"):
        images = FolderImages(tmp_path, processor)
    assert len(images) == 2 and len(images.skipped) == 4 and images[1]["pixel_values"].shape == (3, 16, 16)


def test_linked_folders_are_read_once_and_circles_end(tmp_path, processor):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "dogs", elsewhere / "cats" / "young"):
        folder.mkdir(parents=True)
        save(folder / "a.PNG", "red")
        save(folder / "b.Jpeg", "blue")
    (photos / "cats").symlink_to(elsewhere / "cats", target_is_directory=True)
    assert [str(path.relative_to(photos)) for path in FolderImages(photos, processor).files] == [
        "cats/young/a.PNG", "cats/young/b.Jpeg", "dogs/a.PNG", "dogs/b.Jpeg",
    ]  # fmt: skip
    # Circles, and a second way to a folder: no image may be trained on and held out at once.
    (photos / "all").symlink_to(photos, target_is_directory=True)
    (photos / "a_second_name").symlink_to(photos / "dogs", target_is_directory=True)
    (elsewhere / "cats" / "up").symlink_to(elsewhere, target_is_directory=True)
    files = FolderImages(photos, processor).files
    assert len(files) == len({path.resolve() for path in files}) == 4 and photos / "dogs" / "a.PNG" in files
    (photos / "c.png").symlink_to(photos / "dogs" / "a.PNG")
    assert len(FolderImages(photos, processor)) == 5
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    assert len(FolderImages(tmp_path / "link", processor)) == 5


def test_links_that_lead_nowhere_are_told(tmp_path, processor):
    save(tmp_path / "a.png", "red")
    (tmp_path / "cats").symlink_to(tmp_path / "unmounted", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"1 links in .* are broken: .*cats"):
        assert len(FolderImages(tmp_path, processor)) == 1


def test_hidden_names_are_left_out(tmp_path, processor):
    folder = tmp_path / ".hidden_above"
    for name in ("a.png", "._a.png", ".thumbs/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / name, "red")
    assert [path.name for path in FolderImages(folder, processor).files] == ["a.png"]


def test_folders_without_images_say_what_they_hold(tmp_path, processor):
    for name in ("a.heic", "b.HEIC", "notes"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"No images in .*\.png.*found 2 of \.heic, 1 of no suffix"):
        FolderImages(tmp_path, processor)
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        FolderImages(tmp_path / "a.heic", processor)


def test_columns_of_data_sets_are_read_by_the_same_opener(tmp_path, processor):
    datasets = pytest.importorskip("datasets")
    save(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    files = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for data in files], "text": ["a", "b"]})
    rows = rows.cast_column("image", datasets.Image())
    images = HubImages(rows, processor, name="some/photos")
    assert images[0]["pixel_values"].min() == 1
    with pytest.raises(ValueError, match=r"some/photos, row 1: .*not an image of the formats"):
        images[1]
    with pytest.raises(ValueError, match="some/photos has no column 'picture'; it has image, text"):
        HubImages(rows, processor, "picture", "some/photos")
    with pytest.raises(ValueError, match="row 0: the image is the text 'a'; name a column that holds images"):
        HubImages(rows, processor, "text")[0]


def test_empty_and_missing_folders_are_errors(tmp_path, processor):
    with pytest.raises(ValueError, match="No images"):
        FolderImages(tmp_path, processor)
    with pytest.raises(NotADirectoryError, match="does not exist"):
        FolderImages(tmp_path / "none", processor)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 1"):
        FolderImages(tmp_path, processor)


def test_folder_is_split_without_overlap(tmp_path, processor):
    for number in range(12):
        save(tmp_path / f"{number:02d}.png", (number * 20, 0, 0))
    train, held_out = image_datasets(processor, ImageSource(image_dir=str(tmp_path)))
    assert len(train) == 10 and len(held_out) == 2 and not set(train.indices) & set(held_out.indices)
    crops = RandomCrops(tmp_path, processor, 3)
    assert len(crops) == 36 and crops[35]["pixel_values"].shape == (3, 16, 16)


def colour(processor, image) -> list[float]:
    return ((processor(image)["pixel_values"][0].mean((1, 2)) + 1) * 127.5).round().tolist()


def test_unusual_images_are_converted(tmp_path, processor):
    assert colour(processor, Image.new("CMYK", (20, 20), (0, 255, 255, 0)))[0] > 200
    assert colour(processor, Image.new("RGBA", (20, 20), (255, 0, 0, 0))) == [255, 255, 255]
    assert colour(processor, Image.new("L", (20, 20), 77)) == [77, 77, 77]
    assert colour(processor, Image.new("1", (20, 20), 1)) == [255, 255, 255]
    deep = Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16))
    assert colour(processor, deep) == [128, 128, 128]
    deep.save(tmp_path / "deep.png")
    assert colour(processor, tmp_path / "deep.png") == [128, 128, 128]
    # A dark 16-bit image is no bright 8-bit one.
    assert colour(processor, Image.fromarray(np.full((20, 20), 257, dtype=np.uint16))) == [1, 1, 1]
    assert colour(processor, np.ones((20, 20), dtype=bool)) == [255, 255, 255]
    frames = [Image.new("RGB", (20, 20), name) for name in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colour(processor, str(tmp_path / "a.gif"))[0] == 255
    assert colour(processor, np.full((20, 20, 3), 0.5)) == [128, 128, 128]
    assert colour(processor, torch.full((3, 20, 20), 255, dtype=torch.uint8)) == [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90° to the left
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = VQGANImageProcessor(16, resize_mode="none")(str(tmp_path / "turned.png"))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 16) and pixels[0, 0, :16].mean() > 0.9 > -0.9 > pixels[0, 0, 16:].mean()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_one_to_four_channels_round_trip(channels):
    processor = VQGANImageProcessor(16, num_channels=channels)
    pixels = processor(Image.new("RGBA", (16, 16), (10, 200, 30, 255)))["pixel_values"]
    assert pixels.shape == (1, channels, 16, 16)
    again = processor(processor.postprocess(pixels))["pixel_values"]
    torch.testing.assert_close(again, pixels, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty side"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "1 to 4 channels"),
        (np.full((4, 4), np.nan), ValueError, "NaN"),
        (b"bytes", TypeError, "PIL image"),
        ("/no/such/file.png", ValueError, "Cannot read"),
        ([], ValueError, "No images"),
    ],
)
def test_bad_images_are_refused(processor, image, error, message):
    with pytest.raises(error, match=message):
        processor(image)


def test_sizes_that_cannot_be_cut_are_refused():
    processor = VQGANImageProcessor(16, resize_mode="none")
    with pytest.raises(ValueError, match="smaller than 8"):
        processor(Image.new("RGB", (5, 40)))
    with pytest.raises(ValueError, match="one size"):
        processor([Image.new("RGB", (16, 16)), Image.new("RGB", (24, 16))])
