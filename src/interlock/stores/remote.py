"""Artifacts in an S3 bucket, brought to this machine: fetched piece by piece, proven, kept in a bounded cache under their digest.

    s3://bucket/models/policy/3        a version folder, found by its manifest.json
    s3://bucket/policy.onnx            one ONNX file

    <cache>/<digest>/                  whole and proven; the name is the manifest's digest
    <cache>/.part-<digest>/            being fetched; a later fetch of the same artifact goes on where this one stopped

Rules of this file
- Nothing under a digest's name was not held to that digest, size and blake3 of each file, after it lay on this disk.
- A folder appears by one rename. Whatever stops a fetch, there is never half of an artifact where a whole one is looked for.
- Two processes that want the same artifact take turns; the second finds it there.
- The newest stay: when the cache is above its limit, what was used longest ago goes, but nothing that somebody says is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from interlock.errors import (
    FailedPrecondition,
    InterlockError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from interlock.stores import artifacts
from interlock.stores.artifacts import MANIFEST_BYTES_MAX, MANIFEST_FILE, FileEntry, Manifest

SCHEME = "s3://"
CHUNK_BYTES = 1 << 20
TRIES = 4  # of one file, each going on where the last one stopped
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})
_DENIED = frozenset({"403", "401", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
Between = Callable[[], None]
"""Called between two pieces, in the fetching thread: may wait, or raise to end the fetch."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How artifacts are fetched. Credentials come from where AWS's own tools take them.

    Attributes:
        endpoint: of another store that speaks S3; empty is AWS. `region` empty is what the environment says.
        cache_bytes: what the cache may hold.
        bytes_per_second: of one fetch; 0 is no limit.
        timeout_seconds: to connect, and between two pieces.
    """

    endpoint: str = ""
    region: str = ""
    cache_bytes: int = 20 << 30
    bytes_per_second: int = 0
    timeout_seconds: float = 20.0


def is_remote(uri: str) -> bool:
    """True for what has to be fetched."""
    return uri.startswith(SCHEME)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key. Raises InvalidArgument `INVALID_ARTIFACT_URI`."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    key = key.strip("/")
    if not is_remote(uri) or not bucket or not key or len(uri) > 1500 or any(ord(c) < 32 for c in uri):
        raise InvalidArgument(
            f"artifact_uri: {uri[:200]!r} is not s3://bucket/key",
            reason="INVALID_ARTIFACT_URI",
            field="artifact_uri",
            metadata={"artifact_uri": uri[:200]},
        )
    return bucket, key


class RemoteArtifacts:
    """The cache of one machine. Everything here blocks.

    Args:
        in_use: folders that must not go, e.g. of versions that are loaded.
        client: an S3 client for tests; made from the options at the first fetch otherwise.
    """

    def __init__(
        self,
        cache: Path,
        options: RemoteOptions,
        in_use: Callable[[], set[Path]] = set,
        client: Any = None,
    ) -> None:
        self._cache = cache
        self._options = options
        self._in_use = in_use
        self._client = client

    def fetch(self, uri: str, digest: str = "", between: Between = lambda: None) -> Path:
        """The folder of a remote artifact on this disk, fetched if it is not there yet.

        Raises:
            NotFound: `ARTIFACT_MISSING`, naming the object.
            FailedPrecondition: `ARTIFACT_DENIED`, `DIGEST_MISMATCH`, `INVALID_ARTIFACT`, `COMPONENT_MISSING`.
            Unavailable: `ARTIFACT_UNREACHABLE`: no answer in time, or cut off again and again; worth another try.
            ResourceExhausted: `REPOSITORY_UNWRITABLE`.
            InvalidArgument: `INVALID_ARTIFACT_URI`.
        """
        bucket, key = split(uri)
        found = self._found(digest) if digest else None
        if found is not None:
            return found
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            manifest, keys = self._listing(bucket, key, between)
            if digest and manifest.digest != digest:
                raise _mismatch(f"{uri}: digest is {manifest.digest}, expected {digest}", uri)
            with self._turn(manifest.digest):
                place = self._found(manifest.digest) or self._complete(bucket, manifest, keys, between)
            self._make_room(place)
            return place
        except OSError as error:
            raise _unwritable(self._cache, error) from error

    def _place(self, digest: str) -> Path:
        return self._cache / digest.removeprefix("blake3:")

    def _found(self, digest: str) -> Path | None:
        """The whole artifact, if it is there; used now."""
        place = self._place(digest)
        if not (place / MANIFEST_FILE).is_file():
            return None
        os.utime(place)
        return place

    @contextlib.contextmanager
    def _turn(self, digest: str) -> Iterator[None]:
        with (self._cache / f".lock-{digest.removeprefix('blake3:')}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # --- what there is to fetch ---

    def _listing(self, bucket: str, key: str, between: Between) -> tuple[Manifest, dict[str, str]]:
        """The artifact's manifest, and the key of each file."""
        if key.endswith(".onnx"):
            return self._bare(bucket, key, between)
        name = f"{key}/{MANIFEST_FILE}"
        body = self._small(bucket, name)
        try:
            with tempfile.TemporaryDirectory(prefix=".manifest-", dir=self._cache) as scratch:
                (Path(scratch) / MANIFEST_FILE).write_bytes(body)
                manifest = artifacts.read_manifest(Path(scratch))
        except InterlockError as error:
            raise FailedPrecondition(
                f"{SCHEME}{bucket}/{name}: {error.message}", reason="INVALID_ARTIFACT", field="artifact_uri"
            ) from None
        return manifest, {entry.path: f"{key}/{entry.path}" for entry in manifest.files}

    def _bare(self, bucket: str, key: str, between: Between) -> tuple[Manifest, dict[str, str]]:
        """A single file says nothing of itself: it is fetched first, and its digest is what came."""
        with self._errors(bucket, key):
            head = self._s3().head_object(Bucket=bucket, Key=key)
        known = blake3(f"{bucket}/{key}/{head['ETag']}".encode()).hexdigest()
        part = self._cache / f".bare-{known}"
        with self._turn(known):
            self._download(bucket, key, part, int(head["ContentLength"]), between)
            size_bytes, digest = artifacts.hash_file(part)
            manifest = Manifest((FileEntry("model.onnx", size_bytes, digest),))
            folder = self._part(manifest.digest)
            folder.mkdir(exist_ok=True)
            part.replace(folder / "model.onnx")
        return manifest, {"model.onnx": key}

    def _small(self, bucket: str, key: str) -> bytes:
        with self._errors(bucket, key):
            answer = self._s3().get_object(Bucket=bucket, Key=key)
            if answer["ContentLength"] > MANIFEST_BYTES_MAX:
                raise FailedPrecondition(
                    f"{SCHEME}{bucket}/{key}: {answer['ContentLength']} bytes, at most {MANIFEST_BYTES_MAX}",
                    reason="INVALID_ARTIFACT",
                    field="artifact_uri",
                )
            return bytes(answer["Body"].read())

    # --- fetching it ---

    def _part(self, digest: str) -> Path:
        return self._cache / f".part-{digest.removeprefix('blake3:')}"

    def _complete(self, bucket: str, manifest: Manifest, keys: dict[str, str], between: Between) -> Path:
        part = self._part(manifest.digest)
        part.mkdir(exist_ok=True)
        for entry in manifest.files:
            target = part / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file(bucket, keys[entry.path], target, entry, between)
        artifacts.write_manifest(part, manifest.metadata, files=manifest.files)
        place = self._place(manifest.digest)
        part.rename(place)
        return place

    def _file(self, bucket: str, key: str, target: Path, entry: FileEntry, between: Between) -> None:
        """One file, whole and right. What lies there from before may be of another fetch, so that it gets a second chance from the start."""
        resumed = target.exists()
        self._download(bucket, key, target, entry.size_bytes, between)
        found = artifacts.hash_file(target)
        if found == (entry.size_bytes, entry.blake3):
            return
        target.unlink()
        if resumed:
            self._file(bucket, key, target, entry, between)
            return
        raise _mismatch(
            f"{SCHEME}{bucket}/{key}: {found[0]} bytes with blake3 {found[1]}, the manifest says {entry.size_bytes} bytes with {entry.blake3}",
            f"{SCHEME}{bucket}/{key}",
        )

    def _download(self, bucket: str, key: str, target: Path, size_bytes: int, between: Between) -> None:
        """Until the file has its size; each try goes on where the last one was cut off."""
        if target.exists() and target.stat().st_size > size_bytes:
            target.unlink()
        for tried in range(1, TRIES + 1):
            have = target.stat().st_size if target.exists() else 0
            if have == size_bytes and target.exists():
                return
            try:
                with self._errors(bucket, key):
                    self._stream(bucket, key, target, have, size_bytes, between)
            except Unavailable as error:
                if tried == TRIES or error.reason != "ARTIFACT_UNREACHABLE":
                    raise
        have = target.stat().st_size
        if have != size_bytes:
            raise _unreachable(bucket, key, f"{have} of {size_bytes} bytes came, {TRIES} times")

    def _stream(self, bucket: str, key: str, target: Path, have: int, size_bytes: int, between: Between) -> None:
        wanted = {"Range": f"bytes={have}-"} if have else {}
        body = self._s3().get_object(Bucket=bucket, Key=key, **wanted)["Body"]
        with contextlib.closing(body), target.open("ab" if have else "wb") as file:
            began, came = time.monotonic(), 0
            while piece := body.read(CHUNK_BYTES):
                came += len(piece)
                if have + came > size_bytes:
                    raise _mismatch(
                        f"{SCHEME}{bucket}/{key}: has more than the {size_bytes} bytes that the manifest says", key
                    )
                file.write(piece)
                between()
                self._pace(came, time.monotonic() - began)
            file.flush()
            os.fsync(file.fileno())

    def _pace(self, num_bytes: int, seconds: float) -> None:
        if self._options.bytes_per_second:
            time.sleep(max(0.0, num_bytes / self._options.bytes_per_second - seconds))

    def _make_room(self, keep: Path) -> None:
        """Lets what was used longest ago go, until the cache is within its limit."""
        kept = {path.resolve() for path in self._in_use()} | {keep.resolve()}
        there = []
        for folder in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # of another fetch, and gone meanwhile
                size_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                there.append((folder.stat().st_mtime, folder, size_bytes))
        total = sum(size_bytes for _, _, size_bytes in there)
        for _, folder, size_bytes in sorted(there):
            if total <= self._options.cache_bytes:
                return
            if folder.resolve() not in kept and not folder.name.startswith("."):  # those may be being fetched
                shutil.rmtree(folder, ignore_errors=True)
                total -= size_bytes

    # --- the store and its errors ---

    def _s3(self) -> Any:
        """The client; its library is imported with the first fetch."""
        if self._client is None:
            try:
                import boto3
                from botocore.config import Config
            except ImportError as error:
                raise FailedPrecondition(
                    f"{SCHEME} artifacts need boto3, which is not installed here: {error}; pip install 'interlock[s3]'",
                    reason="COMPONENT_MISSING",
                    field="artifact_uri",
                    metadata={"component": "boto3"},
                ) from None
            seconds = self._options.timeout_seconds
            config = Config(
                connect_timeout=seconds, read_timeout=seconds, retries={"mode": "standard", "total_max_attempts": 3}
            )
            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=self._options.endpoint or None,
                region_name=self._options.region or None,
                config=config,
            )
        return self._client

    @contextlib.contextmanager
    def _errors(self, bucket: str, key: str) -> Iterator[None]:
        """The store's errors in our words."""
        try:
            yield
        except InterlockError:
            raise
        except (ConnectionError, TimeoutError) as error:
            raise _unreachable(bucket, key, f"{type(error).__name__}: {error}") from error
        except OSError:  # of this disk
            raise
        except Exception as error:
            raise _in_our_words(bucket, key, error) from error


