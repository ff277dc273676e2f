# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from emulated import cuda_on
from paths import ALL, forced


@pytest.fixture(params=ALL)
def isa(request):
    with forced(request.param) as name:
        yield name


@pytest.fixture(scope="module", params=["reference", *ALL])
def backend_on_path(request):
    """The name of a backend, `cpu` once on every instruction set of this machine."""
    if request.param == "reference":
        yield "reference"
        return
    with forced(request.param):
        yield "cpu"


@pytest.fixture
def threads():
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_device(request):
    """Where backend `cuda` runs: the CPU, emulating a GPU, or the GPU."""
    with cuda_on("gpu" if request.param == "gpu" else ()) as device:
        yield device
