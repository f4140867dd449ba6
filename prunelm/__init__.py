"""Prunes a Transformer language model to the size you name and decodes speech with it fast."""

from prunelm.version import __version__

__all__ = ["__version__"]
