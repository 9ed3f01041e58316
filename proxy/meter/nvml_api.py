"""pynvml behind our own types: errors with their cures, sessions that can be renewed, GPUs by UUID, sensors by asking.

Nothing here knows what a meter is. One thread at a time uses a session (the sampler's, after discovery).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pynvml

from proxy.meter.base import MeterError

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
TIMEOUT = 10
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
UNKNOWN = 999

CURES = {
    UNINITIALIZED: "none needed if it passes: the NVML session is opened anew",
    NOT_SUPPORTED: "use a Volta or newer GPU; in a virtual machine, measure on its host",
    NO_PERMISSION: "let this user open /dev/nvidia* (in a container: --gpus with the `utility` capability)",
    DRIVER_NOT_LOADED: "load the NVIDIA driver (modprobe nvidia) and see that nvidia-smi works",
    TIMEOUT: "none needed if it passes; if it stays, look for Xid errors in dmesg",
    LIBRARY_NOT_FOUND: "install the NVIDIA driver (in a container: run it with --gpus), if this machine has a GPU",
    FUNCTION_NOT_FOUND: "update the NVIDIA driver: its libnvidia-ml lacks this function",
    GPU_IS_LOST: "the GPU fell off its bus: check power and cooling, then reset it or reboot; it is picked up again",
    RESET_REQUIRED: "reset it with nvidia-smi --gpu-reset once nothing uses it; it is picked up again",
    LIB_RM_VERSION_MISMATCH: "the driver was updated under a running kernel module: reload the module or reboot",
    UNKNOWN: "none needed if it passes; if it stays, look for Xid errors in dmesg and restart the driver",
}

#: Worth another try within a second.
PASSING = frozenset({TIMEOUT, UNKNOWN})

#: The handle, or the whole session, may be stale: look the GPU up again before the next reading.
STALE = frozenset({UNINITIALIZED, INVALID_ARGUMENT, NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN})

#: This GPU or driver will not answer however often it is asked.
FINAL = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND})


_MOST_USERS = 100


class NvmlError(MeterError):
    """An NVML call failed with `code`; the message names the call, the error and the cure."""

    def __init__(self, code: int, call: str) -> None:
        name = str(pynvml.NVMLError(code))
        super().__init__(
            f"NVML answered {name!r} ({code}) to {call}", CURES.get(code, "see nvidia-smi and dmesg for the cause")
        )
        self.code = code


def ask(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call NVML; raises NvmlError."""
    try:
        return call(*args, **kwargs)
    except pynvml.NVMLError as error:
        raise NvmlError(error.value, getattr(call, "__name__", "NVML")) from error


class Session:
    """An initialised NVML. Renewing it (after a driver reload) makes all handles stale: `generation` tells.

    Renewing disturbs the other GPUs, so it waits while any of them answers. Raises NvmlError where there is no NVML.
    """

    renewal_seconds = 1.0
    renewal_seconds_while_others_work = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        ask(pynvml.nvmlInit)
        self.generation = 0
        self.answered_at = clock()
        self._open = True
        self._clock = clock
        self._renewed_at = float("-inf")

    def renew(self) -> bool:
        """Open NVML anew if that is due; False if it is not. Raises NvmlError where it fails."""
        now = self._clock()
        others_work = now - self.answered_at < self.renewal_seconds
        pause = self.renewal_seconds_while_others_work if others_work else self.renewal_seconds
        if now - self._renewed_at < pause:
            return False
        self._renewed_at = now
        self.generation += 1
        self._open = False
        _shut_down_entirely()
        ask(pynvml.nvmlInit)
        self._open = True
        log.info("NVML was opened anew")
        return True

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.debug("NVML did not shut down cleanly: %s", error)


