import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from tests.nvml.fixtures import nvml_library, nvml_stub
from tests.nvml.stub import NvmlStub

__all__ = ["nvml_library", "nvml_stub"]

P = ParamSpec("P")
T = TypeVar("T")


class Lab:
    """A process that runs on the stand-in for NVML, and the machine it sees."""

    def __init__(self, stub: NvmlStub, pool: ProcessPoolExecutor) -> None:
        self.stub = stub
        self._pool = pool

    def start(self, scenario: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        return self._pool.submit(scenario, *args, **kwargs)

    def run(self, scenario: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.start(scenario, *args, **kwargs).result(timeout=60)


@pytest.fixture(scope="session")
def shared_lab(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    stub = NvmlStub(nvml_library, tmp_path_factory.mktemp("stub") / "control")
    before = dict(os.environ)
    os.environ.update(stub.env)  # the dynamic linker reads it when the process starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result(timeout=60)
            os.environ.clear()
            os.environ.update(before)
            yield Lab(stub, pool)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """One idle GPU; tests change the machine through `lab.stub`."""
    shared_lab.stub.reset()
    return shared_lab
