"""Who may call what: API keys with scopes, and the role of every RPC. A method without a role is refused, and a test fails for it.

Keys live in `<home>/keys.toml` as hashes; the file is read again when it changes, so rotation needs no restart. While it does not
exist every caller on loopback may do everything (a laptop); once it exists every verb but the public ones needs a key. Rooms call each
other with `<home>/internal.key`, made at the first start, readable by its owner only.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
import structlog

from interlock.errors import InterlockError, PermissionDenied, Unauthenticated
from interlock.runtime.status import wrap_handler

KEY_HEADER = "x-api-key"
ACTOR_HEADER = "x-interlock-actor"
INTERNAL = "internal"
ANONYMOUS = "anonymous"
KEY_BYTES = 32  # REQUIREMENTS X4
_log = structlog.get_logger(__name__)


class Scope(StrEnum):
    """What a key may do. `admin` includes the others; `public` needs no key."""

    PUBLIC = "public"
    INFER = "infer"
    TRAIN = "train"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a key's name and its scopes."""

    name: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """True when the principal holds `scope`."""
        return scope is Scope.PUBLIC or scope in self.scopes or Scope.ADMIN in self.scopes


EVERYBODY = Principal(ANONYMOUS, frozenset({Scope.ADMIN}))
ROOM = Principal(INTERNAL, frozenset({Scope.ADMIN}))
NOBODY = Principal(ANONYMOUS, frozenset())


def new_key() -> str:
    """A fresh key: 32 random bytes, urlsafe."""
    return "ilk_" + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """What is stored of a key. A plain hash is enough: the key itself has 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of one state folder, read again whenever the file changes."""

    def __init__(self, home: Path) -> None:
        self._path = home / "keys.toml"
        self._internal_path = home / "internal.key"
        self._internal_key = ""
        self._file = str(self._path)
        self._stamp: tuple[int, int] | None = None
        self._by_hash: dict[str, Principal] = {}

    @property
    def required(self) -> bool:
        """True when callers need a key."""
        return os.access(self._file, os.F_OK)  # asked by every request: a third of what Path.exists costs

    def _internal(self) -> str:
        """The rooms' own key, read once: it is made once per home and never changes while rooms run."""
        if not self._internal_key:
            self._internal_key = self.internal_key()
        return self._internal_key

    def internal_key(self) -> str:
        """The rooms' own key; made, mode 0600, when it is not there."""
        try:
            return self._internal_path.read_text().strip()
        except FileNotFoundError:
            self._internal_path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._internal_path.with_suffix(f".{os.getpid()}")
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(new_key())
        try:
            os.link(scratch, self._internal_path)  # the first of several rooms that start at once wins
        except FileExistsError:
            pass
        finally:
            scratch.unlink()
        return self._internal_path.read_text().strip()

    def principal(self, key: str | None) -> Principal:
        """Who holds `key`.

        Raises:
            Unauthenticated: `API_KEY_INVALID`, for a key that is not known; the key itself is never repeated.
        """
        if not key:
            return NOBODY if self.required else EVERYBODY
        if hmac.compare_digest(key.encode(), self._internal().encode()):
            return ROOM
        if not self.required:
            return EVERYBODY
        self._refresh()
        known = self._by_hash.get(hash_key(key))
        if known is None:
            raise Unauthenticated("the API key is not known; `interlock keys list` shows the names of those that are")
        return known

    def _refresh(self) -> None:
        stat = self._path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp == self._stamp:
            return
        try:
            self._by_hash = _read_keys(self._path)
            self._stamp = stamp
        except (ValueError, KeyError, TypeError) as error:
            # A half-written file must not lock everybody out: the keys read last stay valid until it can be read.
            _log.error("keys_unreadable", path=str(self._path), problem=str(error))


def _read_keys(path: Path) -> dict[str, Principal]:
    document = tomllib.loads(path.read_text())
    return {
        str(entry["hash"]): Principal(str(entry["name"]), frozenset(Scope(scope) for scope in entry["scopes"]))
        for entry in document.get("keys", [])
    }


def require(principal: Principal, scope: Scope, verb: str) -> None:
    """Lets a principal with `scope` pass.

    Raises:
        Unauthenticated: no key was sent.
        PermissionDenied: the key lacks the scope.
    """
    if principal.may(scope):
        return
    if principal.name == ANONYMOUS:
        raise Unauthenticated(
            f"{verb} needs an API key with the {scope} scope in {KEY_HEADER}", reason="API_KEY_MISSING"
        )
    raise PermissionDenied(
        f"key {principal.name!r} lacks the {scope} scope that {verb} needs",
        metadata={"scope": scope.value, "key": principal.name},
    )


