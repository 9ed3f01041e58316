"""The benchmark's truth: laws of the Shapley value, and that simulated energies add up."""

from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.attribution.gpu import COUNT, H100, LLAMA_8B, Floats, Roofline, StepPhysics
from bench.attribution.scenarios import Foreign, Scenario, load, stresses
from bench.attribution.shapley import enumerated, sampled, shapley
from bench.attribution.simulation import World, simulate

PHYSICS = StepPhysics(LLAMA_8B, H100)
#: (computed, already held) tokens per sequence: decodes and chunks of prompts.
sequences = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(2, 2000)), st.integers(0, 6000)), min_size=1, max_size=8
)


def work_of(sequences: list[tuple[int, int]]) -> Floats:
    tokens, held = np.array(sequences, dtype=np.int64).reshape(-1, 2).T
    return LLAMA_8B.work(tokens, held + tokens, np.ones(len(tokens), dtype=np.bool_))


@given(sequences)
def test_shares_of_a_step_sum_to_its_energy(sequences: list[tuple[int, int]]) -> None:
    work = work_of(sequences)
    assert enumerated(work, PHYSICS.joules).sum() == pytest.approx(float(PHYSICS.joules(work.sum(axis=0))))


@given(sequences)
def test_enumeration_equals_the_mean_over_all_orders(sequences: list[tuple[int, int]]) -> None:
    work = work_of(sequences[:5])
    expected = np.zeros(len(work))
    orders = list(permutations(range(len(work))))
    for order in orders:
        reached = PHYSICS.joules(np.cumsum(work[list(order)], axis=0))
        expected[list(order)] += np.diff(reached, prepend=0.0) / len(orders)
    assert enumerated(work, PHYSICS.joules) == pytest.approx(expected)


@given(sequences)
def test_equal_sequences_get_equal_shares(sequences: list[tuple[int, int]]) -> None:
    shares = enumerated(work_of([sequences[0], *sequences]), PHYSICS.joules)
    assert shares[0] == pytest.approx(shares[1])


@pytest.mark.parametrize("roofline", ["whole", "split", "soft"])
def test_who_does_more_of_everything_bears_more(roofline: Roofline) -> None:
    shares = enumerated(
        work_of([(1, 100), (1, 4000), (400, 4000), (2000, 4000)]), StepPhysics(LLAMA_8B, H100, roofline).joules
    )
    assert (np.diff(shares) > 0).all()


def test_sampled_orders_agree_with_enumeration() -> None:
    rng = np.random.default_rng(0)
    for large in ([], [(700, 0)], [(300, 0), (900, 1000)], [(200, 0), (300, 0), (1500, 0)]):
        decodes = [(1, int(held)) for held in rng.integers(50, 3000, 9 - len(large))]
        work = work_of(decodes + large)
        exact = enumerated(work, PHYSICS.joules)
        estimate = sampled(work, PHYSICS.joules, rng, 2000)
        assert estimate == pytest.approx(exact, rel=0.01)
        assert estimate.sum() == pytest.approx(exact.sum())


def test_large_steps_are_sampled_precisely_enough_to_be_called_truth() -> None:
    rng = np.random.default_rng(1)
    work = work_of([(1, int(held)) for held in rng.integers(50, 3000, 60)] + [(900, 0), (500, 500)])
    runs = np.array([shapley(work, PHYSICS.joules, rng) for _ in range(5)])
    assert runs.sum(axis=1) == pytest.approx(float(PHYSICS.joules(work.sum(axis=0))))
    assert (runs.std(axis=0) / runs.mean(axis=0)).max() < 0.01


def test_a_power_cap_makes_steps_longer_and_cheaper_per_second() -> None:
    sums = work_of([(2000, 0), *[(1, 1000)] * 30]).sum(axis=0)
    capped = StepPhysics(LLAMA_8B, replace(H100, cap_watts=400.0))
    (seconds, joules), (longer, less) = PHYSICS.cost(sums), capped.cost(sums)
    assert longer > seconds
    assert less / longer < joules / seconds


@pytest.fixture(
    scope="module", params=["0.5 req/s", "two backends", "foreign load", "power cap 400 W", "thermal drift"]
)
def world(request: pytest.FixtureRequest) -> World:
    scenarios: dict[str, Scenario] = {s.name: s for s in [load(0.5, 6.0), *stresses(2.0)]}
    return simulate(scenarios[request.param])


def test_accounts_of_the_truth_sum_to_the_device(world: World) -> None:
    assert world.truth.total == pytest.approx(world.curve.joules[-1])
    steps = sum(step.joules for step in world.executions)
    assert sum(shares.sum() for shares in world.truth.requests.values()) == pytest.approx(steps)


def test_every_sequence_computes_its_tokens_once(world: World) -> None:
    for backend, engine in world.engines.items():
        computed = np.zeros(len(engine.sequences), dtype=np.int64)
        for step in world.executions:
            if step.backend == backend:
                np.add.at(computed, step.batch.sequences, step.batch.tokens)
        due = engine.sequences.prompt - engine.sequences.cached + engine.sequences.output - 1
        assert (computed == due).all()


def test_a_backend_runs_one_step_at_a_time(world: World) -> None:
    for backend in world.engines:
        steps = [step for step in world.executions if step.backend == backend]
        assert all(a.ended <= b.started < b.ended for a, b in pairwise(steps))


def test_foreign_work_slows_ours_and_is_counted_apart() -> None:
    plain, hard = (next(s for s in stresses(2.0) if s.name == name) for name in ("plain", "foreign load"))
    assert hard.foreign == Foreign()
    assert simulate(plain).truth.foreign == 0
    assert simulate(hard).truth.foreign > 0


def test_an_empty_set_costs_nothing() -> None:
    nothing = np.zeros(4)
    assert nothing[COUNT] == 0
    assert PHYSICS.joules(nothing) == 0
