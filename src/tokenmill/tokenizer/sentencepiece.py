"""The merge list of a SentencePiece BPE vocabulary.

SentencePiece's BPE (Kudo and Richardson, 2018) keeps no merge list: of all adjacent pairs of symbols whose joined text
is a piece, it joins the pair with the best-scored piece first, the leftmost of equals. A merge-list BPE does the same
when its list has every split of every piece into two pieces, ordered by the score of the piece. Pieces of one score
are ordered by the lengths of their parts, longest left part first, and then by id: the order in which the models' own
``tokenizer.json`` files have them.

Deriving the list takes a second for 262,144 pieces, so it can be kept in a cache folder, under the hash of the
vocabulary that it follows from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)

Merges = npt.NDArray[np.int32]
"""[merges, 2]: ids of the left and the right part, best merge first."""


def sentencepiece_merges(
    vocabulary: Mapping[str, int],
    scores: Sequence[float],
    never_merged: Collection[int],
    best: Collection[int],
    cache_dir: Path | None = None,
) -> Merges:
    """All merges of ``vocabulary`` (piece to id, ids below ``len(scores)``) in the order they apply.

    ``never_merged``: ids that text must not merge into (control and byte tokens: the text ``</s>`` is not the token).
    ``best``: ids that come before all scores (runs of spaces, which SentencePiece takes from the text first).
    """
    if cache_dir is None:
        return _derive(vocabulary, scores, never_merged, best)
    digest = hashlib.sha256()
    digest.update("\0".join(vocabulary).encode("utf-8", "replace"))
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    for numbers in (ids, np.asarray(scores, np.float32), _sorted_ids(never_merged), _sorted_ids(best)):
        digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    path = cache_dir / f"merges-{digest.hexdigest()[:32]}.npy"
    merges = _read(path, len(scores))
    if merges is None:
        merges = _derive(vocabulary, scores, never_merged, best)
        _write(path, merges)
    return merges


def _derive(
    vocabulary: Mapping[str, int], scores: Sequence[float], never_merged: Collection[int], best: Collection[int]
) -> Merges:
    never = frozenset(never_merged)
    find = vocabulary.get
    rows = [  # joined, left, right, and the lengths of left and right
        (joined, left, right, cut, len(piece) - cut)
        for piece, joined in vocabulary.items()
        if joined not in never
        for cut in range(1, len(piece))
        if (left := find(piece[:cut])) is not None and (right := find(piece[cut:])) is not None
    ]
    table = np.array(rows, np.int32).reshape(-1, 5)
    score = np.array(scores, np.float64)
    score[_sorted_ids(best)] = np.inf
    # lexsort's last key is the first to decide.
    order = np.lexsort((table[:, 0], -table[:, 4], -table[:, 3], -score[table[:, 0]]))
    return np.ascontiguousarray(table[order, 1:3])


def _sorted_ids(ids: Collection[int]) -> npt.NDArray[np.int64]:
    return np.array(sorted(ids), np.int64)


def _read(path: Path, vocab_size: int) -> Merges | None:
    try:
        merges: Merges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if merges.dtype != np.int32 or merges.ndim != 2 or merges.shape[1] != 2:
        return None
    if merges.size and (merges.min() < 0 or merges.max() >= vocab_size):
        return None
    return merges


def _write(path: Path, merges: Merges) -> None:
    """Whole or not at all: readers see the finished file under its name, or none."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.save(file, merges)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("tokenizer cache %s cannot be written (%s); going on without it", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
