"""Fixtures that every test may use: a real S3 server for the session, a store of its own for each test."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, embedded

# Several processes of tests, each with as many threads as there are cores, wait for each other far longer than they compute; commands inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]  # the tests use the embedded store, whatever the user's shell points at


# How long an example takes tells what else the machine does: a limit of 200 ms, as is usual, fails on a loaded one.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data folder of an embedded server that runs for the whole session, and goes by itself when the session is killed."""
    folder = tmp_path_factory.mktemp("weed")
    embedded.attach(folder)
    yield folder
    embedded.release(folder)
    embedded.stop(folder, now=True)


@pytest.fixture
def store_settings(weed: Path) -> StoreSettings:
    """Settings of an empty store: one bucket, a fresh prefix."""
    return StoreSettings(folder=weed, bucket="tests", prefix=f"t-{secrets.token_hex(6)}")


@pytest.fixture
def store(store_settings: StoreSettings) -> Iterator[Store]:
    """An empty store on the session's server."""
    with Store.open(store_settings) as opened:
        yield opened
