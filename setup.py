# SPDX-License-Identifier: Apache-2.0
"""Builds `stamina_kernels/_cpu.so` and `_cuda.so`; everything else is in pyproject.toml.

`_cpu.so` uses torch's stable ABI only: one build serves torch 2.11 and later, and any Python.
Tile kernels are compiled once per instruction set, one of which is chosen at run time. `_cuda.so`
has a C interface and nothing of torch or the driver; nvcc is taken from CUDACXX, PATH or CUDA_HOME.
Without a compiler, without torch or without nvcc at build time the package installs without that
library and says so.
"""

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError

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
HOST_SOURCES = ["backward.cpp", "fold.cpp", "forward.cpp", "isa.cpp", "library.cpp", "mlp.cpp"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
    "-Wno-uninitialized",  # false alarms inside GCC 12's own avx512fintrin.h
    "-Wno-maybe-uninitialized",
]
# source, instruction set, flags
SIMD_SOURCES = [("kernels.cpp", "portable", [])]
if platform.machine() in ("x86_64", "AMD64"):
    SIMD_SOURCES += [
        ("kernels.cpp", "avx2", AVX2),
        ("kernels.cpp", "avx512", AVX512),
        ("pairs.cpp", "avx512", [*AVX512, "-mavx512bf16"]),
    ]

CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    # PTX of the older one: GPUs newer than both compile it when they load it
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--threads=2",
    "-fmad=false",  # every fused multiply-add is written as one
    "-cudart=static",
    "-shared",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xlinker=--version-script=csrc/cuda/exports.map",
    "-Xptxas=-warn-spills",
]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    named = os.environ.get("CUDACXX")
    return named or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # a plain shared library: no Python API, hence no Python tag
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = self.build_cuda if ext.name == "stamina_kernels._cuda" else self.build_cpu
        build(ext)

    def build_cuda(self, ext: Extension) -> None:
        compiler = nvcc()
        if compiler is None:
            raise CompileError("nvcc was not found; the package works without this library")
        host = [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        try:
            self.spawn([compiler, *CUDA_FLAGS, *host, "-o", target, *ext.sources])
        except ExecError as error:
            raise CompileError(str(error)) from error

    def build_cpu(self, ext: Extension) -> None:
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
        for source, name, flags in SIMD_SOURCES:
            objects += self.compiler.compile(
                [str(folder / source)],
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
            sources=[f"csrc/cpu/{name}" for name in ("kernels.cpp", "pairs.cpp", *HOST_SOURCES)],
            optional=True,  # a failed build is reported, not fatal
            depends=sorted(str(path) for path in Path("csrc").glob("*/*.h")),
        ),
        Extension(
            "stamina_kernels._cuda",
            sources=["csrc/cuda/library.cu"],
            optional=True,
            depends=sorted(str(path) for path in Path("csrc").glob("*/*.*h")),
        ),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
