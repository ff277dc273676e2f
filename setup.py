# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ backend `stamina_kernels/_cpu.so`; everything else is in pyproject.toml.

The library uses torch's stable ABI only: one build serves torch 2.11 and later, and any Python.
`kernels.cpp` is compiled once per instruction set and chosen at run time. Without a compiler or
without torch at build time the package installs without the library and says so.
"""

import importlib.util
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

STABLE_ABI = "0x020b000000000000"  # torch 2.11
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    # the same mask bits on every instruction set need every rounding spelled out
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
HOST_SOURCES = ["backward.cpp", "fold.cpp", "forward.cpp", "isa.cpp", "library.cpp"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",  # false alarms inside GCC 12's own avx512fintrin.h
        "-Wno-maybe-uninitialized",
    ]


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


class BuildCpu(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # a plain shared library: no Python API, hence no Python tag
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if torch is None:
            raise CompileError("torch cannot be imported; the package works without this library")
        folder = Path("csrc/cpu")
        common = [*FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", f"{torch}/include"]
        objects = self.compiler.compile(
            [str(folder / name) for name in HOST_SOURCES],
            output_dir=self.build_temp,
            extra_postargs=common,
            depends=ext.depends,
        )
        for name, flags in INSTRUCTION_SETS.items():
            objects += self.compiler.compile(
                [str(folder / "kernels.cpp")],
                output_dir=os.path.join(self.build_temp, name),
                extra_postargs=[*FLAGS, *flags, f"-DSTAMINA_ISA_{name.upper()}"],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=[f"{torch}/lib"],
            libraries=["torch_cpu"],
            target_lang="c++",
        )


setup(
    ext_modules=[
        Extension(
            "stamina_kernels._cpu",
            sources=[f"csrc/cpu/{name}" for name in ("kernels.cpp", *HOST_SOURCES)],
            optional=True,  # a failed build is reported, not fatal
            depends=sorted(str(path) for path in Path("csrc").glob("*/*.h")),
        )
    ],
    cmdclass={"build_ext": BuildCpu},
)
