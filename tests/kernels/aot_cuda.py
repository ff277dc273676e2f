# SPDX-License-Identifier: Apache-2.0
"""What each kernel of the built `_cuda.so` costs per arch, read from its code; no GPU needed.

    python tests/kernels/aot_cuda.py             compare with the table
    python tests/kernels/aot_cuda.py --update    rewrite it

Registers, stack and shared memory come from `cuobjdump`, spills and matrix instructions from
`nvdisasm`: those on PATH, or those bundled with Triton.
"""

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stamina_kernels import cuda

BUDGET = Path(__file__).parents[1] / "data" / "cuda_budget.csv"
DTYPES = {None: "any", "0": "fp32", "1": "bf16", "2": "fp16"}
# Static shared memory of a block, of which a multiprocessor has room for several.
SHARED_LIMIT = 48 << 10
SPILL = re.compile(r"\b(?:STL|LDL)\b")
MATRIX = re.compile(r"\bHMMA\b")
KERNEL = re.compile(r"\d([a-z_]+)_kernel(?:ILNS0_5DTypeE(\d))?")


class Cost(NamedTuple):
    """One row: registers per thread; stack bytes; spills; shared bytes per block; HMMA."""

    kernel: str
    dtype: str
    arch: str
    nvcc: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int


def find_tool(name: str) -> str | None:
    """A disassembler's path, or None."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    return shutil.which(name, path=Path(spec.origin).parent / "backends/nvidia/bin")


def run_tool(name: str, *arguments: str, cwd: str) -> str:
    command = [find_tool(name), *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def costs_of(cubin: Path) -> Iterator[Cost]:
    arch = re.search(r"sm_(\w+)\.cubin", cubin.name)[1]
    compiler = re.search(rb"release \d+\.\d+, V([\d.]+)", cubin.read_bytes())
    usage = run_tool("cuobjdump", "--dump-resource-usage", cubin.name, cwd=str(cubin.parent))
    code = run_tool("nvdisasm", "-c", cubin.name, cwd=str(cubin.parent))
    sections = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S))
    for function, numbers in re.findall(r"Function (\S+?):\s+(.*)", usage):
        name, dtype = KERNEL.search(function).groups()
        value = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", numbers))
        body = sections[function]
        yield Cost(
            name, DTYPES[dtype], arch, compiler[1].decode() if compiler else "unknown",
            int(value["REG"]), int(value["STACK"]), len(SPILL.findall(body)),
            int(value["SHARED"]), len(MATRIX.findall(body)),
        )  # fmt: skip


def measure() -> list[Cost]:
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", str(cuda._LIBRARY), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        return sorted(cost for cubin in cubins for cost in costs_of(cubin))


def faults(cost: Cost, committed: Cost | None) -> list[str]:
    """Limits that always hold; what got worse, where the table is of the same compiler."""
    found = [f"{n} {getattr(cost, n)}, must be 0" for n in ("stack", "spills") if getattr(cost, n)]
    if cost.shared > SHARED_LIMIT:
        found.append(f"shared {cost.shared}, the limit is {SHARED_LIMIT}")
    if committed is None:
        return [*found, f"no row in {BUDGET.name}; run with --update and commit it"]
    if committed.matrix and not cost.matrix:
        found.append("no matrix instruction")
    if cost.nvcc == committed.nvcc:
        found += [
            f"{name} {getattr(cost, name)}, was {getattr(committed, name)}"
            for name in ("registers", "shared")
            if getattr(cost, name) > getattr(committed, name)
        ]
    return found


def read_budget() -> dict[tuple[str, str, str], Cost]:
    with BUDGET.open(newline="") as file:
        _header, *rows = csv.reader(file)
    costs = [Cost(*row[:4], *map(int, row[4:])) for row in rows]
    return {cost[:3]: cost for cost in costs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    costs = measure()
    if parser.parse_args().update:
        beside = BUDGET.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Cost._fields, *costs])
        os.replace(beside, BUDGET)
    budget = read_budget()
    failed = False
    for cost in costs:
        found = faults(cost, budget.get(cost[:3]))
        failed |= bool(found)
        print(*cost, *(f"<- {fault}" for fault in found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