def _shut_down_entirely() -> None:
    """NVML counts its users and begins anew only without any; CodeCarbon's import alone makes one, for good."""
    for _ in range(_MOST_USERS):
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            return


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    index: int
    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class Field:
    """A sensor read through nvmlDeviceGetFieldValues, many at once in one call."""

    id: int
    scope: int
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A sensor with a function of its own."""

    function: Callable[[Any], int]
    name: str


Source = Field | Call

SCOPE_GPU = 0
SCOPE_MODULE = 1

#: Millijoules since the driver was loaded.
ENERGY_SOURCES: tuple[Source, ...] = (
    Field(pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, SCOPE_GPU, "energy counter"),
    Call(pynvml.nvmlDeviceGetTotalEnergyConsumption, "energy counter"),
)
_INSTANT_GPU = Field(pynvml.NVML_FI_DEV_POWER_INSTANT, SCOPE_GPU, "instantaneous power")
_INSTANT_MODULE = Field(pynvml.NVML_FI_DEV_POWER_INSTANT, SCOPE_MODULE, "instantaneous power of the module")
_AVERAGE_GPU = Field(pynvml.NVML_FI_DEV_POWER_AVERAGE, SCOPE_GPU, "power averaged over 1 s")
_AVERAGE_MODULE = Field(pynvml.NVML_FI_DEV_POWER_AVERAGE, SCOPE_MODULE, "power of the module averaged over 1 s")
_POWER_USAGE = Call(pynvml.nvmlDeviceGetPowerUsage, "power (on Ampere and newer averaged over 1 s)")

#: Milliwatts, best first. A module's counter is best compared with a module's power.
POWER_SOURCES: tuple[Source, ...] = (_INSTANT_GPU, _INSTANT_MODULE, _AVERAGE_GPU, _AVERAGE_MODULE, _POWER_USAGE)
MODULE_POWER_SOURCES: tuple[Source, ...] = (_INSTANT_MODULE, _AVERAGE_MODULE, _INSTANT_GPU, _AVERAGE_GPU, _POWER_USAGE)

_VALUE_MEMBERS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


class Link:
    """A GPU by its UUID, whatever becomes of handles and sessions. All methods raise NvmlError."""

    def __init__(self, session: Session, gpu: GpuIdentity) -> None:
        self.gpu = gpu
        self._session = session
        self._handle: Any = None
        self._generation = -1

    def read(self, sources: Sequence[Source]) -> list[int | NvmlError]:
        """One answer per source: the call as a whole can succeed while single values fail."""
        handle = self._current_handle()
        fields = [(source.id, source.scope) for source in sources if isinstance(source, Field)]
        try:
            values = iter(ask(pynvml.nvmlDeviceGetFieldValues, handle, fields) if fields else ())
            answers = [_answer(source, handle, values) for source in sources]
        except NvmlError as error:
            self._forget_if_stale(error)
            raise
        for answer in answers:
            self._note(answer)
        return answers

    def ask(self, call: Callable[..., T], *args: Any) -> T:
        """Any other question about this GPU: `call(handle, *args)`."""
        try:
            return ask(call, self._current_handle(), *args)
        except NvmlError as error:
            self._forget_if_stale(error)
            raise

    def close(self) -> None:
        """Close the session, for all its GPUs."""
        self._session.close()

    def _current_handle(self) -> Any:
        if self._handle is None or self._generation != self._session.generation:
            self._handle = self._find()
            self._generation = self._session.generation
        return self._handle

    def _find(self) -> Any:
        try:
            return ask(pynvml.nvmlDeviceGetHandleByUUID, self.gpu.uuid)
        except NvmlError as error:
            if error.code not in STALE or not self._session.renew():
                raise
            return ask(pynvml.nvmlDeviceGetHandleByUUID, self.gpu.uuid)

    def _note(self, answer: int | NvmlError) -> None:
        if isinstance(answer, NvmlError):
            self._forget_if_stale(answer)
        else:
            self._session.answered_at = time.monotonic()

    def _forget_if_stale(self, error: NvmlError) -> None:
        if error.code in STALE:
            self._handle = None


def _answer(source: Source, handle: Any, values: Any) -> int | NvmlError:
    if isinstance(source, Field):
        value = next(values)
        if value.nvmlReturn:
            return NvmlError(value.nvmlReturn, f"nvmlDeviceGetFieldValues (field {source.id}, {source.name})")
        return int(getattr(value.value, _VALUE_MEMBERS[value.valueType]))
    try:
        return ask(source.function, handle)
    except NvmlError as error:
        return error


def first_that_answers(link: Link, sources: Sequence[Source]) -> tuple[Source | None, NvmlError | None]:
    """The first source that gives a number above 0, asked one by one; else the last error.

    A GPU that answers 0 has no such sensor (seen on vGPU guests). Raises NvmlError for what is no property of the
    sensor: a lost GPU, a driver that does not answer.
    """
    refusal: NvmlError | None = None
    for source in sources:
        try:
            answer = link.read([source])[0]
        except NvmlError as error:
            answer = error
        if isinstance(answer, NvmlError):
            if answer.code not in FINAL:
                raise answer
            refusal = answer
        elif answer > 0:
            return source, None
    return None, refusal


def gpu_at(index: int) -> GpuIdentity:
    """Raises NvmlError."""
    handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    return GpuIdentity(index, ask(pynvml.nvmlDeviceGetUUID, handle), ask(pynvml.nvmlDeviceGetName, handle))


def parent_of_mig(uuid: str) -> str | None:
    """The UUID of the GPU that a MIG instance is a part of; None where there is no such instance."""
    try:
        instance = ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)
        parent = ask(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, instance)
        return str(ask(pynvml.nvmlDeviceGetUUID, parent))
    except NvmlError:
        return None


def visible(
    gpus: Sequence[GpuIdentity], setting: str | None, parent: Callable[[str], str | None] = parent_of_mig
) -> list[GpuIdentity]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order, read as CUDA does: a wrong entry ends the list."""
    if setting is None:
        return list(gpus)
    chosen: dict[int, GpuIdentity] = {}
    for entry in setting.split(","):
        gpu = _named(gpus, entry.strip(), parent)
        if gpu is None:
            break
        chosen.setdefault(gpu.index, gpu)
    return list(chosen.values())


def _named(gpus: Sequence[GpuIdentity], entry: str, parent: Callable[[str], str | None]) -> GpuIdentity | None:
    if entry.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    uuid: str | None = entry
    if entry.startswith("MIG-GPU-"):  # the older form: MIG-<the GPU's UUID>/<instance>/<compute instance>
        uuid = entry.removeprefix("MIG-").partition("/")[0]
    elif entry.startswith("MIG-"):
        uuid = parent(entry)
    matches = [gpu for gpu in gpus if uuid and len(uuid) > len("GPU-") and gpu.uuid.startswith(uuid)]
    return matches[0] if len(matches) == 1 else None
