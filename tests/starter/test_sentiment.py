"""The starter classifier as users get it: stock Transformers classes load it, it is small, and right on plain cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "backends" / "starter" / "sentiment"
CARD = (FOLDER / "README.md").read_text()

POSITIVE = [
    "I loved this movie",
    "not bad at all",
    "It wasn't bad.",
    "Great film, wonderful acting.",
    "A warm, funny and touching story about friendship.",
    "I was never bored.",
]
NEGATIVE = [
    "This film was terrible",
    "not good at all",
    "It wasn't funny.",
    "I didn't enjoy it.",
    "What a waste of two hours.",
    "A cold, humourless and confusing mess.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER, local_files_only=True).eval()


def probability_of_positive(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found: list[float] = model(**inputs).logits.softmax(dim=-1)[:, model.config.label2id["POSITIVE"]].tolist()
    return found


def front_matter() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CARD.split("---\n")[1])
    return loaded


def test_labels_are_negative_and_positive(model: Any) -> None:
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


def test_weights_stored_as_half_precision_load_as_float32(model: Any) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(FOLDER / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", POSITIVE)
def test_praise_is_positive(model: Any, tokenizer: Any, text: str) -> None:
    assert probability_of_positive(model, tokenizer, [text])[0] > 0.5


@pytest.mark.parametrize("text", NEGATIVE)
def test_blame_is_negative(model: Any, tokenizer: Any, text: str) -> None:
    assert probability_of_positive(model, tokenizer, [text])[0] < 0.5


def test_answer_does_not_depend_on_the_neighbours_in_a_batch(model: Any, tokenizer: Any) -> None:
    alone = probability_of_positive(model, tokenizer, POSITIVE[:1])[0]
    padded = probability_of_positive(model, tokenizer, [POSITIVE[0], "a long review of a film " * 60])[0]
    assert padded == pytest.approx(alone, abs=1e-4)


def test_long_text_is_cut_at_512_tokens(model: Any, tokenizer: Any) -> None:
    text = "I loved this movie. " * 1000
    assert len(tokenizer(text, truncation=True)["input_ids"]) == 512
    assert probability_of_positive(model, tokenizer, [text])[0] > 0.5


@pytest.mark.parametrize("text", ["", " ", "\x00", "émoji 🎬 映画", "<br /><br />", "x" * 5000])
def test_odd_text_still_gets_a_probability(model: Any, tokenizer: Any, text: str) -> None:
    assert 0.0 <= probability_of_positive(model, tokenizer, [text])[0] <= 1.0


def test_folder_is_at_most_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000


def test_card_states_the_figures_with_their_split() -> None:
    results = front_matter()["model-index"][0]["results"]
    accuracy = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in results}
    imdb = accuracy["IMDB reviews, films not seen in training (block split)"]
    assert imdb >= 0.84
    assert f"| test: blocks of films not in train | 2994 | **{imdb:.1%}** |" in CARD
    assert accuracy["Rotten Tomatoes snippets (block split)"] >= 0.7


def test_card_states_licence_limits_and_how_to_reproduce() -> None:
    assert front_matter()["license"] == "apache-2.0"
    for words in ("English only", "512 tokens", "Negation", "is unclear", "python -m backends.starter.train_sentiment"):
        assert words in CARD


def test_no_code_of_our_own_is_needed_to_load_it() -> None:
    assert "auto_map" not in json.loads((FOLDER / "config.json").read_text())
