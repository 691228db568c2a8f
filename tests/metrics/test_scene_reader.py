"""The reader finds what was drawn, and nothing in what was not."""

import numpy as np
import pytest
from PIL import Image

from tokcom_hf.data.caption_images import draw_scenes
from tokcom_hf.data.scenes import Scene, SceneObject, render_scene
from tokcom_hf.evaluation.scene_reader import SceneReader, score_scene


@pytest.fixture(scope="module")
def reader():
    return SceneReader(48, 3)


def test_rendered_scenes_are_read_right(reader):
    scenes = draw_scenes(100, 3, min_objects=1, max_objects=2, grid=3)
    scores = [score_scene(scene, reader.read(render_scene(scene, 48))) for scene in scenes]
    assert sum(score["place"] for score in scores) >= 99
    # The scene of another caption is not taken for it.
    wrong = [score_scene(scenes[i - 1], reader.read(render_scene(scenes[i], 48))) for i in range(100)]
    assert sum(score["shape_and_colour"] for score in wrong) <= 6


def test_noise_and_blur(reader):
    scene = Scene(
        (SceneObject("ring", "blue", "large", 1, 2), SceneObject("cross", "red", "small", 0, 0)), 3, (60, 62, 70)
    )
    pixels = np.asarray(render_scene(scene, 48), dtype=float) + np.random.default_rng(0).normal(0, 20, (48, 48, 3))
    found = reader.read(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert found == {(1, 2): ("ring", "blue"), (0, 0): ("cross", "red")}
    assert reader.read(Image.new("RGB", (48, 48), (210, 208, 200))) == {}
    moved = Scene(
        (SceneObject("ring", "blue", "large", 0, 0), SceneObject("cross", "red", "small", 2, 2)), 3, (0, 0, 0)
    )
    assert score_scene(moved, found) == {"shape_and_colour": True, "place": False, "shape": True, "colour": True}
    other = Scene(
        (SceneObject("ring", "red", "large", 1, 2), SceneObject("cross", "blue", "small", 0, 0)), 3, (0, 0, 0)
    )
    assert score_scene(other, found) == {"shape_and_colour": False, "place": False, "shape": True, "colour": True}


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiple of grid 3"):
        SceneReader(50, 3, shapes=("ring",), colours=("red",))
    with pytest.raises(ValueError, match=r"Expected 6 × 6 pixels, got \(5, 6\)"):
        SceneReader(6, 3, shapes=("ring",), colours=("red",)).read(Image.new("RGB", (5, 6)))
