"""The detector reads the drawings themselves without error, and blurred or small ones nearly so."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from demo_data import (
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    caption,
    draw,
    evaluation_prompts,
    is_held_out,
    sample_scene,
)
from detector import detect

ATTRIBUTES = ("background", "colour", "shape", "motion")


def score(count: int, width: int, height: int, num_frames: int, blur: int = 0) -> dict[str, float]:
    """Share of scenes of which each attribute is read right."""
    rng = random.Random(1)
    right = dict.fromkeys(ATTRIBUTES, 0)
    for first in range(0, count, 20):
        scenes = [sample_scene(rng, held_out=i % 4 == 0, two_actors=0) for i in range(first, min(first + 20, count))]
        videos = draw(scenes, width, height, num_frames)
        if blur:
            videos = torch.nn.functional.pad(videos, (blur // 2,) * 4 + (0, 0), mode="replicate")
            videos = torch.nn.functional.avg_pool3d(videos, (1, blur, blur), 1)
        for scene, video in zip(scenes, videos, strict=True):
            frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
            seen, actor = detect(frames), scene.actors[0]
            truth = (scene.background, actor.colour, actor.shape, actor.motion)
            for name, value in zip(ATTRIBUTES, truth, strict=True):
                right[name] += getattr(seen, name) == value
    return {name: number / count for name, number in right.items()}


@pytest.mark.parametrize(
    ("count", "width", "height", "num_frames", "blur", "least"),
    [(120, 128, 128, 33, 0, 0.99), (40, 128, 128, 33, 3, 0.97), (100, 96, 96, 17, 0, 0.98), (120, 64, 64, 9, 0, 0.95)],
)
def test_reads_drawings(count: int, width: int, height: int, num_frames: int, blur: int, least: float) -> None:
    scores = score(count, width, height, num_frames, blur)
    assert all(value >= least for value in scores.values()), scores


def test_an_empty_video_shows_nothing() -> None:
    seen = detect(np.full((9, 64, 64, 3), 128, np.uint8))
    assert (seen.background, seen.shape, seen.motion) == ("gray", "none", "none")


def test_held_out_combinations_leave_every_pair_in_training() -> None:
    assert len(HELD_OUT) >= 60
    trained = {(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if (c, s, m) not in set(HELD_OUT)}
    assert {(c, s) for c, s, _ in trained} == {(c, s) for c in COLOURS for s in SHAPES}
    assert {(c, m) for c, _, m in trained} == {(c, m) for c in COLOURS for m in MOTIONS}
    assert {(s, m) for _, s, m in trained} == {(s, m) for s in SHAPES for m in MOTIONS}


def test_scenes_never_show_what_is_held_out_or_impossible() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        scene = sample_scene(rng)
        for actor in scene.actors:
            assert not is_held_out(actor.colour, actor.shape, actor.motion)
            assert (actor.shape, actor.motion) != ("circle", "spinning")
            assert actor.colour != scene.background
        assert caption(scene, rng).strip()


def test_evaluation_prompts_are_held_out_and_stable() -> None:
    prompts = evaluation_prompts()
    assert prompts == evaluation_prompts()
    assert len({(s.actors[0].colour, s.actors[0].shape, s.actors[0].motion) for _, s in prompts}) == len(prompts) == 60
    assert all(is_held_out(s.actors[0].colour, s.actors[0].shape, s.actors[0].motion) for _, s in prompts)
    chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in prompt) for prompt, _ in prompts)
    assert 15 <= chinese <= 30
