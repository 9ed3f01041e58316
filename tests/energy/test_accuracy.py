"""The ledger over a simulated GPU and engine, whose true shares are known.

The full tables are `bench/attribution`'s; this keeps the code from getting worse unnoticed.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from msgspec import structs

from bench.attribution.emission import Arrival, emit, poll, request_id
from bench.attribution.engine import Traffic
from bench.attribution.gpu import LLAMA_8B
from bench.attribution.scenarios import Backend, Meter, Scenario, load
from bench.attribution.simulation import simulate
from proxy.energy.attribution import Attribution
from proxy.energy.events import Device, Event, Finish, Model, Start, Step
from proxy.energy.ledger import Ledger
from proxy.energy.prior import prior_from_model

DEVICE = "gpu:0"
PLAIN = load(3.0, 25.0)
FAST_TICK = replace(PLAIN, name="fast tick", meter=Meter(tick_seconds=0.020, poll_hertz=100.0))


@cache
def world(scenario: Scenario) -> tuple[list[Arrival], dict[str, float]]:
    """All events, and the joules that each request should bear."""
    simulated = simulate(scenario)
    truth = {
        request_id(name, number): float(joules)
        for name, requests in simulated.truth.requests.items()
        for number, joules in enumerate(requests)
    }
    return emit(simulated, poll(simulated)), truth


@dataclass
class Outcome:
    ledger: Ledger
    settled: dict[str, Attribution] = field(default_factory=dict)
    provisional: dict[str, Attribution] = field(default_factory=dict)


def run(arrivals: list[Arrival], *extra: Event, known_only: bool = True, ask: bool = True) -> Outcome:
    """`extra` events come after the device. `ask`: for a provisional figure at each finish, as a proxy does."""
    outcome = Outcome(Ledger(known_only=known_only))
    waiting = list(extra)
    for _, event in arrivals:
        outcome.ledger.apply(event)
        while isinstance(event, Device) and waiting:
            outcome.ledger.apply(waiting.pop(0))
        if ask and isinstance(event, Finish):
            provisional = outcome.ledger.attribution(event.request)
            assert provisional is not None
            outcome.provisional[event.request] = provisional
        outcome.settled |= {each.request: each for each in outcome.ledger.drain()}
    outcome.ledger.close()
    outcome.settled |= {each.request: each for each in outcome.ledger.drain()}
    return outcome


def joules(attributions: dict[str, Attribution]) -> dict[str, float]:
    return {name: attribution.devices[DEVICE].active / 1e6 for name, attribution in attributions.items()}


def seconds(attribution: Attribution) -> float:
    return (attribution.ended - attribution.started) / 1e9


def errors(told: dict[str, float], truth: dict[str, float]) -> list[float]:
    return [abs(told[name] / true - 1) for name, true in truth.items()]


@pytest.mark.parametrize("scenario", [PLAIN, FAST_TICK], ids=lambda scenario: scenario.name)
def test_shares_are_near_the_truth_and_intervals_hold_it(scenario: Scenario) -> None:
    arrivals, truth = world(scenario)
    outcome = run(arrivals)
    assert set(outcome.settled) == set(truth)
    assert np.mean(errors(joules(outcome.settled), truth)) < 0.05
    shares = {name: attribution.devices[DEVICE] for name, attribution in outcome.settled.items()}
    assert np.mean([shares[name].low <= 1e6 * true <= shares[name].high for name, true in truth.items()]) >= 0.9
    long = [shares[name] for name, attribution in outcome.settled.items() if seconds(attribution) > 1]
    assert np.median([(share.high - share.low) / 2 / share.active for share in long]) <= 0.10
    assert outcome.ledger.devices()[0].residual == 0


def test_provisional_figures_are_near_the_settled_ones() -> None:
    outcome = run(world(PLAIN)[0])
    settled, told = joules(outcome.settled), joules(outcome.provisional)
    off = [abs(told[name] / settled[name] - 1) for name in settled if seconds(outcome.settled[name]) >= 0.5]
    assert np.mean(off) <= 0.05


@pytest.mark.parametrize(("rate", "prompt", "output"), [(20.0, 50.0, 1.0), (5.0, 100.0, 2.0)])
def test_the_first_figures_of_very_short_requests_do_not_claim_to_know(
    rate: float, prompt: float, output: float
) -> None:
    """Milliseconds of work, told before a window has closed: nine of ten intervals hold the truth and what settles."""
    inside, settled_inside = list[bool](), list[bool]()
    for seed in range(1, 5):
        traffic = Traffic(rate, prompt_median=prompt, output_median=output)
        arrivals, truth = world(Scenario("short", (Backend("chat", LLAMA_8B, traffic),), 2.0, seed=seed))
        outcome = run(arrivals)
        for name, told in outcome.provisional.items():
            if not told.devices:  # the engine had never told of anything: no figure is no false one
                continue
            share = told.devices[DEVICE]
            inside.append(share.low <= 1e6 * truth[name] <= share.high)
            settled_inside.append(share.low <= outcome.settled[name].devices[DEVICE].active <= share.high)
    assert len(inside) > 30
    assert np.mean(inside) >= 0.9
    assert np.mean(settled_inside) >= 0.9


def test_a_prior_from_the_models_config_is_right_within_a_quarter_from_the_first_request() -> None:
    arrivals, truth = world(PLAIN)
    prior = prior_from_model(
        parameters=7.5e9, layers=32, kv_width=1024, peak_flops=989e12, bandwidth=3.35e12, idle_watts=70, max_watts=700
    )  # fmt: skip
    told = joules(run(arrivals, Model("chat", DEVICE, prior)).settled)
    first = list(truth)[:5]
    assert max(errors(told, {name: truth[name] for name in first})) < 0.25


def test_what_was_learnt_serves_after_a_restart() -> None:
    arrivals, truth = world(PLAIN)
    learnt = run(arrivals).ledger.models()
    assert [(model.backend, model.device) for model in learnt] == [("chat", DEVICE)]
    again = run(arrivals, *learnt)
    assert np.mean(errors(joules(again.settled), truth)) < 0.05
    assert again.ledger.models()[0].coefficients == pytest.approx(learnt[0].coefficients, rel=0.8)


def test_asking_changes_nothing_and_a_replay_equals_the_live_ledger() -> None:
    arrivals, _ = world(PLAIN)
    live = run(arrivals)
    assert run(arrivals, ask=False).settled == live.settled
    replayed = run(arrivals, known_only=False, ask=False)
    assert replayed.settled == live.settled
    assert replayed.ledger.devices() == live.ledger.devices()


def test_a_replay_without_start_records_is_as_good() -> None:
    arrivals, truth = world(PLAIN)
    bare = [each for each in arrivals if not isinstance(each.event, Start)]
    outcome = run(bare, known_only=False, ask=False)
    assert np.mean(errors(joules(outcome.settled), truth)) < 0.05


def test_outliers_do_not_poison_what_was_learnt() -> None:
    """A step report of ten times the tokens, now and then."""
    arrivals, truth = world(PLAIN)
    rng = np.random.default_rng(1)

    def spoilt(arrival: Arrival) -> Arrival:
        step = arrival.event
        if not isinstance(step, Step) or rng.random() > 0.01:
            return arrival
        return Arrival(arrival.at, structs.replace(step, tokens=[10 * tokens for tokens in step.tokens]))

    told = joules(run([spoilt(arrival) for arrival in arrivals]).settled)
    assert np.median(errors(told, truth)) < 0.05


def test_memory_is_bounded_by_what_is_open() -> None:
    outcome = run(world(PLAIN)[0])
    ledger = outcome.ledger
    assert ledger.drain() == []
    assert not ledger._registry.open
    assert not ledger._waiting
    assert all(len(book.pending_steps.steps) == 0 for book in ledger._devices.values())
    assert ledger._registry.capacity <= 128
