"""The state of a node as its exporters see it, to test them with."""

from dataclasses import dataclass

from proxy.energy.attribution import DeviceBalance
from proxy.energy.carbon import Intensity
from proxy.energy.quantities import GramsPerKilowattHour, Microjoules, Watts
from proxy.export.snapshot import OperationsSnapshot


@dataclass(frozen=True)
class Meter:
    device: str
    kind: str
    up: bool = True
    disagreement: float | None = None


@dataclass(frozen=True)
class Store:
    up: bool = True
    waiting: int = 0
    dropped: int = 0


def balance(device: str = "gpu:0", *, requests: int = 4_000_000_000, counter: int = 4_321_000_000) -> DeviceBalance:
    """A device's books; what is neither requests, foreign nor pending is idle."""
    return DeviceBalance(
        device=device,
        name="NVIDIA H100" if device != "host" else "Xeon",
        meter="nvml-counter" if device != "host" else "rapl",
        estimated=False,
        accuracy_ratio=0.05,
        counter=Microjoules(counter),
        requests=Microjoules(requests),
        idle=Microjoules(counter - requests - 21_000_001),
        foreign=Microjoules(20_000_000),
        unattributed=Microjoules(0),
        pending=Microjoules(1_000_001),
        power=Watts(410.2),
        idle_power=Watts(70.0),
        last_sample_at=None,
        fit_error_ratio={"chat": 0.02},
    )


def snapshot(*devices: DeviceBalance, lost: int = 0, up: bool = True) -> OperationsSnapshot:
    return OperationsSnapshot(
        devices=devices or (balance(), balance("host")),
        meters=[Meter("gpu:0", "nvml-counter", disagreement=0.01), Meter("host", "rapl")],
        backends={("chat", "chat"): up, ("painter", "painter"): True},
        queues={"chat": 3, "painter": 0},
        intensity=Intensity(GramsPerKilowattHour(56.0), zone="FRA", source="codecarbon", as_of="2023"),
        step_reports={"chat": 120, "painter": 7},
        step_reports_lost={"chat": lost} if lost else {},
        store=Store(),
    )