RPC_SCOPES: Mapping[str, Scope] = {
    "/grpc.health.v1.Health/*": Scope.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/*": Scope.PUBLIC,
    "/grpc.reflection.v1.ServerReflection/*": Scope.PUBLIC,
    "/inference.GRPCInferenceService/ServerLive": Scope.PUBLIC,
    "/inference.GRPCInferenceService/ServerReady": Scope.PUBLIC,
    "/inference.GRPCInferenceService/ModelReady": Scope.PUBLIC,
    "/inference.GRPCInferenceService/ServerMetadata": Scope.PUBLIC,
    "/inference.GRPCInferenceService/ModelMetadata": Scope.INFER,
    "/inference.GRPCInferenceService/ModelConfig": Scope.INFER,
    "/inference.GRPCInferenceService/ModelStatistics": Scope.INFER,
    "/inference.GRPCInferenceService/ModelInfer": Scope.INFER,
    "/inference.GRPCInferenceService/ModelStreamInfer": Scope.INFER,
    "/inference.GRPCInferenceService/RepositoryIndex": Scope.INFER,
    "/inference.GRPCInferenceService/RepositoryModelLoad": Scope.ADMIN,
    "/inference.GRPCInferenceService/RepositoryModelUnload": Scope.ADMIN,
    "/inference.GRPCInferenceService/SystemSharedMemoryStatus": Scope.ADMIN,
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister": Scope.ADMIN,
    "/inference.GRPCInferenceService/SystemSharedMemoryUnregister": Scope.ADMIN,
    "/inference.GRPCInferenceService/CudaSharedMemoryStatus": Scope.ADMIN,
    "/inference.GRPCInferenceService/CudaSharedMemoryRegister": Scope.ADMIN,
    "/inference.GRPCInferenceService/CudaSharedMemoryUnregister": Scope.ADMIN,
    "/inference.GRPCInferenceService/TraceSetting": Scope.ADMIN,
    "/inference.GRPCInferenceService/LogSettings": Scope.ADMIN,
    "/interlock.api.inference.v1.RuntimeService/*": Scope.ADMIN,
    "/interlock.api.inference.v1.TextService/*": Scope.INFER,
    "/interlock.api.trainer.v1.RunService/CreateRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/GetRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/ListRuns": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/WatchRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/PauseRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/ResumeRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/StopRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/ForkRun": Scope.TRAIN,
    "/interlock.api.trainer.v1.RunService/RollbackRun": Scope.ADMIN,
    "/interlock.api.trainer.v1.RunService/InjectFault": Scope.ADMIN,
    "/interlock.api.trainer.v1.MetricsService/*": Scope.TRAIN,
    "/interlock.api.trainer.v1.LoopService/Attach": Scope.TRAIN,
    "/interlock.api.trainer.v1.CheckpointService/List": Scope.TRAIN,
    "/interlock.api.trainer.v1.CheckpointService/Save": Scope.TRAIN,
    "/interlock.api.trainer.v1.CheckpointService/Verify": Scope.TRAIN,
    "/interlock.api.trainer.v1.CheckpointService/Pin": Scope.TRAIN,
    "/interlock.api.trainer.v1.CheckpointService/Mark": Scope.ADMIN,
    "/interlock.api.trainer.v1.CheckpointService/Export": Scope.ADMIN,
    "/interlock.api.controller.v1.SwapService/*": Scope.ADMIN,
    "/interlock.api.controller.v1.ModelService/*": Scope.ADMIN,
    "/interlock.api.controller.v1.RouteService/*": Scope.ADMIN,
    "/interlock.api.controller.v1.PolicyService/*": Scope.ADMIN,
    "/interlock.api.controller.v1.RollbackService/*": Scope.ADMIN,
}
"""Full method name, or a service's `/*`, to the scope that it needs."""


def rpc_scope(method: str) -> Scope | None:
    """The scope of a full method name; None when nobody gave it one, which means refused."""
    return RPC_SCOPES.get(method) or RPC_SCOPES.get(method.rsplit("/", 1)[0] + "/*")


class Access:
    """Holds calls to their method's scope, before the request is read."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def refusal(self, details: grpc.HandlerCallDetails) -> InterlockError | None:
        """Why the caller may not call the method; None when it may."""
        scope = rpc_scope(details.method)
        if scope is None:
            return PermissionDenied(f"{details.method} has no role and is refused", reason="NO_ROLE")
        if scope is Scope.PUBLIC:
            return None
        try:
            key = next((str(value) for name, value in details.invocation_metadata or () if name == KEY_HEADER), None)
            require(self._keys.principal(key), scope, details.method)
        except InterlockError as error:
            return error
        return None


def refusing(handler: Any, refusal: InterlockError, method: str) -> Any:
    """A handler of the same arity that answers with the refusal."""
    return wrap_handler(handler, _refuse_unary(refusal), _refuse_stream(refusal), method)


def _refuse_unary(refusal: InterlockError) -> Callable[..., Any]:
    def wrap(_behaviour: Callable[..., Any], _method: str) -> Callable[..., Any]:
        async def refuse(_request: Any, _context: Any) -> Any:
            raise refusal

        return refuse

    return wrap


def _refuse_stream(refusal: InterlockError) -> Callable[..., Any]:
    def wrap(_behaviour: Callable[..., Any], _method: str) -> Callable[..., Any]:
        async def refuse(_request: Any, _context: Any) -> Any:
            raise refusal
            yield  # type: ignore[unreachable]  # makes it a stream

        return refuse

    return wrap


def actor_of(context: Any, keys: Keys) -> str:
    """The name to record for a call: the key's, or what an internal caller says on behalf of its own caller."""
    metadata = dict(context.invocation_metadata() or ())
    principal = keys.principal(metadata.get(KEY_HEADER))
    if principal.name in {INTERNAL, ANONYMOUS} and metadata.get(ACTOR_HEADER):
        return str(metadata[ACTOR_HEADER])[:128]
    return principal.name
