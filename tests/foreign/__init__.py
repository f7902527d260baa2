"""The tests of other packages, run with this library in their place: see ``run.py``."""
