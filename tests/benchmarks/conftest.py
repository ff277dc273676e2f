# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import machine
from benchmarks.cli import app
from benchmarks.suites import SUITES


def command(*arguments):
    """The outcome of `python -m benchmarks` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session", autouse=True)
def _small_machine():
    """Nothing here is a figure to keep: one thread, and small products for the peaks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "GEMM_SIZE", 128)
        patch.setattr(machine, "COPY_BYTES", 2**16)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The result file of every suite, run quickly from the command line.

    Without Triton's interpreter, which takes minutes for all of them; test_devices.py runs it.
    """
    folder = tmp_path_factory.mktemp("results")
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        for name in SUITES:
            written[name] = folder / f"{name}.json"
            outcome = command("run", name, "--json", written[name], "--quick")
            assert outcome.exit_code == 0, outcome.output
    return written


@pytest.fixture(scope="session")
def results(files):
    return {name: json.loads(file.read_text()) for name, file in files.items()}
