"""Nomad: asyncio actors that run a pipeline over edge, fog and cloud."""

__version__ = "0.1.0"

from nomad.pipeline import operator, source

__all__ = ["__version__", "operator", "source"]
