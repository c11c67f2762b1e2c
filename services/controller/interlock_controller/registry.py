"""Versions: an artifact comes in as a verified copy, gets the model's next number, and is on record. Nothing here serves anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from interlock.core import names
from interlock.core.ports import Clock
from interlock.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from interlock.runtime.changed import Changed
from interlock.stores import remote
from interlock.stores.controller import ControllerStore, Origin, Request, VersionRow
from interlock.stores.files import Incoming, ModelRepository
from interlock.stores.modelspec import ModelSpec
from interlock.stores.remote import RemoteArtifacts


class Registry:
    """Registers versions, one at a time."""

    def __init__(
        self,
        store: ControllerStore,
        repository: ModelRepository,
        clock: Clock,
        changed: Changed,
        fetched: RemoteArtifacts,
    ) -> None:
        self._store = store
        self._fetched = fetched
        self._repository = repository
        self._clock = clock
        self._changed = changed
        self._lock = asyncio.Lock()

    async def register(
        self,
        model: str,
        artifact_uri: str,
        *,
        digest: str = "",
        origin: Origin | None = None,
        metrics: Mapping[str, float] | None = None,
        actor: str = "",
        request: Request | None = None,
    ) -> VersionRow:
        """The version that holds the artifact: a new one, or the one that has its bytes already.

        Raises:
            NotFound: `ARTIFACT_MISSING`.
            FailedPrecondition: `DIGEST_MISMATCH`, `INVALID_ARTIFACT`, `QUARANTINED`; for `s3://` also what `RemoteArtifacts.fetch` raises.
            AlreadyExists: `REQUEST_ID_REUSED`.
        """
        if remote.is_remote(artifact_uri):  # before the lock: other registrations need not wait for a store
            source = await asyncio.to_thread(self._fetched.fetch, artifact_uri, digest)
        else:
            source = parse_uri(artifact_uri)
        async with self._lock:
            if request is not None and (known := self._store.answered(request)) is not None:
                return self._known(model, known)
            incoming = await asyncio.to_thread(self._repository.take_in, source, digest)
            same = next((v for v in self._store.versions(model) if v.digest == incoming.digest), None)
            if same is not None or incoming.digest in self._store.quarantined_digests():
                await asyncio.to_thread(self._repository.drop, incoming)
                return self._existing(same, incoming, request)
            found = origin if origin and origin.checkpoint else _origin_of(incoming.spec)
            return await self._add(model, incoming, found, metrics or {}, actor, request)

    def _known(self, model: str, version: str) -> VersionRow:
        row = self._store.version(model, version)
        if row is None:
            raise AlreadyExists(
                "the request id was used for another model", reason="REQUEST_ID_REUSED", field="change.request_id"
            )
        return row

    def _existing(self, same: VersionRow | None, incoming: Incoming, request: Request | None) -> VersionRow:
        if same is None or same.quarantined:
            why = same.quarantined if same else "the same bytes were forbidden for another model"
            raise FailedPrecondition(
                f"{incoming.digest} is quarantined: {why}", reason="QUARANTINED", metadata={"digest": incoming.digest}
            )
        if request is not None:
            self._store.remember(request, same.version)
        return same

    async def _add(
        self,
        model: str,
        incoming: Incoming,
        origin: Origin,
        metrics: Mapping[str, float],
        actor: str,
        request: Request | None,
    ) -> VersionRow:
        newest = max((int(v.version) for v in self._store.versions(model)), default=0)
        number = str(1 + max(newest, await asyncio.to_thread(self._repository.highest, model)))
        place = await asyncio.to_thread(self._repository.keep, incoming, model, number)
        row = VersionRow(
            model,
            number,
            incoming.digest,
            str(place.absolute()),
            incoming.manifest.size_bytes,
            origin,
            dict(metrics),
            self._clock.now(),
            actor=actor,
            gate_failure=incoming.spec.gate_failure if incoming.spec else "",
        )
        added = self._store.add_version(row, request)
        self._changed.fire()
        return added


def parse_uri(uri: str) -> Path:
    """The local path in a path or a `file://` URI.

    Raises:
        InvalidArgument: `INVALID_ARTIFACT_URI`.
    """
    parts = urlsplit(uri)
    if not uri or "\0" in uri or (parts.scheme and (parts.scheme != "file" or parts.netloc not in ("", "localhost"))):
        raise InvalidArgument(
            f"artifact_uri: {uri[:200]!r} is not a local path, a file:// or an s3:// URI",
            reason="INVALID_ARTIFACT_URI",
            field="artifact_uri",
            metadata={"value": uri[:200]},
        )
    return Path(unquote(parts.path) if parts.scheme else uri)


def _origin_of(spec: ModelSpec | None) -> Origin:
    """What the artifact's own model.toml says about where it came from: ids or resource names."""
    source = spec.source if spec else {}
    run = str(source.get("run", "")).removeprefix("runs/")
    checkpoint = str(source.get("checkpoint", "")).rsplit("/", 1)[-1]
    return Origin(
        run=names.run_name(run) if run else "",
        checkpoint=names.checkpoint_name(run, checkpoint) if run and checkpoint else "",
        step=int(source.get("step", 0)),
        attempt=int(source.get("attempt", 0)),
        checkpoint_digest=str(source.get("digest", "")),
    )
