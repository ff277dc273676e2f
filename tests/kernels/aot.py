# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of the Triton kernels, no GPU needed: what each one costs per arch.

    python tests/kernels/aot.py              compile for every arch, compare with the table
    python tests/kernels/aot.py --arch 90    the same for one
    python tests/kernels/aot.py --update     compile for every arch, rewrite the table

Every kernel x dtype is compiled as it is launched for SD 1.5's cross-attention K/V projections
(768 -> 320 / 640 / 1280, ranks 16, addresses and sizes divisible by 16). Registers, stack and
shared memory come from `cuobjdump`, spills and matrix instructions from `nvdisasm`, both bundled
with Triton. Runs in a process of its own, because an interpreted kernel cannot be compiled.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from budget import Budget, Cost
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stamina_kernels.checks import MAX_HIDDEN
from stamina_kernels.triton import config
from stamina_kernels.triton.backward import backward_kernel
from stamina_kernels.triton.composition import compose_kernel, sample_compose_kernel
from stamina_kernels.triton.embedding import RANK_STEP
from stamina_kernels.triton.fold import fold_kernel
from stamina_kernels.triton.generate import generate_kernel
from stamina_kernels.triton.launch import ELEMENT
from stamina_kernels.triton.mask import sample_kernel
from stamina_kernels.triton.mlp import mlp_backward_kernel, mlp_kernel

ARCHS = ("80", "90", "100", "120", "gfx942")
# Largest dynamic shared memory a block may ask for, bytes (CUDA C++ programming guide, table of
# technical specifications; CDNA 3: 64 KiB of LDS).
BUDGET = Budget(
    "aot_budget.csv",
    {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10, "gfx942": 64 << 10},
)
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)")
SPILL = re.compile(r"\b(STL|LDL|scratch_(?:load|store)\w*)")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """A kernel with the constants it is launched with; everything else is a runtime argument."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]
    options: dict[str, Any]


def cases() -> Iterator[Case]:
    table = config.default_table()
    sizes = {"BH": config.rank_step(MAX_HIDDEN), "BR": RANK_STEP}
    yield Case("mlp", mlp_kernel, torch.float32, sizes, table["mlp"])
    yield Case("mlp_backward", mlp_backward_kernel, torch.float32, sizes, table["mlp"])
    yield from _of_rank(16, "", DTYPES)
    # what asks for more registers: wider steps, and several of them
    yield from _of_rank(32, "_r32", (torch.bfloat16,))
    yield from _of_rank(64, "_r64", (torch.bfloat16,))


def _of_rank(rank: int, suffix: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    table = config.default_table()
    step, passes = config.rank_step(rank), config.ceil_div(rank, config.MAX_RANK_STEP)
    mask = {"HARD": False, "QUADS": passes == 1, "BM": step}
    statistics = {"RELU": passes > 1, "HAS_INITIAL": True}
    for dtype in dtypes:
        weight = {"DTYPE": ELEMENT[dtype], "ALIGNMENT": 16, "BR": step}
        product = weight | {"PRECISION": config.dot_precision(dtype)}
        drawn = product | mask | statistics
        bits = {"p_effective": None}
        backward = {k: v for k, v in drawn.items() if k != "BM"} | {"PASSES": passes}
        generate = product | {"ONE_STEP": True, "p_bias": None}
        kernels = {
            "compose": (compose_kernel, product, "compose"),
            "sample_compose": (sample_compose_kernel, drawn, "sample_compose"),
            "sample_statistics": (sample_compose_kernel, drawn | bits, "statistics"),
            "generate": (generate_kernel, generate, config.kernel_name("generate", dtype)),
            "backward": (backward_kernel, backward, config.backward_name(dtype, rank)),
            "fold": (fold_kernel, weight, "fold"),
        }
        if passes > 1:  # where generate is not chosen
            del kernels["generate"]
        for name, (kernel, constants, entry) in kernels.items():
            yield Case(name + suffix, kernel, dtype, constants, table[entry])
    yield Case(f"sample{suffix}", sample_kernel, torch.float32, mask, table["sample"])


_POINTERS = {
    "p_tiles": "*i32", "p_members": "*i64", "p_mlps": "*i64", "p_layers": "*i64",
    "p_adapters": "*i64", "p_seed": "*i64", "p_step": "*i64", "p_bits": "*i32", "p_counts": "*i32",
    "p_overflow": "*i32",
}  # fmt: skip
_ACTIVATIONS = ("p_x", "p_dy", "p_y", "p_effective")
# 77 tokens a prompt: not a multiple of 16, nor are numbers of tiles
_UNALIGNED = ("tokens", "tiles", "most_tiles")
_ELEMENT_NAME = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if name in _ACTIVATIONS:
        return f"*{_ELEMENT_NAME[dtype]}"
    if name.startswith("p_"):
        return _POINTERS.get(name, "*fp32")
    return "i32"


def compile_case(case: Case, arch: str) -> Any:
    target = (
        GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
    )
    given = config.launch_options(case.options)
    tile = {k: v for k, v in given.items() if k in case.kernel.arg_names}
    options = {k: v for k, v in given.items() if k not in tile}
    constants = case.constants | tile
    signature, attributes = {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _argument_type(name, case.dtype)
        if name not in constants and name not in _UNALIGNED:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(case.kernel, signature, constants, attributes), target=target, options=options
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _nvidia_usage(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return registers, stack, code


def _amd_usage(code: str) -> tuple[int, int, str]:
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
        for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, code


def measure(case: Case, arch: str) -> Cost:
    compiled = compile_case(case, arch)
    if arch.startswith("gfx"):
        registers, stack, code = _amd_usage(compiled.asm["amdgcn"])
    else:
        registers, stack, code = _nvidia_usage(compiled.asm["cubin"])
    return Cost(
        case.name, _ELEMENT_NAME[case.dtype], arch, triton.__version__, registers, stack,
        len(SPILL.findall(code)), compiled.metadata.shared, len(MATRIX.findall(code)),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: every arch")
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    arguments = parser.parse_args()
    if arguments.update and arguments.arch:
        parser.error("--update rewrites the whole table: leave --arch out")
    work = [(case, arch) for case in cases() for arch in arguments.arch or ARCHS]
    costs = [measure(case, arch) for case, arch in tqdm(work, disable=None, unit="kernel")]
    if arguments.update:
        BUDGET.write(costs)
    return BUDGET.compare(costs)


if __name__ == "__main__":
    sys.exit(main())
