"""The form of tables in the cache: digest, newline, safetensors; what is damaged is told from what is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, NDArray[Any]]


def sealed(arrays: Mapping[str, NDArray[Any]], names: object) -> bytes:
    """``arrays`` and the JSON value ``names`` as bytes; equal ones give equal bytes."""
    # safetensors writes the memory as it lies, whatever the strides say.
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One entry of metadata: safetensors writes several in an order of chance.
    body = save(packed, metadata={"names": json.dumps(names)})
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unsealed(data: bytes) -> tuple[Arrays, Any] | None:
    """What :func:`sealed` was given, tuples as lists, or None where the bytes are damaged or of another form."""
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        arrays = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        return arrays, json.loads(header["names"])
    except (SafetensorError, KeyError, ValueError):
        return None