def _in_our_words(bucket: str, key: str, error: Exception) -> InterlockError:
    from botocore import exceptions

    place = f"{SCHEME}{bucket}/{key}"
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    if code in _MISSING:
        return NotFound(
            f"{place}: there is no such object",
            reason="ARTIFACT_MISSING",
            field="artifact_uri",
            metadata={"path": place},
        )
    if code == "InvalidRange":
        return _mismatch(f"{place}: it has fewer bytes than its manifest says", place)
    if code in _DENIED or isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return FailedPrecondition(
            f"{place}: the store refuses: {code or error}; see AWS's credential chain (AWS_ACCESS_KEY_ID, a profile, a role)",
            reason="ARTIFACT_DENIED",
            field="artifact_uri",
            metadata={"path": place, "code": code},
        )
    return _unreachable(bucket, key, f"{type(error).__name__}: {str(error)[:200]}")


def _unreachable(bucket: str, key: str, why: str) -> Unavailable:
    return Unavailable(
        f"{SCHEME}{bucket}/{key}: {why}",
        reason="ARTIFACT_UNREACHABLE",
        retry_after_seconds=5.0,
        metadata={"path": f"{SCHEME}{bucket}/{key}"},
    )


def _mismatch(message: str, place: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="DIGEST_MISMATCH", field="digest", metadata={"path": place})


def _unwritable(cache: Path, error: OSError) -> ResourceExhausted:
    return ResourceExhausted(
        f"the artifact cache {cache} cannot be written: {error.strerror or error}",
        reason="REPOSITORY_UNWRITABLE",
        metadata={"path": str(cache), "full": str(error.errno in _NO_ROOM)},
        retry_after_seconds=5.0,
    )
