"""Splits: which pictures train, which tune and which are only looked at in the end."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "tune", "test"]

_SALT = b"selfcascade split 1\n"


def split_of(key: str, tune: float, test: float) -> Split:
    """The split of ``key``: a uniform number from SHA-256 of a fixed salt and the key, cut at ``test`` and ``test + tune``.

    The same key falls on the same number in every dataset: what was held out once stays held out under equal shares, and a larger
    ``test`` keeps all that were in it.
    """
    draw = int.from_bytes(hashlib.sha256(_SALT + key.encode()).digest()[:6], "big") / 2**48
    if draw < test:
        return "test"
    return "tune" if draw < test + tune else "train"
