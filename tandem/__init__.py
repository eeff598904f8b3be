"""Tandem's public surface: the `tandem` command line and the Python API."""
