"""Distributed pretraining that is fair to every transformer architecture."""

__version__ = "0.1.0"
