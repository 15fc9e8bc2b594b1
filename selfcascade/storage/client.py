"""A boto3 client for the store: where it is, who we are, how patient we are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from selfcascade.config import StoreSettings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

READ_TIMEOUT = 60
"""Seconds; a server may hold the losers of a contended conditional write for more than ten."""
CONNECT_TIMEOUT = 5
ATTEMPTS = 8


@dataclass(frozen=True)
class Target:
    """Where requests go: ``url`` None is AWS itself. Keys None: boto3 looks in the usual variables and files."""

    url: str | None
    access_key: str | None
    secret_key: str | None
    embedded: bool


def remote_target(settings: StoreSettings) -> Target | None:
    """The remote store that settings or variables name; None: the embedded one."""
    url = settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return None
    access, secret = settings.access_key, settings.secret_key
    return Target(
        None if url == "aws" else url,
        access.get_secret_value() if access else None,
        secret.get_secret_value() if secret else None,
        embedded=False,
    )


def make_client(settings: StoreSettings, target: Target, *, attempts: int = ATTEMPTS) -> S3Client:
    """A client of its own session, so that threads may make clients at the same time."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=target.url,
        region_name=settings.region,
        aws_access_key_id=target.access_key,
        aws_secret_access_key=target.secret_key,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "adaptive", "total_max_attempts": attempts},
            max_pool_connections=settings.connections,
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
        ),
    )
