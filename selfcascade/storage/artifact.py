"""An artifact: written object by object, committed by its manifest, read against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from selfcascade.settings import Settings
from selfcascade.storage import pointer
from selfcascade.storage.entry import ObjectEntry
from selfcascade.storage.errors import IntegrityError, NotFound, StoreError
from selfcascade.storage.leases import lease
from selfcascade.storage.manifest import KINDS, MANIFEST, ArtifactRef, Kind, Manifest, plain_settings, version_of
from selfcascade.storage.store import Store
from selfcascade.storage.tombstone import tombstone

T = TypeVar("T")


class Artifact:
    """One version of one artifact in one store. Picklable; making one reads and writes nothing."""

    def __init__(self, store: Store, ref: ArtifactRef, settings: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None) -> None:
        """Use :meth:`plan` to write and :func:`resolve` to read."""
        self.store = store
        self.ref = ref
        self.settings = None if settings is None else dict(settings)
        self.inputs = None if inputs is None else dict(inputs)
        self._manifest: Manifest | None = None

    @classmethod
    def plan(cls, store: Store, kind: Kind, name: str, settings: Settings, inputs: dict[str, str]) -> Artifact:
        """The artifact that ``settings`` make of ``inputs`` (versions by role). Equal work gets an equal address."""
        what = plain_settings(settings)
        return cls(store, reference(store, kind, name, version_of(what, inputs)), what, inputs)

    @property
    def prefix(self) -> str:
        """Key prefix in the store, without a trailing slash."""
        return self.ref.prefix

    @property
    def base(self) -> str:
        """``kind/name``: where the pointer is."""
        return f"{self.ref.kind}/{self.ref.name}"

    def __str__(self) -> str:
        return str(self.ref)

    # Writing

    @contextmanager
    def writing(self) -> Iterator[Artifact]:
        """Hold a lease on the artifact, and take a sequence for it, for as long as units are made. A published one needs neither."""
        if self.published():
            yield self
            return
        with lease(self.store, self.prefix):
            pointer.take(self.store, self.base, self.ref.version)
            yield self

    def published(self) -> bool:
        """Whether the manifest is there and the pointer has had its move: nothing is left to do."""
        return self.has(MANIFEST) and self.ref.version not in pointer.sequences(self.store, self.base).pending

    def has(self, key: str) -> bool:
        """Whether the object is there."""
        return self.store.head(self._key(key)) is not None

    def existing(self) -> set[str]:
        """Relative keys of all objects that are there, the manifest among them."""
        return {info.key.removeprefix(self.prefix + "/") for info in self.store.list(self.prefix + "/")}

    def put(self, key: str, data: bytes | Path) -> ObjectEntry:
        """Write an object, or adopt the one that is there; the entry says what the store holds."""
        if key == MANIFEST:
            raise ValueError("the manifest is written by publish()")
        return self.store.put_new(self._key(key), data).renamed(key)

    def publish(self, *, counts: Mapping[str, int | float | str], objects: Iterable[str] | None = None, shared: Iterable[ObjectEntry] = ()) -> ArtifactRef:
        """Commit: check that every object is there, write the manifest, move the pointer.

        Args:
            counts: what a reader wants to know at a glance; equal runs must give equal counts.
            objects: relative keys that belong to the artifact; by default all that are there.
            shared: entries out of other artifacts (:meth:`share`), which are listed and not copied.

        Raises:
            NotFound: an object is missing; names it.
        """
        if self.settings is None or self.inputs is None:
            raise ValueError("an artifact that was resolved is published already")
        if self.published():
            return self.ref
        with lease(self.store, self.prefix):
            sequence = pointer.sequences(self.store, self.base).pending.get(self.ref.version)
            if sequence is None:
                sequence = pointer.take(self.store, self.base, self.ref.version)
            if not self.has(MANIFEST):
                manifest = self._compose(sorted(self.existing() - {MANIFEST} if objects is None else set(objects)), list(shared), counts)
                self.store.put_new(self._key(MANIFEST), manifest.to_bytes())
            self.manifest()
            pointer.move(self.store, self.base, self.ref.version, sequence)
        return self.ref

    def _compose(self, keys: list[str], shared: list[ObjectEntry], counts: Mapping[str, int | float | str]) -> Manifest:
        for entry in shared:
            if entry.source is None:
                raise ValueError(f"shared entry {entry.key} names no source; take it from Artifact.share()")
            if self.store.head(f"{entry.source}/{entry.key}") is None:
                raise NotFound(f"{self.ref} cannot be published: it shares {entry.source}/{entry.key}, which does not exist; run that stage again")
        with ThreadPoolExecutor(min(self.store.settings.connections, 8)) as pool:
            own = list(pool.map(self._present, keys))
        assert self.settings is not None
        assert self.inputs is not None
        return Manifest(
            kind=self.ref.kind,
            name=self.ref.name,
            version=self.ref.version,
            settings=self.settings,
            inputs=self.inputs,
            objects=tuple(sorted([*own, *shared], key=lambda entry: entry.key)),
            counts=dict(counts),
        )

    def _present(self, key: str) -> ObjectEntry:
        try:
            return self.store.entry(self._key(key)).renamed(key)
        except NotFound:
            raise NotFound(f"{self.ref} cannot be published: its object {key} is missing; run the stage again") from None

    # Reading

    def manifest(self) -> Manifest:
        """The committed manifest; never changes, so it is read once.

        Raises:
            NotFound: the artifact is not published.
            IntegrityError: it is not a manifest, or not this artifact's.
        """
        if self._manifest is None:
            where = f"object {self.store.uri(self._key(MANIFEST))}"
            try:
                data = self.store.read(self._key(MANIFEST))
            except NotFound:
                raise NotFound(f"artifact {self.ref} is not published: {where} does not exist; run its stage first") from None
            found = Manifest.from_bytes(data, where=where)
            if (found.kind, found.name, found.version) != (self.ref.kind, self.ref.name, self.ref.version):
                raise IntegrityError(f"{where} belongs to {found.kind}/{found.name}@{found.version[:12]}, not to {self.ref}")
            self._manifest = found
        return self._manifest

    def entry(self, key: str) -> ObjectEntry:
        """The committed entry of an object, with its key relative to the store.

        Raises:
            NotFound: the artifact has no such object.
        """
        found = self.manifest().entry(key)
        if found is None:
            raise NotFound(f"artifact {self.ref} has no object {key}")
        return found.renamed(f"{found.source or self.prefix}/{key}")

    def read(self, key: str) -> bytes:
        """All bytes of an object: checked against the manifest once the artifact is published, as they are before.

        Raises:
            NotFound: there is no such object.
            IntegrityError: the stored bytes are not the committed ones.
        """
        if not self._committed():
            return self.store.read(self._key(key))
        return self._checked(key, lambda entry: self.store.read(entry.key, sha256=entry.sha256))

    def download(self, key: str, path: Path) -> None:
        """Stream an object to a file, checked as in :meth:`read`."""
        if not self._committed():
            self.store.download(self._key(key), path)
            return
        self._checked(key, lambda entry: self.store.download(entry.key, path, sha256=entry.sha256))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of an object of a published artifact, checked block by block."""
        return self._checked(key, lambda entry: bytes(self.store.read_range(entry, start, end)))

    def _checked(self, key: str, read: Callable[[ObjectEntry], T]) -> T:
        """Read against the committed entry; an object that a purge rewrote is read against its tombstone."""
        entry = self.entry(key)
        try:
            return read(entry)
        except StoreError as error:
            replaced = None if error.transient else tombstone(self.store, entry.key)
            if replaced is None:
                raise
            return read(replaced.entry)

    def share(self, key: str) -> ObjectEntry:
        """The entry with which another artifact lists this one's object instead of copying it."""
        found = self.manifest().entry(key)
        if found is None:
            raise NotFound(f"artifact {self.ref} has no object {key}")
        return found.renamed(key, source=found.source or self.prefix)

    def _committed(self) -> bool:
        if self._manifest is None and self.has(MANIFEST):
            self.manifest()
        return self._manifest is not None

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}"


