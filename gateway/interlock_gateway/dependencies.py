"""What a route asks for in its signature: its scope, who calls, the lines to the rooms."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from interlock.runtime.access import Keys, Principal, Scope, require
from interlock_gateway.upstreams import Upstreams


class Needs:
    """The dependency that holds a route to its scope; gives the handler who calls.

    Args:
        scope: what the caller's key must hold.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, request: Request) -> Principal:
        """Raises Unauthenticated or PermissionDenied."""
        keys: Keys = request.app.state.keys
        public = self.scope is Scope.PUBLIC
        principal = Principal("anonymous", frozenset()) if public else keys.principal(request.headers.get("x-api-key"))
        require(principal, self.scope, f"{request.method} {request.url.path}")
        return principal


def needs(scope: Scope) -> Any:
    """`dependencies=[needs(Scope.X)]` of a route, or a parameter's default to learn who calls."""
    return Depends(Needs(scope))


def _upstreams(request: Request) -> Upstreams:
    upstreams: Upstreams = request.app.state.upstreams
    return upstreams


Up = Annotated[Upstreams, Depends(_upstreams)]
"""The lines to the other rooms."""
