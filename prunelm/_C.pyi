import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Rows = tuple[_Ints, _Ints, _Ints, _Ints]

def build_information() -> dict[str, object]: ...
def block_sparse_linear(
    x: int, x_number: int, rows: int, values: int, crow: int, col: int,
    number: int, nnz: int, N: int, K: int, bn: int, bk: int,
    bias: int, bias_number: int, activation: int, y: int, /,
) -> None: ...  # fmt: skip
def low_rank_linear(
    x: int, x_number: int, rows: int, down_values: int, down_crow: int, down_col: int,
    number: int, down_nnz: int, R: int, K: int, down_bn: int, down_bk: int,
    up_values: int, up_crow: int, up_col: int, up_nnz: int, N: int, up_bn: int, up_bk: int,
    bias: int, bias_number: int, activation: int, y: int, /,
) -> None: ...  # fmt: skip

class PrefixTree:
    def __init__(
        self, utterances: int, beam: int, terms: int, vocabulary: int, silent: list[int], /
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
