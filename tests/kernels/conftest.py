# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
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
