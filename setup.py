"""The list of packages; everything else is in pyproject.toml.

`fxfusion.passes` is added by name: an sdist, and a checkout without symbolic links,
has no folder fxfusion/passes.
"""

from setuptools import find_packages, setup

setup(packages=sorted({*find_packages(include=["fxfusion", "fxfusion.*"]), "fxfusion.passes"}))
