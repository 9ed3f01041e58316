"""What the cost models know before the first step: what an earlier run learnt, or a prior from the model's own files.

Coefficients are kept in a JSON file beside the receipts, by backend, its model, the device and the device's name: what
was learnt of one model or one GPU is not believed of another.
"""

import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from backends.spec import BackendSpec
from backends.vllm.shape import find_model, read_shape
from proxy.energy.events import Device, Model
from proxy.energy.prior import prior_from_model

log = logging.getLogger("joulegate.learnt")


class Gpu(NamedTuple):
    """A data sheet: dense FLOP/s at 16 bits, memory bandwidth in bytes/s, board power in watts."""

    peak_flops: float
    bandwidth: float
    max_watts: float


#: By a part of the name NVML tells, the most telling first. From NVIDIA's data sheets.
_GPUS = {
    "B200": Gpu(2.25e15, 8.0e12, 1000),
    "H200": Gpu(9.89e14, 4.8e12, 700),
    "H100 PCIe": Gpu(7.56e14, 2.0e12, 350),
    "H100": Gpu(9.89e14, 3.35e12, 700),
    "A100-PCIE": Gpu(3.12e14, 1.555e12, 250),
    "A100": Gpu(3.12e14, 2.039e12, 400),
    "L40S": Gpu(3.62e14, 8.64e11, 350),
    "L40": Gpu(1.81e14, 8.64e11, 300),
    "L4": Gpu(1.21e14, 3.0e11, 72),
    "A10G": Gpu(7.0e13, 6.0e11, 300),
    "A10": Gpu(1.25e14, 6.0e11, 150),
    "T4": Gpu(6.5e13, 3.2e11, 70),
    "RTX 4090": Gpu(1.65e14, 1.008e12, 450),
    "RTX 3090": Gpu(7.1e13, 9.36e11, 350),
}
#: A board at rest, as a part of its power: only a first guess, idle power is calibrated.
_IDLE_RATIO = 0.12


class Learnt:
    """The file at `path` (None: nothing is written), and priors for `specs`, which may change meanwhile."""

    def __init__(self, path: Path | None, specs: Mapping[str, BackendSpec]) -> None:
        self._path = path
        self._specs = specs
        self._names: dict[str, str] = {}
        self._keeping = threading.Lock()
        self._kept = dict(_read(path)) if path is not None else {}

    def recall(self, device: Device, backend: str | None = None) -> list[Model]:
        """What is known of the backends (or of one that is new) on a device."""
        self._names[device.device] = device.name
        found: list[Model] = []
        for name, spec in self._specs.items() if backend is None else [(backend, self._specs[backend])]:
            kept = self._kept.get(_key(spec, device.device, device.name))
            prior = kept or _prior(spec, device)
            if prior:
                found.append(Model(name, device.device, prior))
        return found

    def keep(self, models: Iterable[Model]) -> None:
        """Remember and write what is known now; a file that cannot be written is logged and costs nothing else.

        From any thread.
        """
        with self._keeping:
            for model in models:
                spec = self._specs.get(model.backend)
                if spec is not None:
                    name = self._names.get(model.device, "")
                    self._kept[_key(spec, model.device, name)] = dict(model.coefficients)
            if self._path is not None:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        rows = [{"of": key, "coefficients": coefficients} for key, coefficients in self._kept.items()]
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(rows))
            os.replace(fresh, path)
        except OSError as error:
            log.warning("what was learnt of the backends' costs cannot be kept in %s: %s", path, error.strerror)


Key = tuple[str, str, str, str]


def _key(spec: BackendSpec, device: str, name: str) -> Key:
    """By its seat: what takes over from a backend, and runs the same model, goes on with what that had learnt."""
    return spec.seat, f"{spec.kind}:{spec.model or spec.url}", device, name


def _read(path: Path) -> Iterator[tuple[Key, dict[str, float]]]:
    try:
        for row in json.loads(path.read_text()):
            backend, model, device, name = map(str, row["of"])
            coefficients = {str(key): float(value) for key, value in row["coefficients"].items()}
            yield (backend, model, device, name), coefficients
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not what was kept of the backends' costs and is left out: %s", path, error)


def _prior(spec: BackendSpec, device: Device) -> dict[str, float] | None:
    """A prior for a vLLM backend whose model and GPU are known; None otherwise, and the fit begins with a guess."""
    gpu = next((gpu for part, gpu in _GPUS.items() if part in device.name), None)
    if spec.kind != "vllm" or spec.model is None or gpu is None or device.device not in spec.device_names:
        return None
    folder = find_model(spec.model)
    shape = read_shape(folder) if folder is not None else None
    if shape is None:
        return None
    idle = _IDLE_RATIO * gpu.max_watts
    return prior_from_model(**asdict(shape), **gpu._asdict(), idle_watts=idle, devices=len(spec.devices))
