"""Packaging. The rest of the tools' settings is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"', (ROOT / "mythos_ds" / "__init__.py").read_text(), re.M)
BESIDE = {
    "mythos_ds.presets": "ds_configs",
    "mythos_ds.tools": "tools",
    "mythos_ds.launch": "launch",
    "mythos_ds.models.tiny": "models/tiny",
}
IN_A_CHECKOUT_ONLY = {"config_schema", "preset_table", "test_environments"}
"""Mains that read or write files of the checkout."""


class BuildModules(build_py):
    """Leaves out the mains that need a checkout."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "mythos_ds.tools" or module[1] not in IN_A_CHECKOUT_ONLY]


setup(
    name="mythos_ds",
    version=VERSION,
    description="Trains recurrent-depth mixture-of-experts language models with DeepSpeed",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Presets, mains, job files and the small model lie beside the package in a checkout, and travel in it in a wheel.
    cmdclass={"build_py": BuildModules},
    packages=[*find_packages(include=["mythos_ds", "mythos_ds.*", "mythos_hf", "mythos_vllm"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "mythos_ds": ["py.typed"],
        "mythos_ds.presets": ["*.json"],
        "mythos_ds.launch": ["*.sh", "*.sbatch", "*.yaml"],
        "mythos_ds.models.tiny": ["*.json", "*.safetensors", "*.model", "README.md"],
    },
    # Upper bounds are the newest minor release that the tests ran on, for each library that is subclassed or patched or
    # whose files are read: a newer one may compute something else, silently. `make test-newest` tries what is newer.
    install_requires=[
        "torch>=2.6,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.17",
        "sentencepiece>=0.2",
        "tokenizers>=0.22,<0.24",
        "tensorboard>=2.16",
        "pydantic>=2.7,<2.15",
        "rich>=13",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "setuptools",  # tensorboard and deepspeed need it at run time on Python 3.12 and later
    ],
    entry_points={
        "console_scripts": ["mythos-ds = mythos_ds.__main__:main"],
        "vllm.general_plugins": ["mythos = mythos_vllm:register"],
    },
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "hf": ["transformers>=5.16,<5.25", "datasets>=3,<5.3", "pyarrow>=15"],
        "vllm": ["vllm>=0.32,<0.33", "transformers>=5.16,<5.20"],
        "lab": ["matplotlib>=3.8"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "packaging>=23",
            "matplotlib>=3.8",
            "pyarrow>=15",
            "datasets>=3,<5.3",
            "transformers>=5.16,<5.25",  # also imported by open-mythos, the oracle of the parity tests
            "uv>=0.13",  # writes the locks
        ],
    },
)
