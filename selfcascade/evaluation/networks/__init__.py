"""Feature networks by name. Each module says where its weights lie (``locate``), what they are (``kind_of``), and loads them (``load``)."""

from __future__ import annotations
