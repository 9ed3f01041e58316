"""Virtual steps cover the time of a request without gap or overlap, whatever was seen of it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import Tokens
from proxy.relay.dialects import Timings
from proxy.relay.observe import Observation

Steps = list[tuple[int, int, int, int]]
MS = 1_000_000


def observe(steps: Steps, body_bytes: int = 400) -> Observation:
    return Observation(lambda *step: steps.append(step), Nanoseconds(0), body_bytes)


@given(st.lists(st.integers(1, 600 * MS), max_size=30))
def test_steps_join_seamlessly_from_start_to_end(gaps: list[int]) -> None:
    steps: Steps = []
    observation = observe(steps)
    at = 0
    for gap in gaps:
        at += gap
        observation.events(1, Nanoseconds(at))
    observation.end(Nanoseconds(at + 1), Tokens(), None)
    for (_, ended, _, _), (started, _, _, _) in pairwise(steps):
        assert started == ended
    assert steps[0][0] == 0
    decoded = sum(tokens for _, _, tokens, _ in steps[1:])
    assert decoded == max(0, len(gaps) - 1)


def test_prefill_lasts_until_the_first_token() -> None:
    steps: Steps = []
    observation = observe(steps)
    observation.events(1, Nanoseconds(80 * MS))
    assert steps == [(0, 80 * MS, 100, 100)]


def test_an_answer_in_one_piece_is_split_by_the_engines_own_timings() -> None:
    steps: Steps = []
    timings = Timings(prompt_n=50, prompt_ms=10, predicted_n=20, predicted_ms=30)
    observe(steps).end(Nanoseconds(40 * MS), Tokens(50, 20), timings)
    assert steps == [(0, 10 * MS, 50, 50), (10 * MS, 40 * MS, 20, 70)]


def test_a_silent_request_is_covered_with_unknown_work() -> None:
    steps: Steps = []
    observation = observe(steps)
    observation.waiting(Nanoseconds(100 * MS), Nanoseconds(50 * MS))
    assert steps == [(0, 100 * MS, 0, 0)]
