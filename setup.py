"""Build entry point: all metadata is in pyproject.toml, and nothing here compiles."""

from setuptools import setup

setup()
