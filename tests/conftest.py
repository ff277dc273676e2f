# SPDX-License-Identifier: Apache-2.0
import os

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:
    # before torch counts the cores; the processes that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import torch  # noqa: E402

if not torch.cuda.is_available():
    # before anything imports Triton: its kernels then run on the CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--all-archs",
        action="store_true",
        help="compile the Triton kernels ahead of time for every architecture, not sm_90 alone",
    )


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised tensors hold NaN (or the largest integer), so an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_interpreter(monkeypatch):
    """Backend `triton` cannot run on the CPU; no answer is remembered from or for another test."""
    from stamina_kernels import dispatch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._unavailable_reason.cache_clear()
    yield
    dispatch._unavailable_reason.cache_clear()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
