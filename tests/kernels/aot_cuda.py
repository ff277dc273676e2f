# SPDX-License-Identifier: Apache-2.0
"""What each kernel of the built `_cuda.so` costs per arch, read from its code; no GPU needed.

    python tests/kernels/aot_cuda.py             compare with the table
    python tests/kernels/aot_cuda.py --update    rewrite it

Registers, stack and shared memory come from `cuobjdump`, spills and matrix instructions from
`nvdisasm`: those on PATH, or those bundled with Triton.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from budget import Budget, Cost

from stamina_kernels import cuda

DTYPES = {None: "any", "0": "fp32", "1": "bf16", "2": "fp16"}
# Static shared memory of a block, of which a multiprocessor has room for several. What a launch
# adds is not in the code: 16 KiB for sample_compose, 108 KiB (sm_80: 96) for backward.
BUDGET = Budget("cuda_budget.csv", {"80": 48 << 10, "90": 48 << 10})
SPILL = re.compile(r"\b(?:STL|LDL)\b")
MATRIX = re.compile(r"\bHMMA\b")
# template arguments: the dtype, then flags
KERNEL = re.compile(r"\d([a-z_]+)_kernel(?:I(?:LNS0_5DTypeE(\d)E)?((?:Lb[01]E)*))?")
FLAGS = {"backward": ("hard", "relu")}  # the others': whether launches are regular


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
    arch = re.search(r"sm_(\d+)", cubin.name)[1]
    compiler = re.search(rb"release \d+\.\d+, V([\d.]+)", cubin.read_bytes())
    usage = run_tool("cuobjdump", "--dump-resource-usage", cubin.name, cwd=str(cubin.parent))
    code = run_tool("nvdisasm", "-c", cubin.name, cwd=str(cubin.parent))
    sections = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S))
    for function, numbers in re.findall(r"Function (\S+?):\s+(.*)", usage):
        name, dtype, flags = KERNEL.search(function).groups()
        given = re.findall(r"Lb(\d)", flags or "")
        named = zip(FLAGS.get(name, ("regular",)), given, strict=False)
        name = "_".join([name, *(flag for flag, value in named if value == "1")])
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    update, costs = parser.parse_args().update, measure()
    if update:
        BUDGET.write(costs)
    return BUDGET.compare(costs)


if __name__ == "__main__":
    sys.exit(main())
