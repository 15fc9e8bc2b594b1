"""Pages with pictures of samples: each sample is one line of its own, so that a removal request takes it out of any page without knowing the page."""

from __future__ import annotations

from collections.abc import Iterator, Set
from html import escape

_OPENING = '<figure id="'


def figure(key: str, content: str) -> str:
    """The line of a sample: ``content`` is HTML, whose line breaks become spaces."""
    return f'{_OPENING}{escape(key)}">{" ".join(content.splitlines())}</figure>'


def figures(page: bytes) -> Iterator[str]:
    """The lines of samples of a page, in their order."""
    return (line for line in page.decode().split("\n") if line.startswith(_OPENING))


def holds(page: bytes, samples: Set[str]) -> bool:
    """Whether a page shows one of the samples (keys)."""
    openings = _openings(samples)
    return any(line.startswith(openings) for line in figures(page))


def without(page: bytes, samples: Set[str]) -> bytes:
    """The page without the lines of these samples."""
    openings = _openings(samples)
    return "\n".join(line for line in page.decode().split("\n") if not line.startswith(openings)).encode()


def _openings(samples: Set[str]) -> tuple[str, ...]:
    return tuple(f'{_OPENING}{escape(key)}">' for key in samples)
