# SPDX-License-Identifier: Apache-2.0
"""The C++ backend under sanitizers: builds csrc in a temporary copy and runs tests against it.

    python tests/kernels/sanitize.py address    memory errors and undefined behaviour
    python tests/kernels/sanitize.py thread     data races, with four threads in every operation
    python tests/kernels/sanitize.py            both, as `make sanitize` does

Needs g++ and its runtimes on Linux. The first report ends the run and fails it.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "stamina_kernels", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Sanitizer(NamedTuple):
    flags: str
    symbol: str  # that the instrumented library imports
    runtimes: tuple[str, ...]
    options: dict[str, str]
    tests: tuple[str, ...]


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer",
        "__asan_init",
        # the C++ runtime too: without it the sanitizer cannot pass exceptions on
        ("libasan.so", "libubsan.so", "libstdc++.so.6"),
        # Python itself leaks on purpose; frames that outlive their function are not aligned to the
        # 64 bytes that GCC counts on for AVX-512 (GCC bug 110027)
        {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        (
            "tests/kernels/test_cpu.py",
            "tests/kernels/test_cpu_arguments.py",
            "tests/kernels/test_determinism.py",
        ),
    ),
    "thread": Sanitizer(
        "-fsanitize=thread -fno-omit-frame-pointer",
        "__tsan_init",
        ("libtsan.so", "libstdc++.so.6"),
        # torch and Python are not instrumented: what they do among themselves is not looked at
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},
        ("tests/kernels/test_determinism.py",),
    ),
}


def build(folder: Path, sanitizer: Sanitizer) -> None:
    flags = sanitizer.flags
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    setup = folder / "setup.py"
    # reports name lines; the unrolled kernels take the compiler many minutes at -O3
    text = setup.read_text().replace('"-g0"', '"-g1"').replace('"-O3"', '"-O1"')
    setup.write_text(text)
    environment = {**os.environ, "CC": "gcc", "CXX": "g++", "CFLAGS": flags, "LDFLAGS": flags}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder, env={**environment, "CXXFLAGS": flags}, check=True,
    )  # fmt: skip
    library = folder / "stamina_kernels" / "_cpu.so"
    if not library.exists() or sanitizer.symbol.encode() not in library.read_bytes():
        sys.exit("the instrumented library was not built")


def runtime(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if path == name:
        sys.exit(f"g++ has no {name}")
    return str(Path(path).resolve())


def run(name: str) -> bool:
    sanitizer = SANITIZERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.monotonic()
        build(folder, sanitizer)
        print(f"{name}: built in {time.monotonic() - started:.0f} s", flush=True)
        environment = {
            **os.environ,
            **sanitizer.options,
            "LD_PRELOAD": " ".join(map(runtime, sanitizer.runtimes)),
            "PYTHONPATH": str(folder),
            "PYTHONMALLOC": "malloc",
        }
        started = time.monotonic()
        # shadow memory wants its addresses, which randomisation may take
        python = ["setarch", platform.machine(), "-R", sys.executable]
        where = "from stamina_kernels import cpu; cpu.instruction_set(); print(cpu._LIBRARY)"
        loaded = subprocess.run(
            [*python, "-c", where], cwd=folder, env=environment, capture_output=True, text=True
        )
        if loaded.stdout.strip() != str(folder / "stamina_kernels" / "_cpu.so"):
            sys.exit(f"the instrumented library cannot be loaded: {loaded.stdout}{loaded.stderr}")
        # reports go past Python, which pytest must not capture; tests of the environment start
        # processes with settings of their own
        options = ["-q", "-x", "-p", "no:cacheprovider", "--capture=sys", "-k", "not environment"]
        tests = [*python, "-m", "pytest", *options, *sanitizer.tests]
        passed = subprocess.run(tests, cwd=folder, env=environment).returncode == 0
        verdict = "no report" if passed else "FAILED"
        print(f"{name}: {verdict} in {time.monotonic() - started:.0f} s", flush=True)
    return passed


def chosen(arguments: list[str] | None = None) -> list[str]:
    """The name on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=SANITIZERS, nargs="?", help="default: both")
    name: str | None = parser.parse_args(arguments).sanitizer
    return list(SANITIZERS) if name is None else [name]


def main() -> int:
    passed = [run(name) for name in chosen()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
