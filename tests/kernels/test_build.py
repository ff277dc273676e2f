# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries: they build where they can, are left out with a message where they cannot;
one keeps to torch's stable ABI, the other to its own C interface."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch

from stamina_kernels import cpu, cuda, cuda_interface

ROOT = Path(__file__).resolve().parents[2]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ["--build-lib", tmp_path, "--build-temp", tmp_path]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_compiler_the_build_goes_on_without_the_library(tmp_path):
    result = build(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    for library in ("_cpu", "_cuda"):
        message = f'building extension "stamina_kernels.{library}" failed'
        assert message in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_torch_the_build_goes_on_without_the_library(tmp_path):
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
    )
    result = build(tmp_path, PYTHONPATH=str(tmp_path), CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "torch cannot be imported" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("backend", [cpu, cuda])
def test_a_missing_library_is_reported(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_LIBRARY", tmp_path / "library.so")
    assert "library.so was not built" in backend.unavailable_reason.__wrapped__()


@pytest.mark.parametrize("backend", [cpu, cuda])
def test_a_library_of_another_copy_of_the_package_is_named(backend, tmp_path, monkeypatch):
    """As where the source folder, which Python looks into first, hides what was installed."""
    sources, installed = tmp_path / "sources", tmp_path / "installed"
    for folder in (sources, installed):
        (folder / "stamina_kernels").mkdir(parents=True)
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(backend, "_LIBRARY", sources / "stamina_kernels" / "library.so")
    assert "library.so was not built" in backend.unavailable_reason.__wrapped__()
    (installed / "stamina_kernels" / "library.so").touch()
    assert backend.unavailable_reason.__wrapped__() == (
        f"{sources}/stamina_kernels is the package in use and holds no library.so; "
        f"{installed}/stamina_kernels has it: "
        f"run outside {sources}, or install with `pip install -e .`"
    )


@pytest.mark.parametrize("backend", [cpu, cuda])
def test_a_broken_library_is_reported(backend, tmp_path, monkeypatch):
    (tmp_path / "library.so").write_text("not a library")
    monkeypatch.setattr(backend, "_LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(backend, "_library", backend._library.__wrapped__)
    assert "library.so cannot be used" in backend.unavailable_reason.__wrapped__()


@pytest.mark.parametrize(("backend", "module"), [(cpu, cpu), (cuda, cuda_interface)])
def test_a_library_of_other_sources_is_reported(backend, module, monkeypatch):
    """As after an update of the sources without a build."""
    if not backend._LIBRARY.exists():
        pytest.skip(f"needs {backend._LIBRARY.name}")
    monkeypatch.setattr(module, "_INTERFACE_VERSION", 0)
    monkeypatch.setattr(backend, "_library", backend._library.__wrapped__)
    reason = backend.unavailable_reason.__wrapped__()
    assert reason == (
        f"{backend._LIBRARY.name} cannot be used: it was built from another version of the "
        "sources; build it again"
    )


def test_a_library_from_before_versions_is_reported(tmp_path):
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    library = tmp_path / "library.so"
    subprocess.run([compiler, "-shared", "-o", library, "-x", "c", "/dev/null"], check=True)
    with pytest.raises(OSError, match="built from another version of the sources"):
        cuda_interface.load(library)


def symbols(library: Path, which: str) -> set[str]:
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip(f"needs {library.name} and nm")
    listing = subprocess.run(
        ["nm", "-D", which, library], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r" [A-Za-z] ([^\s@]+)", listing))


def test_the_cuda_library_exports_its_c_interface_alone():
    header = (ROOT / "csrc/cuda/interface.h").read_text()
    declared = set(re.findall(r"STAMINA_EXPORT [^;(]*?(stamina_\w+)\(", header))
    assert len(declared) == 11
    assert symbols(cuda._LIBRARY, "--defined-only") == declared


def test_the_cuda_library_loads_without_a_driver():
    imported = symbols(cuda._LIBRARY, "--undefined-only")
    assert not [name for name in imported if re.match(r"cu[A-Z]|cuda|torch|aoti|_?Py", name)]
    program = f"import ctypes; ctypes.CDLL({str(cuda._LIBRARY)!r}).stamina_error(); print('loaded')"
    child = [sys.executable, "-c", program]
    assert subprocess.run(child, capture_output=True, text=True).stdout == "loaded\n"


def test_without_a_gpu_the_cuda_backend_says_so(monkeypatch):
    if not cuda._LIBRARY.exists():
        pytest.skip("_cuda.so was not built")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cuda.unavailable_reason.__wrapped__() == "no NVIDIA GPU is visible"


def test_a_driver_older_than_the_library_is_told_beforehand(monkeypatch):
    """As where torch was built with an older CUDA, which the driver does serve."""
    if not cuda._LIBRARY.exists() or torch.cuda.is_available():
        pytest.skip("needs _cuda.so and no GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    reason = cuda.unavailable_reason.__wrapped__()
    assert "CUDA driver version is insufficient for CUDA runtime version" in reason


def test_only_stable_symbols_are_imported():
    imported = symbols(cpu._LIBRARY, "--undefined-only")
    # the C and C++ runtimes are the only others
    torch_symbols = {name for name in imported if re.search(r"torch|c10|at[0-9]|^_?Py", name)}
    assert "torch_parallel_for" in torch_symbols
    assert all(re.match(r"(aoti_)?torch_\w+$", name) for name in torch_symbols), torch_symbols


def test_the_sanitizers_run_where_none_is_named():
    assert sanitize.chosen([]) == ["address", "thread"]
    assert sanitize.chosen(["thread"]) == ["thread"]
