"""Receipts to test with: the design's example, and variations of it."""

import json
from typing import Any

from msgspec import structs

from proxy.api.receipts import encode_receipt
from proxy.energy.carbon import Intensity
from proxy.energy.quantities import Grams, GramsPerKilowattHour, Microjoules, Seconds
from proxy.energy.receipt import Figures, Parts, Receipt, Request, Status, Tokens

ID = "0123456789abcdef0123456789abcdef"
FRANCE = Intensity(GramsPerKilowattHour(56.0), zone="FRA", source="codecarbon", as_of="2023")


def example() -> Receipt:
    """The receipt whose `energy` object stands in section 7 of the design."""
    figures = Figures(
        parts=Parts(Microjoules(10_100_000), Microjoules(2_240_000), Microjoules(0), Microjoules(0)),
        low=Microjoules(11_900_000),
        high=Microjoules(12_800_000),
        marginal=Microjoules(9_100_000),
        full=Microjoules(13_000_000),
        accuracy_ratio=0.05,
        method="measured-steps",
        meters={"gpu:0": "nvml-counter", "host": "rapl"},
        attribution_ratio=0.21,
        operational=Grams(0.000192),
    )
    return Receipt(
        request=Request(ID, model="chat", task="chat", endpoint="/v1/chat/completions", created=1_700_000_000.0),
        status="provisional",
        outcome="completed",
        duration=Seconds(0.41),
        tokens=Tokens(prompt=12, completion=40),
        boundary="node",
        intensity=FRANCE,
        figures=figures,
    )


def unavailable() -> Receipt:
    """A request that no meter saw."""
    return structs.replace(example(), status="unavailable", figures=None)


def receipt(
    name: str,
    *,
    created: float = 1_700_000_000.0,
    model: str = "chat",
    task: str = "chat",
    key: str | None = None,
    status: Status = "settled",
    gpu: int = 10_100_000,
) -> Receipt:
    """The example under another name, with another GPU energy (µJ)."""
    base = example()
    assert base.figures is not None
    return structs.replace(
        base,
        request=structs.replace(base.request, id=name, created=created, model=model, task=task, key=key),
        status=status,
        figures=structs.replace(base.figures, parts=structs.replace(base.figures.parts, gpu=Microjoules(gpu))),
    )


def receipt_object(receipt: Receipt) -> dict[str, Any]:
    """The `energy` object as a client reads it."""
    found: dict[str, Any] = json.loads(encode_receipt(receipt))
    return found
