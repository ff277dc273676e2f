# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel of every arch: no spills, no stack, within the committed table, no warning."""

import os
import shutil
import subprocess

import aot_cuda
import emulated
import pytest

from stamina_kernels import cuda

pytestmark = pytest.mark.aot


def test_kernels_stay_within_budget():
    if not cuda._LIBRARY.exists():
        pytest.skip("_cuda.so was not built; it needs nvcc")
    for tool in ("cuobjdump", "nvdisasm"):
        if aot_cuda.find_tool(tool) is None:
            pytest.skip(f"needs {tool}, of CUDA or of Triton")
    costs, budget = aot_cuda.measure(), aot_cuda.BUDGET.read()
    assert {cost[:3] for cost in costs} == set(budget)
    assert {cost.arch for cost in costs} == {"80", "90"}
    wrong = {cost[:3]: aot_cuda.BUDGET.faults(cost, budget[cost[:3]]) for cost in costs}
    assert not {name: found for name, found in wrong.items() if found}


def test_a_worse_row_is_a_fault():
    faults = aot_cuda.BUDGET.faults
    good = aot_cuda.Cost("fold", "any", "80", "13.0.88", 128, 0, 0, 42116, 16)
    assert faults(good, good) == []
    assert faults(good._replace(compiler="14.0.1", registers=130), good) == []
    for name, value in (("stack", 8), ("spills", 1), ("shared", 49153), ("matrix", 0)):
        assert len(faults(good._replace(compiler="14.0.1", **{name: value}), good)) == 1
    assert faults(good._replace(registers=129), good) == ["registers 129, was 128"]
    assert "no row in cuda_budget.csv" in faults(good, None)[0]


def test_kernels_compile_without_warnings(tmp_path):
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    command = [
        compiler, "-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart=static",
        "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
        "-Werror=all-warnings", "-Xptxas=-warn-spills,-warn-lmem-usage",
        str(emulated.ROOT / "csrc/cuda/library.cu"), "-o", str(tmp_path / "_cuda.so"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stdout + run.stderr