def reference(store: Store, kind: Kind, name: str, version: str) -> ArtifactRef:
    """The reference of a version, published or not."""
    return ArtifactRef(kind=kind, name=name, version=version, uri=store.uri(f"{kind}/{name}/{version}"))


def resolve(store: Store, reference_text: str, kind: str | None = None) -> Artifact:
    """A published artifact by ``kind/name``, ``kind/name@version`` (or the first digits of it), or its ``s3://`` URI.

    ``kind`` may be left out of the text when it is given here.

    Raises:
        NotFound: nothing is published under that name, or several versions begin so; says what there is.
    """
    base, version = _parse(store, reference_text, kind)
    found_kind, name = base.split("/")
    if version is None:
        pointed = pointer.latest(store, base)
        if pointed is None:
            raise NotFound(f"nothing is published as {base} in {store.uri('')}; run its stage first, or see `selfcascade ls`")
        version = pointed.version
    elif len(version) < 64:
        found = [candidate for candidate in versions(store, base) if candidate.startswith(version)]
        if len(found) != 1:
            state = "no published version" if not found else f"{len(found)} published versions"
            raise NotFound(f"{state} of {base} begins with {version}; `selfcascade ls {base}` shows them")
        version = found[0]
    artifact = Artifact(store, reference(store, found_kind, name, version))  # type: ignore[arg-type]
    artifact.manifest()
    return artifact


def rollback(store: Store, ref: ArtifactRef) -> int:
    """Point consumers at an older (or any) published version, with a sequence of its own. Returns the sequence."""
    artifact = Artifact(store, ref)
    artifact.manifest()
    sequence = pointer.take(store, artifact.base, ref.version)
    if not pointer.move(store, artifact.base, ref.version, sequence):
        raise StoreError(f"{artifact.base}: a newer run moved the pointer meanwhile; look with `selfcascade ls` and try again")
    return sequence


def versions(store: Store, base: str) -> list[str]:
    """Published versions of ``kind/name``, sorted by digest."""
    pattern = re.compile(re.escape(base) + r"/([0-9a-f]{64})/" + re.escape(MANIFEST))
    return sorted(found[1] for info in store.list(base + "/") if (found := pattern.fullmatch(info.key)))


def _parse(store: Store, text: str, kind: str | None) -> tuple[str, str | None]:
    body = text
    if text.startswith("s3://"):
        root = store.uri("").rstrip("/") + "/"
        if not text.startswith(root):
            raise NotFound(f"{text} is not in this store ({root}); set store.bucket and store.prefix to where it is")
        body = text.removeprefix(root).strip("/")
        parts = body.split("/")
        body = "/".join(parts[:2]) + (f"@{parts[2]}" if len(parts) > 2 else "")
    base, _, version = body.partition("@")
    if kind is not None and "/" not in base:
        base = f"{kind}/{base}"
    if base.count("/") != 1 or base.split("/")[0] not in KINDS or (kind is not None and not base.startswith(kind + "/")):
        wanted = kind or "|".join(KINDS)
        raise NotFound(f"{text!r} is not an artifact; write {wanted}/NAME, {wanted}/NAME@VERSION or its s3:// URI")
    if "@" in body and not re.fullmatch(r"[0-9a-f]{4,64}", version):
        raise NotFound(f"{text!r}: a version is 4 to 64 hexadecimal digits")
    return base, version or None
