"""Everything over HTTP that is not a prediction: FastAPI with routes that each state their scope; one without a scope stops the start."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route

import interlock
from interlock.errors import InterlockError, InvalidArgument, NotFound, Unimplemented
from interlock.runtime.access import Keys, Scope
from interlock.runtime.settings import Settings
from interlock_gateway import problems
from interlock_gateway.dependencies import Needs
from interlock_gateway.predict import Predictor
from interlock_gateway.routes import admin, health, open_inference, runs, swaps
from interlock_gateway.upstreams import Upstreams

DOCUMENTATION = frozenset({"/docs", "/openapi.json", "/docs/oauth2-redirect"})
PREDICTIONS = (
    ("POST", "/predict", Scope.INFER),
    ("POST", "/batch", Scope.INFER),
    ("POST", "/v2/models/{model}/infer", Scope.INFER),
    ("POST", "/v2/models/{model}/versions/{version}/infer", Scope.INFER),
)
"""Routes answered outside the framework, for the inventory."""


def build(
    settings: Settings, upstreams: Upstreams, predictor: Predictor, keys: Keys, *registries: CollectorRegistry
) -> FastAPI:
    """The application with all routes; `/metrics` shows the gateway's metrics and those of `registries`.

    Raises:
        ValueError: a route has no scope.
    """
    app = FastAPI(
        title="Interlock", version=interlock.__version__, docs_url="/docs", redoc_url=None, openapi_url="/openapi.json"
    )
    app.state.settings, app.state.upstreams, app.state.predictor, app.state.keys = settings, upstreams, predictor, keys
    app.state.registries = (REGISTRY, *registries)
    for module in (health, open_inference, admin, swaps, runs):
        app.include_router(module.router)
    app.add_exception_handler(InterlockError, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    if settings.gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.gateway.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["content-type", "x-api-key", "x-request-id", "traceparent"],
        )
    inventory(app)
    return app


def _routes(routes: list[BaseRoute]) -> Iterator[Route | APIRoute]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from _routes(inner.routes)
        elif isinstance(route, Route):
            yield route
        else:
            raise ValueError(f"route {route!r} is of a kind that has no scope")


def _scope_of(route: Route) -> Scope:
    if route.path in DOCUMENTATION:
        return Scope.PUBLIC
    found = (
        [d.call.scope for d in route.dependant.dependencies if isinstance(d.call, Needs)]
        if isinstance(route, APIRoute)
        else []
    )
    if len(found) != 1:
        raise ValueError(f"{route.path} has no scope: add dependencies=[needs(Scope.X)]")
    return found[0]


def inventory(app: FastAPI) -> list[tuple[str, str, Scope]]:
    """(method, path template, scope) of every HTTP route.

    Raises:
        ValueError: a route has none; denied by default means that the gateway does not start with it.
    """
    rows = [
        (method, route.path, _scope_of(route))
        for route in _routes(app.routes)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    return [*PREDICTIONS, *rows]


async def _problem(request: Request, error: Exception) -> Response:
    known = problems.as_interlock(error, request.url.path)
    status, headers, body = problems.response(known, open_inference=request.url.path.startswith("/v2/"))
    return Response(body, status, headers={name.decode(): value.decode() for name, value in headers})


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return await _problem(request, InvalidArgument(f"{field}: {first['msg']}", reason="INVALID_REQUEST", field=field))


async def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    verb = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        known: InterlockError = Unimplemented(
            f"{verb}: the path exists, the method does not; see /docs", reason="METHOD_NOT_ALLOWED"
        )
    elif error.status_code == 404:
        known = NotFound(f"{verb}: no such path; see /docs", reason="PATH_NOT_FOUND")
    else:
        known = InvalidArgument(str(error.detail), reason="INVALID_REQUEST")
    response = await _problem(request, known)
    response.status_code = error.status_code
    return response
