"""Loads the extension, once, after torch."""

import torch  # noqa: F401  (its libraries must be in the process first)

import prunelm._C  # noqa: F401
