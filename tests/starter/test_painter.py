"""The starter painter as users get it: loads offline, is small, draws what is asked for, and refuses no prompt."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

if TYPE_CHECKING:
    from backends.starter.painter_pipeline import PainterPipeline

FOLDER = Path(__file__).parents[2] / "backends" / "starter" / "painter"
SIZE = 32
SEED = 424_242
THINGS = [
    "apple",
    "cat",
    "dog",
    "frog",
    "penguin",
    "butterfly",
    "cactus",
    "sunflower",
    "moon",
    "car",
    "rocket",
    "castle",
]
THINGS += ["angry face", "ghost", "heart", "guitar", "umbrella", "hot dog"]
COLOURED = ["blue cat", "red apple", "green car", "pink elephant", "purple heart", "yellow hat"]


@pytest.fixture(scope="module")
def pipeline() -> PainterPipeline:
    from backends.starter.painter_pipeline import PainterPipeline

    def refuse(*_: object) -> None:
        raise AssertionError("the painter's folder must load without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        loaded: PainterPipeline = PainterPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: PainterPipeline, prompts: Sequence[str], **arguments: Any) -> Any:
    """One drawing a prompt, each with a seed of its own."""
    generators = [torch.Generator().manual_seed(SEED + index) for index in range(len(prompts))]
    return pipeline(list(prompts), generator=generators, return_dict=False, **arguments)[0]


def nearest(pipeline: PainterPipeline, prompts: Sequence[str], colours: Sequence[str | None]) -> list[str]:
    """For each prompt, the name of the training picture that its drawing is nearest to: any thing in these colours."""
    data = pytest.importorskip("backends.starter.painter_data", reason="needs the PyPI package emoji")
    if not data.FONT.exists():
        pytest.skip("needs the Debian package fonts-noto-color-emoji")
    pairs = [(colour, thing) for thing in data.vocabulary() for colour in colours]
    known = torch.stack([torch.from_numpy(data.render(thing, SIZE, colour)) for colour, thing in pairs]) / 255
    drawn = draw(pipeline, prompts, output_type="pt").permute(0, 2, 3, 1)
    found = torch.cdist(drawn.flatten(1), known.flatten(1)).argmin(dim=1)
    names = [" ".join(filter(None, (colour, thing.name))) for colour, thing in pairs]
    return [names[index] for index in found.tolist()]


def test_it_is_small_and_holds_weights_not_pictures(pipeline: PainterPipeline) -> None:
    from safetensors import safe_open

    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    for part in ("unet", "text_encoder"):
        (weights,) = (FOLDER / part).glob("*.safetensors")
        with safe_open(weights, "pt") as stored:
            assert set(stored.keys()) <= set(getattr(pipeline, part).state_dict())


def test_it_knows_at_least_150_things() -> None:
    data = pytest.importorskip("backends.starter.painter_data", reason="needs the PyPI package emoji")
    known = json.loads((FOLDER / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    names = {thing.name for thing in data.vocabulary()}
    assert len(names) >= 150
    assert {word for name in names for word in data.words(name)} | set(data.COLOURS) <= set(known)


def test_things_are_recognised_among_all_others(pipeline: PainterPipeline) -> None:
    found = nearest(pipeline, THINGS, colours=[None])
    right = sum(f == thing for f, thing in zip(found, THINGS, strict=True))
    assert right >= 0.8 * len(THINGS), dict(zip(THINGS, found, strict=True))


def test_colours_and_things_combine(pipeline: PainterPipeline) -> None:
    found = nearest(pipeline, COLOURED, colours=["red", "yellow", "green", "blue", "purple", "pink"])
    right = sum(f == prompt for f, prompt in zip(found, COLOURED, strict=True))
    assert right >= len(COLOURED) - 1, dict(zip(COLOURED, found, strict=True))


def test_words_that_it_does_not_know_are_passed_over(pipeline: PainterPipeline) -> None:
    plain, chatty = (
        draw(pipeline, [prompt], output_type="pt", num_inference_steps=3)
        for prompt in ("two cats", "A (very!) loquacious KITTY, xyzzy")
    )
    alone = draw(pipeline, ["cat"], output_type="pt", num_inference_steps=3)
    assert torch.allclose(plain, alone, atol=0.02)
    assert torch.allclose(chatty, alone, atol=0.02)


@pytest.mark.parametrize(
    "prompt", ["", "xyzzy plugh", "\x00 🦖 ネコ", "cat " * 1000], ids=["empty", "unknown", "odd", "long"]
)
def test_any_prompt_gives_an_image_of_the_size_asked_for(pipeline: PainterPipeline, prompt: str) -> None:
    (image,) = draw(pipeline, [prompt], width=160, height=96, num_inference_steps=2)
    assert (image.size, image.mode) == ((160, 96), "RGB")


def test_a_seed_draws_the_same_alone_and_in_company(pipeline: PainterPipeline) -> None:
    alone = draw(pipeline, ["frog"], output_type="pt", num_inference_steps=3)
    company = draw(pipeline, ["frog", "red hot dog"], output_type="pt", num_inference_steps=3)
    assert torch.allclose(company[:1], alone, atol=0.02)


def test_several_images_of_a_prompt_stand_together(pipeline: PainterPipeline) -> None:
    images = pipeline(["cat", "dog"], num_images_per_prompt=2, num_inference_steps=1, return_dict=False)[0]
    assert len(images) == 4


def test_each_step_is_told_and_the_rest_can_be_skipped(pipeline: PainterPipeline) -> None:
    told: list[tuple[int, int, list[int]]] = []

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told.append((index, int(timestep), list(tensors["latents"].shape)))
        pipe._interrupt = index == 2
        return {}

    draw(pipeline, ["cat"], num_inference_steps=5, callback_on_step_end=after_step)
    assert told == [(0, 999, [1, 48, 8, 8]), (1, 799, [1, 48, 8, 8]), (2, 599, [1, 48, 8, 8])]


@pytest.mark.parametrize(
    "arguments",
    [{"width": 0}, {"height": -1}, {"num_inference_steps": 0}, {"negative_prompt": ["a", "b"]}],
    ids=["width", "height", "steps", "negative prompts"],
)
def test_what_makes_no_sense_is_refused(pipeline: PainterPipeline, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each says something else
        pipeline("cat", **arguments)
