import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Rows = tuple[_Ints, _Ints, _Ints, _Ints]

def build_information() -> dict[str, object]: ...

# Whether all are plain tensors on one device whose memory is there; None is none.
def readable(*tensors: Tensor | None) -> bool: ...

# Without torch's dispatcher; None where a call must go through it: see csrc/cpu/direct.h.
def beam_step(
    score: Tensor,
    am_logits: Tensor,
    terms: tuple[tuple[Tensor, Tensor, Tensor], ...],
    slot: Tensor | None,
    silent: tuple[int, ...],
    token_reward: Tensor | float | None,
    temperature: float,
    blank_penalty: float,
    prune: str,
    weigh_blank: bool,
    normalise: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None: ...
def block_sparse_linear(
    x: Tensor,
    values: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: str | None,
    /,
) -> Tensor | None: ...
def low_rank_linear(
    x: Tensor,
    down_values: Tensor | None,
    down_crow: Tensor | None,
    down_col: Tensor | None,
    down_shape: tuple[int, int],
    up_values: Tensor | None,
    up_crow: Tensor | None,
    up_col: Tensor | None,
    up_shape: tuple[int, int],
    bias: Tensor | None,
    activation: str | None,
    /,
) -> Tensor | None: ...

class PrefixTree:
    def __init__(
        self,
        utterances: int,
        beam: int,
        terms: int,
        vocabulary: int,
        silent: list[int],
        /,
        most: int = ...,
    ) -> None: ...
    def score(self) -> _Floats: ...
    def parts(self) -> _Floats: ...
    def node(self) -> _Ints: ...
    def row(self) -> _Ints: ...
    def node_capacity(self) -> int: ...
    def row_capacity(self) -> int: ...
    def live_nodes(self) -> int: ...
    def plan(
        self, parent: _Ints, token: _Ints, score: _Floats, /
    ) -> tuple[_Rows, _Ints] | None: ...
    def plan_live(self, begin: int, end: int, /) -> _Rows: ...
    def advance(
        self,
        time: int,
        parent: _Ints,
        token: _Ints,
        score: _Floats,
        parts: _Floats,
        values: _Floats | None,
        /,
    ) -> int: ...
    def take_new(self, context: int, /) -> _Rows: ...
    def emissions(
        self, utterance: int, slot: int, /
    ) -> tuple[list[int], list[int], list[float]]: ...
    def release(self, utterance: int, /) -> None: ...
