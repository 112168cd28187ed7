"""Where the packages lie, and which mains a wheel leaves out. All other metadata are in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BESIDE = {
    "mythos_ds.presets": "ds_configs",
    "mythos_ds.tools": "tools",
    "mythos_ds.launch": "launch",
    "mythos_ds.models.tiny": "models/tiny",
}
"""Presets, mains, job files and the small model lie beside the package in a checkout, and travel in it in a wheel."""
IN_A_CHECKOUT_ONLY = {"config_schema", "gpu_acceptance", "preset_table", "test_environments"}
"""Mains that read or write files of the checkout."""


class BuildModules(build_py):
    """Leaves out the mains that need a checkout."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "mythos_ds.tools" or module[1] not in IN_A_CHECKOUT_ONLY]


setup(
    cmdclass={"build_py": BuildModules},
    packages=[*find_packages(include=["mythos_ds", "mythos_ds.*", "mythos_hf", "mythos_vllm"]), *BESIDE],
    package_dir=BESIDE,
)
