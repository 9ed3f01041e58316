"""What a proxy would have been told of a simulated run: events, each with the time at which it arrives.

Step times are the host's, not the GPU's; step reports come late, now and then very late, when what they describe was
already metered; a cancelled request's engine runs on for a step or two after its end was reported.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bench.attribution.meter import Readings, read
from bench.attribution.scenarios import Scenario
from bench.attribution.simulation import ADMISSION_SECONDS, Execution, World
from proxy.energy.events import BackendState, Device, Event, Finish, Outcome, Processes, Sample, Start, Step
from proxy.energy.quantities import Watts, microjoules, nanoseconds

DEVICE = "gpu:0"
PROCESSES_SECONDS = 1.0
#: A step's end is noticed by the host this much later, plus as much again on average.
HOST_SECONDS = 1e-4
#: Up to this gap the next step was scheduled before its predecessor ended (asynchronous scheduling).
ASYNC_SECONDS = 3e-4
LATE_PROBABILITY = 0.01
#: Of a relay without step reports: the way to it, how it groups tokens, how well bytes tell a prompt's tokens.
RELAY_SECONDS, GROUP_SECONDS, GUESS_SCATTER = 5e-4, 0.25, 0.2


class Arrival(NamedTuple):
    at: float
    event: Event


def request_id(backend: str, number: int) -> str:
    return f"{backend}-{number}"


def poll(world: World) -> Readings:
    """What the device's counter said during a run."""
    return read(world.curve, world.scenario.meter, np.random.default_rng([world.scenario.seed, 5]))


def emit(world: World, readings: Readings) -> list[Arrival]:
    """All events of a run in their order of arrival."""
    rng = np.random.default_rng([world.scenario.seed, 7])
    arrivals = [Arrival(0.0, Device(DEVICE, world.scenario.gpu.name, "replay"))]
    arrivals += _loading(world.scenario)
    arrivals += _samples(readings)
    arrivals += _processes(world, rng)
    for backend in world.engines:
        executions = [e for e in world.executions if e.backend == backend]
        arrivals += _steps(executions, rng) if world.scenario.step_reports else _virtual_steps(world, executions, rng)
        arrivals += _requests(world, backend, rng)
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _loading(scenario: Scenario) -> Iterator[Arrival]:
    if scenario.loading_seconds:
        for backend in scenario.backends:
            for at, loading in ((0.0, True), (scenario.loading_seconds, False)):
                yield Arrival(at, BackendState(backend.name, (DEVICE,), nanoseconds(at), loading))


def _samples(readings: Readings) -> Iterator[Arrival]:
    columns = (readings.seconds.tolist(), readings.joules.tolist(), readings.watts.tolist())
    for at, energy, power in zip(*columns, strict=True):
        yield Arrival(at + 1e-4, Sample(DEVICE, nanoseconds(at), microjoules(energy), Watts(round(power, 1))))


def _processes(world: World, rng: np.random.Generator) -> Iterator[Arrival]:
    """NVML's utilisation by process, in whole per cent."""
    curve, foreign = world.curve, world.scenario.foreign
    at = np.arange(0.0, curve.seconds[-1], PROCESSES_SECONDS)
    ours = np.diff(np.interp(at, curve.seconds, curve.our_seconds))
    theirs = np.diff(np.interp(at, curve.seconds, curve.foreign_seconds))
    share = np.divide(theirs, ours + theirs, out=np.zeros_like(theirs), where=ours + theirs > 0)
    if foreign is not None:
        share = np.where(share > 0, np.clip(share + rng.normal(0, foreign.reading_noise, len(share)), 0, 1), 0)
    for time, part in zip(at[1:].tolist(), np.round(share, 2).tolist(), strict=True):
        yield Arrival(time + 2e-4, Processes(DEVICE, nanoseconds(time), part))


def _steps(executions: list[Execution], rng: np.random.Generator) -> Iterator[Arrival]:
    ended, reported, gpu_ended = 0.0, 0.0, -1.0
    for step in executions:
        follows = step.started - gpu_ended < ASYNC_SECONDS
        started = ended if follows else max(step.started - HOST_SECONDS, ended)
        gpu_ended = step.ended
        ended = max(step.ended + HOST_SECONDS + rng.exponential(HOST_SECONDS), started)
        late = rng.uniform(0.05, 0.15) if rng.random() < LATE_PROBABILITY else 0.0
        reported = max(reported, ended + rng.exponential(1e-3) + late)  # a socket keeps the order
        yield Arrival(reported, _step(step, started, ended))


def _step(step: Execution, started: float, ended: float) -> Step:
    requests = [request_id(step.backend, number) for number in step.requests.tolist()]
    return Step(
        step.backend, (DEVICE,), nanoseconds(started), nanoseconds(ended),
        requests, step.batch.tokens.tolist(), step.batch.contexts.tolist(),
    )  # fmt: skip


def _virtual_steps(world: World, executions: list[Execution], rng: np.random.Generator) -> Iterator[Arrival]:
    """What a relay infers of streams: prefill until the first token, then groups; prompts are guessed from bytes."""
    backend = executions[0].backend
    sequences = world.engines[backend].sequences
    _, first = np.unique(sequences.request, return_index=True)
    guesses = sequences.prompt[first] * np.clip(rng.normal(1.0, GUESS_SCATTER, len(first)), 0.3, 3.0)
    seen: list[list[float]] = [[] for _ in first]
    for step in executions:
        for number in step.requests[step.batch.sampled].tolist():
            seen[number].append(step.ended + RELAY_SECONDS)
    for number, tokens in enumerate(seen):
        began = float(sequences.arrived[first[number]]) - ADMISSION_SECONDS
        last = float(world.answered[backend][number]) + RELAY_SECONDS
        yield from _stream(backend, number, began, [at for at in tokens if at <= last], max(int(guesses[number]), 1))


def _stream(backend: str, number: int, began: float, tokens: list[float], prompt: int) -> Iterator[Arrival]:
    work, since = prompt, began
    for count, at in enumerate(tokens, start=1):
        if count == 1 or at - since >= GROUP_SECONDS or count == len(tokens):
            yield Arrival(at + 1e-5, _virtual_step(backend, number, since, at, work, prompt + count - 1))
            work, since = 0, at
        work += 1


def _virtual_step(backend: str, number: int, started: float, ended: float, tokens: int, context: int) -> Step:
    span = (nanoseconds(started), nanoseconds(ended))
    return Step(backend, (DEVICE,), *span, [request_id(backend, number)], [tokens], [context], "relay")


def _requests(world: World, backend: str, rng: np.random.Generator) -> Iterator[Arrival]:
    sequences = world.engines[backend].sequences
    _, first = np.unique(sequences.request, return_index=True)
    for number, at in enumerate((sequences.arrived[first] - ADMISSION_SECONDS).tolist()):
        yield Arrival(at + 1e-5, Start(request_id(backend, number), nanoseconds(at), backend))
        end = float(world.answered[backend][number]) + 1e-3 + rng.exponential(1e-3)
        outcome: Outcome = "cancelled" if sequences.cancelled[first[number]] else "completed"
        yield Arrival(end + 1e-5, Finish(request_id(backend, number), nanoseconds(end), outcome))
