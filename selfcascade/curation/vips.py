"""libvips as this software uses it: one thread, no cache of operations, no loader that was never hardened against hostile files."""

from __future__ import annotations

import os

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # the workers decode side by side; it is read when the library is loaded
import pyvips

__all__ = ["pyvips"]

pyvips.cache_set_max(0)
pyvips.block_untrusted_set(True)
