"""Which rows of which layer an engine's layer holds: packed (q, k and v in one), and shared out among processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Neighbouring outputs of a packed layer: the whole has so many, this process those of piece `place` of `held`."""

    whole: int
    held: int
    place: int = 0


class Rows(NamedTuple):
    """The outputs that one layer of an adapter's model has in an engine's layer.

    whole: outputs of that layer. rows: which of them are here. start and stop: where, among those of the engine's.
    """

    whole: int
    rows: slice | Tensor
    start: int
    stop: int


def rows_of(pieces: Sequence[Piece], layers: int) -> list[Rows]:
    """The rows of each of so many layers of the adapter's model: one a piece, or one for all pieces.

    Empty where neither is so: then nobody can tell which pieces are whose.
    """
    starts = [0, *accumulate(piece.held for piece in pieces)]
    held = [slice(piece.held * piece.place, piece.held * (piece.place + 1)) for piece in pieces]
    if layers == len(pieces):
        places = zip(pieces, held, starts, starts[1:], strict=False)
        return [Rows(piece.whole, rows, start, stop) for piece, rows, start, stop in places]
    if layers != 1:
        return []
    firsts = [0, *accumulate(piece.whole for piece in pieces)]
    if all(piece.held == piece.whole for piece in pieces):
        return [Rows(firsts[-1], slice(None), 0, starts[-1])]
    index = [torch.arange(rows.start, rows.stop) + first for rows, first in zip(held, firsts, strict=False)]
    return [Rows(firsts[-1], torch.cat(index), 0, starts[-1])]
