"""Fixtures for tests that need GPUs: import them in a conftest.py (`from tests.nvml.fixtures import *`)."""

import shutil
from pathlib import Path

import pytest

from tests.nvml.stub import NvmlStub, build

__all__ = ["nvml_library", "nvml_stub"]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a libnvidia-ml.so.1 that obeys a control file, built once."""
    if shutil.which("gcc") is None:
        pytest.fail("these tests build a small C library: install gcc")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml_stub(nvml_library: Path, tmp_path: Path) -> NvmlStub:
    """One idle simulated GPU for a subprocess started with `{**os.environ, **nvml_stub.env}`."""
    return NvmlStub(nvml_library, tmp_path / "nvml.control")
