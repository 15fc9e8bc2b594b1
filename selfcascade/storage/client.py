"""A boto3 client for the store: where it is, who we are, how patient we are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config

from selfcascade import traffic
from selfcascade.config import StoreSettings
from selfcascade.storage.errors import StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

READ_TIMEOUT = 60
"""Seconds; a server may hold the losers of a contended conditional write for more than ten."""
CONNECT_TIMEOUT = 5
ATTEMPTS = 8
ATTEMPTS_EMBEDDED = 5
"""Fewer: a server of our own that does not answer is better brought back than waited for."""

LOADER = botocore.loaders.create_loader()
"""Shared: it remembers the description of S3, whose parsing is most of what a client costs."""


@dataclass(frozen=True)
class Target:
    """Where requests go: ``url`` None or ``aws`` is AWS itself. Keys None: boto3 looks in the usual variables and files."""

    url: str | None
    access_key: str | None
    secret_key: str | None
    embedded: bool


def endpoint_of(settings: StoreSettings) -> str | None:
    """The remote store that settings or variables name (``aws``: AWS itself); None: the embedded one."""
    return settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def keys_of(settings: StoreSettings) -> tuple[str | None, str | None]:
    """The pair of keys in the settings; two None when boto3 shall look for them.

    Raises:
        StoreError: only one of the two is set.
    """
    access, secret = settings.access_key, settings.secret_key
    if (access is None) != (secret is None):
        raise StoreError("store.access_key and store.secret_key go together: set both, or neither to use the AWS variables and files")
    return (None, None) if access is None or secret is None else (access.get_secret_value(), secret.get_secret_value())


def make_client(settings: StoreSettings, target: Target, *, attempts: int | None = None) -> S3Client:
    """A client of its own session, so that threads may make clients at the same time."""
    patience = attempts or (ATTEMPTS_EMBEDDED if target.embedded else ATTEMPTS)
    try:
        session = botocore.session.Session()
        session.register_component("data_loader", LOADER)
        client: S3Client = boto3.session.Session(botocore_session=session).client(
            "s3",
            endpoint_url=None if target.url == "aws" else target.url,
            region_name=settings.region,
            aws_access_key_id=target.access_key,
            aws_secret_access_key=target.secret_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"mode": "adaptive", "total_max_attempts": patience},
                max_pool_connections=settings.connections,
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
            ),
        )
    except ValueError as error:
        raise StoreError(f"store.endpoint {target.url!r} is not a URL such as https://s3.example.com ({error})") from None
    traffic.watch(client)
    return client
