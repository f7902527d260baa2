"""All metadata is in setup.cfg; this file is for tools that look for a setup.py."""

from setuptools import setup

setup()
