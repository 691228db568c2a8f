"""Procedural scenes: seeded, answerable from the picture, and not answerable from the question."""

import collections
import random

import numpy as np
import pytest

from tokcom_hf.data.scenes import (
    QUESTION_TYPES,
    balanced_examples,
    possible_answers,
    render_scene,
    sample_scene,
    scene_caption,
    scene_questions,
)


def test_same_seed_gives_same_scene_image_and_questions():
    first, second = random.Random(3), random.Random(3)
    a, b = sample_scene(first), sample_scene(second)
    assert a == b and scene_caption(a) == scene_caption(b)
    assert scene_questions(a, first) == scene_questions(b, second)
    assert np.array_equal(np.asarray(render_scene(a)), np.asarray(render_scene(b)))


def test_picture_shows_every_object():
    scene = sample_scene(random.Random(0), 4, 4)
    image = np.asarray(render_scene(scene, 128)).astype(int)
    assert image.shape == (128, 128, 3)
    for item in scene.objects:
        cell = image[item.row * 32 : item.row * 32 + 32, item.column * 32 : item.column * 32 + 32]
        assert (abs(cell - np.array(scene.background)).sum(-1) > 60).mean() > 0.1
        assert item.shape in scene_caption(scene) and item.colour in scene_caption(scene)


def test_question_alone_scores_near_chance():
    examples = list(balanced_examples(random.Random(1), 6000))
    train, held_out = examples[:4000], examples[4000:]
    votes = collections.defaultdict(collections.Counter)
    for example in train:
        votes[example.questions[0].question][example.questions[0].answer] += 1
    for kind in QUESTION_TYPES:
        questions = [e.questions[0] for e in held_out if e.questions[0].type == kind]
        hits = [votes[q.question].most_common(1)[0][0] == q.answer for q in questions if votes[q.question]]
        assert np.mean(hits) < 1 / len(possible_answers(kind)) + 0.1, kind


def test_count_answers_are_right():
    rng = random.Random(5)
    for example in balanced_examples(rng, 60, types=("count",)):
        question = example.questions[0]
        word = question.question.split()[2]
        objects = example.scene.objects
        expected = sum(o.colour == word or word in (o.shape + "s", o.shape + "es") for o in objects)
        assert question.answer == str(expected)


def test_relation_answers_are_right():
    rng = random.Random(6)
    for example in balanced_examples(rng, 60, types=("relation",)):
        question = example.questions[0]
        word = question.question.split()[4]
        column = word in ("leftmost", "rightmost")
        ends = sorted(example.scene.objects, key=lambda o: o.column if column else o.row)
        first, second = ends[:2] if word in ("leftmost", "topmost") else ends[:-3:-1]
        assert question.answer == first.shape
        assert (first.column != second.column) if column else (first.row != second.row)


def test_bad_ranges_and_names_are_refused():
    with pytest.raises(ValueError, match="holds 1 to 4"):
        sample_scene(random.Random(0), 3, 9, grid=2)
    with pytest.raises(ValueError, match="Unknown shapes"):
        sample_scene(random.Random(0), shapes=("blob",))
