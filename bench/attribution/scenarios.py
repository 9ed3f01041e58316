"""What is simulated: the four loads of the main table, and one scenario for each thing that could go wrong."""

from dataclasses import dataclass, field, replace

from bench.attribution.engine import Traffic
from bench.attribution.gpu import H100, LLAMA_8B, QWEN_1B5, Gpu, Llm, Roofline


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    llm: Llm
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Meter:
    """A cumulative energy counter: it moves every `tick_seconds` to the (lagging) truth, each rise wrong by `noise`."""

    tick_seconds: float = 0.100
    #: Its clock is not the host's: the phase between ticks and polls wanders.
    tick_drift: float = 0.003
    tick_jitter_seconds: float = 0.002
    averaging_seconds: float = 0.020
    noise: float = 0.02
    poll_hertz: float = 20.0
    poll_jitter_seconds: float = 0.002
    resolution_joules: float = 0.001


@dataclass(frozen=True, slots=True)
class Foreign:
    """Another process, now and then: of every `period_seconds` it is there for `present_seconds`."""

    period_seconds: float = 12.0
    present_seconds: float = 5.0
    time_share: float = 0.35
    watts: float = 420.0
    #: Standard deviation of what NVML says of its utilisation.
    reading_noise: float = 0.02


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    backends: tuple[Backend, ...]
    seconds: float
    seed: int = 1
    gpu: Gpu = H100
    meter: Meter = field(default_factory=Meter)
    foreign: Foreign | None = None
    roofline: Roofline = "whole"
    loading_seconds: float = 4.0
    lead_seconds: float = 3.0
    #: Whether engines report their steps; otherwise only what a relay can see of the streams.
    step_reports: bool = True
    #: Whether the ledger begins with what follows from the model's config and the GPU's data sheet.
    prior: bool = False
    #: Physical scatter of a step's duration and power about the model; the truth has it too.
    step_noise: float = 0.02

    @property
    def opens_at(self) -> float:
        """When the first request may arrive."""
        return self.loading_seconds + self.lead_seconds


def chat(requests_per_second: float) -> Backend:
    return Backend("chat", LLAMA_8B, Traffic(requests_per_second))


def load(requests_per_second: float, seconds: float) -> Scenario:
    return Scenario(f"{requests_per_second:g} req/s", (chat(requests_per_second),), seconds)


#: Reaches other parts of its data sheet than the prior supposes, in time and in power.
OTHER_H100 = replace(
    H100, gemm_flops=440e12, attention_flops=250e12, bytes_per_second=2.3e12, launch_seconds=1.5e-3,
    active_watts=110.0, compute_watts=300.0, memory_watts=210.0,
)  # fmt: skip

#: Seconds of arrivals per load: a low load needs longer for as many requests.
LOADS = {0.5: 300.0, 4.0: 150.0, 16.0: 90.0, 30.0: 90.0}


def main_loads(scale: float = 1.0) -> list[Scenario]:
    return [load(rate, seconds * scale) for rate, seconds in LOADS.items()]


def stresses(seconds: float = 45.0, requests_per_second: float = 8.0) -> list[Scenario]:
    """Each differs from `plain` in one thing."""
    plain = replace(load(requests_per_second, seconds), name="plain")
    small = Backend("small", QWEN_1B5, Traffic(requests_per_second, output_median=100))
    half = chat(requests_per_second / 2)
    return [
        plain,
        replace(plain, name="20 ms tick", meter=Meter(tick_seconds=0.020, poll_hertz=100.0)),
        replace(plain, name="20 ms tick, 20 Hz poll", meter=Meter(tick_seconds=0.020)),
        replace(plain, name="1 s averaging", meter=Meter(averaging_seconds=1.0)),
        replace(plain, name="power cap 400 W", gpu=replace(H100, cap_watts=400.0)),
        replace(plain, name="thermal drift", gpu=replace(H100, leakage=0.25, heating_seconds=30.0)),
        replace(plain, name="two backends", backends=(half, small)),
        replace(plain, name="foreign load", backends=(half,), foreign=Foreign()),
        replace(plain, name="no idle before", loading_seconds=0.0, lead_seconds=0.0),
        replace(plain, name="another GPU", gpu=OTHER_H100),
        replace(plain, name="another GPU, prior", prior=True, gpu=OTHER_H100),
        replace(plain, name="no step reports", step_reports=False),
        replace(plain, name="split roofline", roofline="split"),
        replace(plain, name="soft roofline", roofline="soft"),
    ]
