"""Packaging of the harness: `pip install .` gives the package and the command of the same name."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="harness",
    version="0.1.0",
    description="Fine-tune GPTs with DeepSpeed on clusters: ZeRO-3 with CPU and NVMe offload, exact data order, honest numbers.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["harness", "harness.*"]), "harness.ds_configs"],
    package_dir={"harness.ds_configs": "ds_configs"},
    package_data={"harness.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "transformers>=5.17,<5.24",
        "accelerate>=1.1.0",
        "datasets>=5.0",
        "charset-normalizer>=3",
        "tokenizers",
        "fastokens",
        "orjson",
        "xxhash",
        "fsspec",
        "safetensors",
        "tensorboard",
        "mpi4py>=4",
        "numpy",
        "pyarrow",
        "pydantic>=2.12,<3",
        "PyYAML>=6",
        "Jinja2>=3.1",
        "rich>=13",
        "plotly>=6",
        "psutil",
        "ninja",
        "setuptools",
    ],
    extras_require={
        "test": ["pytest", "pytest-timeout", "hypothesis", "py-spy"],
        "remote": ["s3fs", "gcsfs", "aiohttp"],
        "kubernetes": ["kubernetes"],
    },
    entry_points={"console_scripts": ["harness=harness.cli.main:main"]},
)
