"""One scenario from simulation to figures: every split against the truth."""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from bench.attribution.emission import DEVICE, Arrival, emit, poll, request_id
from bench.attribution.gpu import Floats
from bench.attribution.meter import Readings
from bench.attribution.ours import Accounts, account
from bench.attribution.peers import PEERS, Observation, observe, priced
from bench.attribution.scenarios import Scenario
from bench.attribution.simulation import World, simulate
from proxy.energy.attribution import Attribution
from proxy.energy.events import Model
from proxy.energy.prior import prior_from_model

SETTLED = "Joulegate, settled"
PROVISIONAL = "Joulegate, provisional"
#: What remains of error when everything is known but the counter's windows must add up: see `_reference`.
REFERENCE = "(reference: all known but the meter's noise)"

COLD_SECONDS = 30.0
PROVISIONAL_FROM_SECONDS = 0.5
WIDTH_FROM_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Of absolute errors relative to the truth, in per cent. `sum_ratio`: all shares over all truths."""

    mape: float
    median: float
    p95: float
    sum_ratio: float
    cold_mape: float
    requests: int


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """What only Joulegate promises. Ratios are of 1; `missing` requests got no figure and count as 100 % wrong."""

    provisional_against_settled_mape: float
    provisional_against_settled_p95: float
    coverage: float
    coverage_cold: float
    coverage_provisional: float
    median_half_width_percent: float
    median_half_width_percent_long: float
    largest_residual_microjoules: int
    microseconds_per_request_step: float
    cpu_seconds: float
    missing: int
    methods: dict[str, int]
    idle_ratio: float
    foreign_ratio: float | None
    fit_error_ratio: dict[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    scenario: str
    seed: int
    requests: int
    steps: int
    request_steps: int
    mean_batch: float
    joules_per_request: float
    errors: dict[str, Errors]
    ledger: LedgerFigures

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def best_peer(self) -> tuple[str, float]:
        """The peer's split with the least mean error."""
        label = min(PEERS, key=lambda peer: self.errors[peer].mape)
        return label, self.errors[label].mape


@dataclass(frozen=True, slots=True)
class Case:
    """A simulated run, as told to those who split: its events, what peers see, and the truth per request."""

    world: World
    readings: Readings
    arrivals: list[Arrival]
    seen: Observation
    truth: Floats

    @property
    def cold(self) -> npt.NDArray[np.bool_]:
        return self.seen.request_started < self.world.scenario.opens_at + COLD_SECONDS


def prepare(scenario: Scenario) -> Case:
    """Simulate a scenario. `truth[i]` are the joules of `seen.requests[i]`."""
    world = simulate(scenario)
    readings = poll(world)
    arrivals = emit(world, readings)
    seen = observe(world, arrivals)
    fair = {
        request_id(backend, number): joules
        for backend, shares in world.truth.requests.items()
        for number, joules in enumerate(shares.tolist())
    }
    return Case(world, readings, arrivals, seen, np.array([fair[name] for name in seen.requests]))


def evaluate(scenario: Scenario) -> Result:
    case = prepare(scenario)
    accounts = account(case.arrivals, _prior(scenario))
    estimates = {SETTLED: _active(case, accounts.settled), PROVISIONAL: _active(case, accounts.provisional)}
    estimates[REFERENCE] = _reference(case)
    estimates |= {label: split(case.seen) for label, split in PEERS.items()}
    steps = len(case.world.executions)
    return Result(
        scenario.name, scenario.seed, len(case.truth), steps, accounts.request_steps,
        accounts.request_steps / steps, float(case.truth.mean()),
        {label: _errors(case, estimate) for label, estimate in estimates.items()}, _figures(case, accounts),
    )  # fmt: skip


