"""The whole pipeline before a store of which every tenth request goes wrong: it ends well, and with the bytes of an undisturbed run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import command, environment, small
from faulty_proxy import FAULTS, FaultyProxy
from publication import Published, published

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, embedded

pytestmark = pytest.mark.full


def run(folder: Path, variables: dict[str, str], *options: str) -> None:
    result = subprocess.run(
        command("run", *small(), *options), cwd=folder, env=environment() | variables, capture_output=True, text=True, timeout=1500, check=False
    )
    assert result.returncode == 0, result.stderr


def compare(weed: Path, folder: Path, *, share: float, seed: int) -> tuple[Published, Published, FaultyProxy]:
    """What the pipeline publishes in the server of data folder ``weed``: on its own, and behind a proxy that spoils a share of the requests."""
    endpoint = embedded.ensure(weed)
    keys = {"AWS_ACCESS_KEY_ID": endpoint.access_key, "AWS_SECRET_ACCESS_KEY": endpoint.secret_key}
    found = []
    with FaultyProxy(endpoint.url, share=share, seed=seed) as proxy:
        for prefix, url in (("whole", endpoint.url), ("spoilt", proxy.url)):
            with Store.open(StoreSettings(folder=weed, bucket="faults", prefix=prefix)) as store:
                run(folder, keys | {"AWS_ENDPOINT_URL_S3": url}, "--set", "store.bucket=faults", "--set", f"store.prefix={prefix}")
                found.append(published(store))
    return found[0], found[1], proxy


def test_a_pipeline_ends_well_when_every_tenth_request_goes_wrong(weed, tmp_path):
    """Delays, SlowDown, connections cut before and in the middle, bits turned on the way in and out: the same set of objects, byte for byte, as on a whole
    store."""
    whole, spoilt, proxy = compare(weed, tmp_path, share=0.1, seed=0)
    assert spoilt == whole
    assert set(proxy.spoilt) == set(FAULTS)
    assert sum(proxy.spoilt.values()) > 0.05 * proxy.requests
