"""The peers' splits, on a history small enough to divide by hand."""

import numpy as np
import pytest

from bench.attribution import peers
from bench.attribution.peers import Observation

#: A computes 90 tokens in a step of 0..1 s and one more beside B (9 tokens) in 1..2 s; then a second of idle.
SEEN = Observation(
    requests=["a", "b"],
    request_started=np.array([0.0, 1.0]),
    request_ended=np.array([2.0, 2.0]),
    step_started=np.array([0.0, 1.0]),
    step_ended=np.array([1.0, 2.0]),
    entry_step=np.array([0, 1, 1]),
    entry_request=np.array([0, 0, 1]),
    tokens=np.array([90.0, 1.0, 9.0]),
    output_tokens=np.array([1.0, 1.0, 1.0]),
    counter_seconds=np.array([0.0, 1.0, 2.0, 3.0]),
    counter_joules=np.array([0.0, 400.0, 600.0, 700.0]),
)


def test_zeus_gives_each_its_whole_window() -> None:
    shares = peers.zeus(SEEN)
    assert shares == pytest.approx([600, 200])
    assert shares.sum() > 600  # more than was used: such shares do not add up


def test_aitra_divides_by_tokens() -> None:
    assert peers.aitra_run(SEEN) == pytest.approx([600 * 0.91, 600 * 0.09])
    # Its one window of 30 s ends after the run, so the idle second is divided too.
    assert peers.aitra_windows(SEEN) == pytest.approx([700 * 0.91, 700 * 0.09])


def test_ml_energy_divides_by_output_tokens() -> None:
    assert peers.ml_energy(SEEN) == pytest.approx([400, 200])


def test_neuralwatt_caps_the_token_ratio() -> None:
    # A has 91 % of the tokens meanwhile, B 90 % of those while it ran... of ten: both are over the cap.
    assert peers.neuralwatt(SEEN) == pytest.approx([600 * peers.NEURALWATT_CAP, 200 * peers.NEURALWATT_CAP])


def test_neuralwatt_below_the_cap_is_the_token_ratio() -> None:
    many = Observation(
        requests=list("abcdefgh"),
        request_started=np.zeros(8),
        request_ended=np.ones(8),
        step_started=np.array([0.0]),
        step_ended=np.array([1.0]),
        entry_step=np.zeros(8, dtype=np.int64),
        entry_request=np.arange(8),
        tokens=np.full(8, 5.0),
        output_tokens=np.ones(8),
        counter_seconds=np.array([0.0, 1.0]),
        counter_joules=np.array([0.0, 80.0]),
    )
    assert peers.neuralwatt(many) == pytest.approx(np.full(8, 10.0))


def test_kepler_divides_the_busy_part_by_utilisation() -> None:
    # One window of 5 s: 700 J of which 2 s / 5 s are busy; A was worked on for 2 s, B for 1 s.
    assert peers.kepler(SEEN) == pytest.approx([280 * 2 / 3, 280 / 3])


def test_time_share_divides_each_step_equally() -> None:
    assert peers.time_share(SEEN) == pytest.approx([400 + 100, 100])


def test_counter_windows_divide_by_tokens_or_output_tokens() -> None:
    assert peers.window_tokens(SEEN) == pytest.approx([400 + 20, 180])
    assert peers.window_output_tokens(SEEN) == pytest.approx([500, 100])


def test_a_step_across_windows_weighs_in_each_by_its_overlap() -> None:
    edges = np.array([0.0, 0.5, 1.5, 2.0])
    # 0..0.5: 200 J for A. 0.5..1.5: 200 + 100 J by tokens 45 : 0.5 : 4.5. 1.5..2: 100 J by 1 : 9.
    a = 200 + 300 * 45.5 / 50 + 10
    assert peers.windowed(SEEN, edges, SEEN.tokens) == pytest.approx([a, 600 - a])


@pytest.mark.parametrize(
    "label", [name for name in peers.PEERS if not name.startswith(("Zeus", "Neuralwatt", "Kepler"))]
)
def test_proportional_splits_give_out_what_was_counted(label: str) -> None:
    assert peers.PEERS[label](SEEN).sum() in (pytest.approx(600), pytest.approx(700))