def _prior(scenario: Scenario) -> list[Model]:
    """What `serve` would know of its models at start: their configs and an H100's data sheet."""
    return [
        Model(backend.name, DEVICE, prior_from_model(
            parameters=backend.llm.body_parameters + backend.llm.head_parameters, peak_flops=989e12,
            bandwidth=3.35e12, idle_watts=75.0, max_watts=700.0, layers=backend.llm.layers,
            kv_width=backend.llm.kv_width, attention_width=backend.llm.attention_width,
        ))
        for backend in scenario.backends
        if scenario.prior
    ]  # fmt: skip


def _errors(case: Case, estimate: Floats) -> Errors:
    relative = 100 * np.abs(estimate - case.truth) / case.truth
    return Errors(
        float(relative.mean()), float(np.median(relative)), float(np.quantile(relative, 0.95)),
        float(estimate.sum() / case.truth.sum()), float(relative[case.cold].mean()), len(relative),
    )  # fmt: skip


def _reference(case: Case) -> Floats:
    """Split every rise of the counter, at its true instants, by the true energies of all that happened in it.

    The meter's noise and averaging are all that is left of error. Only who gives up that shares add up to the counter
    could do better, by smoothing them away.
    """
    edges = np.append(case.readings.tick_seconds, case.world.ended)
    rises = np.diff(np.append(case.readings.tick_joules, case.readings.tick_joules[-1]))
    happened = np.diff(np.interp(edges, case.world.curve.seconds, case.world.curve.joules))
    price = rises / np.maximum(happened, 1e-9)
    return priced(case.seen, edges, np.concatenate([step.fair for step in case.world.executions]), price)


def _column(case: Case, facts: dict[str, Attribution], field: str) -> Floats:
    """Joules per request of one field of its share; nan where there is none."""
    shares = [facts[name].devices.get(DEVICE) if name in facts else None for name in case.seen.requests]
    return np.array([np.nan if share is None else getattr(share, field) / 1e6 for share in shares])


def _active(case: Case, facts: dict[str, Attribution]) -> Floats:
    return np.asarray(np.nan_to_num(_column(case, facts, "active")))


def _inside(case: Case, facts: dict[str, Attribution]) -> npt.NDArray[np.bool_]:
    inside = (_column(case, facts, "low") <= case.truth) & (case.truth <= _column(case, facts, "high"))
    return np.asarray(inside)


def _figures(case: Case, accounts: Accounts) -> LedgerFigures:
    active, early = _column(case, accounts.settled, "active"), _column(case, accounts.provisional, "active")
    seconds = case.seen.request_ended - case.seen.request_started
    drift = 100 * np.abs(np.nan_to_num(early) - active)[seconds >= PROVISIONAL_FROM_SECONDS]
    drift = drift / np.maximum(active, 1e-9)[seconds >= PROVISIONAL_FROM_SECONDS]
    width = _column(case, accounts.settled, "high") - _column(case, accounts.settled, "low")
    half_width = 50 * width / np.maximum(active, 1e-9)
    inside, truth, balance = _inside(case, accounts.settled), case.world.truth, accounts.balance
    assert balance is not None
    methods = [facts.method for facts in accounts.settled.values()]
    return LedgerFigures(
        provisional_against_settled_mape=float(np.nanmean(drift)),
        provisional_against_settled_p95=float(np.nanquantile(drift, 0.95)),
        coverage=float(inside.mean()),
        coverage_cold=float(inside[case.cold].mean()),
        coverage_provisional=float(_inside(case, accounts.provisional).mean()),
        median_half_width_percent=float(np.nanmedian(half_width)),
        median_half_width_percent_long=float(np.nanmedian(half_width[seconds >= WIDTH_FROM_SECONDS])),
        largest_residual_microjoules=accounts.largest_residual,
        microseconds_per_request_step=1e6 * accounts.cpu_seconds / accounts.request_steps,
        cpu_seconds=accounts.cpu_seconds,
        missing=int(np.isnan(active).sum()),
        methods={method: methods.count(method) for method in sorted(set(methods))},
        idle_ratio=balance.idle / 1e6 / truth.idle,
        foreign_ratio=balance.foreign / 1e6 / truth.foreign if truth.foreign else None,
        fit_error_ratio=dict(balance.fit_error_ratio),
    )
