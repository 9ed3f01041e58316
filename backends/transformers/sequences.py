"""Token sequences on their way to a model, as plain data."""

from dataclasses import dataclass
from typing import Literal

from backends.serving import Job


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids, and whether the scores of their sequence are to become probabilities."""

    ids: list[int]
    activate: bool = True


SequenceJob = Job[TokenSequence, list[float]]


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `length` tokens (special ones included); `side` is the one cut off, None for the tokenizer's habit."""

    length: int
    side: Literal["left", "right"] | None = None
