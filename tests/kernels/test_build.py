# SPDX-License-Identifier: Apache-2.0
"""The C++ library: it builds where it can, is left out with a message where it cannot, and keeps
to torch's stable ABI."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stamina_kernels import cpu

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
    assert 'building extension "stamina_kernels._cpu" failed' in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_torch_the_build_goes_on_without_the_library(tmp_path):
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
    )
    result = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "torch cannot be imported" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_library_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    assert "_cpu.so was not built" in cpu.unavailable_reason.__wrapped__()


def test_a_broken_library_is_reported(tmp_path, monkeypatch):
    (tmp_path / "_cpu.so").write_text("not a library")
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
    assert "_cpu.so cannot be used" in cpu.unavailable_reason.__wrapped__()


def test_only_stable_symbols_are_imported():
    if cpu.unavailable_reason() is not None or shutil.which("nm") is None:
        pytest.skip(f"needs the library and nm: {cpu.unavailable_reason()}")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", cpu._LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    imported = set(re.findall(r" [Uw] ([^\s@]+)", listing))
    # the C and C++ runtimes are the only others
    torch_symbols = {name for name in imported if re.search(r"torch|c10|at[0-9]|^_?Py", name)}
    assert "torch_parallel_for" in torch_symbols
    assert all(re.match(r"(aoti_)?torch_\w+$", name) for name in torch_symbols), torch_symbols
