"""Transducer searches with language models fused in."""

from prunelm.decoding.fusion import Fusion
from prunelm.decoding.greedy import greedy
from prunelm.decoding.search import Hypothesis, mbs

__all__ = ["Fusion", "Hypothesis", "greedy", "mbs"]
