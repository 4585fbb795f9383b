"""Packaging. Versions are pinned in constraints.txt alone; here stand only the ranges that work."""

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.11,<2.14",
    "numpy",
    "pydantic>=2.7",
    "pyyaml",
    "sentencepiece>=0.2",
    "tokenizers",
    "pyarrow",
    "zstandard",
    "tensorboard",
    "rich",
    "matplotlib",
    "jinja2",
]
TEST = [
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "transformers>=4.50",
    "megatron-core",
    "playwright",
]

setup(
    name="megaarch",
    version="0.1.0",
    description="Distributed pretraining that is fair to every transformer architecture",
    packages=find_packages(include=["megaarch", "megaarch.*"]),
    package_data={"megaarch": ["study/report/*.j2", "study/report/*.css"]},
    python_requires=">=3.11",
    install_requires=REQUIRED,
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff", "pre-commit"],
        "deepspeed": ["deepspeed>=0.17"],
        "flash-attn": ["flash-attn>=2.6"],
        "mpi": ["mpi4py>=4"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["megaarch = megaarch.cli:main"]},
)
