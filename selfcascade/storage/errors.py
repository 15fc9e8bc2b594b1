"""What can go wrong with a store, each in one line that names the object or the setting and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from selfcascade.settings import SettingsError

DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "Forbidden"}
MISSING = {"NoSuchKey", "NotFound", "404"}
FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLarge", "507"}
UNMET = {"PreconditionFailed", "412"}
PASSING = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "429"}
DAMAGED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
"""What arrived is not what was sent: nothing was written."""
ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}
BUSY = {"ConditionalRequestConflict", "OperationAborted", "409"}


class StoreError(SettingsError):
    """The store cannot do what was asked. ``transient`` says whether the same call may succeed later."""

    transient = False


class NotFound(StoreError):
    """No object or artifact of this name."""


class Conflict(StoreError):
    """Somebody else wrote first: the condition of a conditional write does not hold."""


class IntegrityError(StoreError):
    """Stored bytes are not the bytes that were committed."""


class StoreUnreachable(StoreError):
    """Nothing answers at the endpoint, or what answers cannot work now: the same call may succeed later."""

    transient = True


class StoreDenied(StoreError):
    """The store refuses the credentials."""


class BucketMissing(StoreError):
    """The bucket does not exist."""


class StoreFull(StoreError):
    """No room is left where the store keeps its data."""


class ConditionalWritesUnsupported(StoreError):
    """The bucket ignores ``If-None-Match`` or ``If-Match``: two runs could overwrite each other."""


def code_of(error: ClientError) -> str:
    """Error code of a reply; the HTTP status where the reply has no body (HEAD)."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code or str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def status_of(error: ClientError) -> int:
    """HTTP status of a reply, 0 when there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def one_line(what: str, *, endpoint: str, bucket: str, embedded: bool) -> Iterator[None]:
    """Turn what boto3 raises inside the block into a :class:`StoreError`; ``what`` names the object or the action."""
    where = "the embedded store" if embedded else f"the store at {endpoint}"
    keys = "store.access_key and store.secret_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    try:
        yield
    except ClientError as error:
        code, status = code_of(error), status_of(error)
        if code == "NoSuchBucket":
            raise BucketMissing(
                f"bucket {bucket!r} does not exist at {endpoint}; create it (aws s3api create-bucket --bucket {bucket}) or set store.bucket"
            ) from None
        if code in UNMET or status == 412:
            raise Conflict(f"{what}: another writer was first") from None
        if code in BUSY:
            raise Conflict(f"{what}: another writer is at it at this moment; run again") from None
        if code == "InvalidRange" or status == 416:
            raise IntegrityError(f"{what} is shorter than what was committed; restore it from a copy, or delete it and run its stage again") from None
        if code in MISSING or status == 404:
            raise NotFound(f"{what} does not exist in {where}") from None
        if code in DENIED or status == 403:
            raise StoreDenied(f"{where} refuses the credentials for {what} ({code}); check {keys}") from None
        if code in ELSEWHERE or status == 301:
            raise StoreError(f"{where} keeps bucket {bucket!r} in another region than the one set; set store.region ({code})") from None
        if code in FULL or status == 507:
            raise StoreFull(f"{where} has no room left for {what}; free space, run `selfcascade store gc`, or choose another store") from None
        message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
        failure = StoreUnreachable if status >= 500 or status == 429 or code in PASSING | DAMAGED else StoreError
        raise failure(f"{where} failed on {what}: {code} {message}".rstrip()) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreDenied(f"no credentials for {where}; set {keys}") from None
    except (EndpointConnectionError, ConnectionError, HTTPClientError, IncompleteReadError) as error:
        reason = type(error).__name__
        raise StoreUnreachable(f"{where} does not answer ({reason}, {what}); check store.endpoint and that the server runs") from None
    except FlexibleChecksumError as error:
        raise IntegrityError(f"{what} did not arrive as it was sent: {' '.join(str(error).split())[:200]}; look after the network, and run again") from None
    except BotoCoreError as error:
        raise StoreError(f"{where}: {' '.join(str(error).split())[:300]}") from None
