"""Every route and RPC has a role; one without would be refused, and fails here first (DESIGN 8)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from interlock.api.oip import rpc
from interlock.runtime import settings
from interlock.runtime.access import RPC_SCOPES, Keys, Scope, rpc_scope

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "src" / "interlock" / "api"
READ_ONLY_PUBLIC = {"GET"}


def methods() -> list[str]:
    """Full names of every RPC in the contracts, from the descriptors."""
    found = []
    for path in sorted(API.rglob("*_service_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
        for service in module.DESCRIPTOR.services_by_name.values():
            found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    found += [f"/{rpc.SERVICE_NAME}/{name}" for name in rpc.METHODS]
    return found


def test_there_is_an_inventory() -> None:
    assert len(methods()) > 60


@pytest.mark.parametrize("method", methods())
def test_every_rpc_has_a_role(method: str) -> None:
    assert rpc_scope(method) is not None, f"add {method} to RPC_SCOPES"


def test_every_role_is_of_an_rpc_that_exists() -> None:
    known = set(methods()) | {name.rsplit("/", 1)[0] + "/*" for name in methods()}
    foreign = {name for name in RPC_SCOPES if not name.startswith("/grpc.")} - known
    assert not foreign


def test_what_changes_serving_or_undoes_training_needs_admin() -> None:
    verbs = (
        "Swap",
        "Route",
        "Rollback",
        "Quarantine",
        "Register",
        "Prepare",
        "Release",
        "Drain",
        "Park",
        "InjectFault",
        "Mark",
        "Export",
        "Load",
        "Unload",
    )
    for method in methods():
        name = method.rsplit("/", 1)[-1]
        if name.startswith(("Get", "List", "Watch")) or not any(verb in name for verb in verbs):
            continue
        assert rpc_scope(method) is Scope.ADMIN, method


def app(tmp_path: Path) -> Any:
    from interlock_gateway import web

    return web, web.build(settings.Settings(home=tmp_path), None, None, Keys(tmp_path))  # type: ignore[arg-type]


def test_every_http_route_has_a_role(tmp_path: Path) -> None:
    web, application = app(tmp_path)
    rows = web.inventory(application)
    assert len(rows) > 40
    assert all(scope in Scope for _, _, scope in rows)
    public = {(method, path) for method, path, scope in rows if scope is Scope.PUBLIC}
    assert {method for method, _ in public} == READ_ONLY_PUBLIC


def test_a_route_without_a_role_stops_the_start(tmp_path: Path) -> None:
    web, application = app(tmp_path)

    @application.get("/forgotten")
    async def forgotten() -> None: ...

    with pytest.raises(ValueError, match="/forgotten has no scope"):
        web.inventory(application)
