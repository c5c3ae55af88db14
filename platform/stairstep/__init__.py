"""Stairstep: an experiment platform for visual document retrieval. The library computes; Ray, at its edge, places the computing."""

__version__ = "0.1.0"
