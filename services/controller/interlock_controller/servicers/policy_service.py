"""PolicyService."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from interlock.api.controller.v1 import policy_service_pb2 as pb
from interlock.api.controller.v1 import policy_service_pb2_grpc as rpc
from interlock.core.fields import plain
from interlock.core.guard import BUILT_IN
from interlock.errors import NotFound, Unimplemented
from interlock_controller.promoter import Promoter


class PolicyServicer(rpc.PolicyServiceServicer):
    """Reads the built-in guard policies and the promotion policies of the runs that are known."""

    def __init__(self, promoter: Promoter) -> None:
        self._promoter = promoter

    def _all(self) -> list[pb.Policy]:
        guards = [_policy("guard", name, plain(policy)) for name, policy in sorted(BUILT_IN.items())]
        runs = sorted(self._promoter.policies.items())
        return guards + [_policy("promotion", run, plain(policy)) for run, policy in runs]

    async def GetPolicy(self, request: pb.GetPolicyRequest, _context: Any) -> pb.GetPolicyResponse:
        """Reads one. A promotion policy has the name of its run."""
        for policy in self._all():
            if (policy.kind, policy.name) == (request.kind, request.name):
                return pb.GetPolicyResponse(policy=policy)
        raise NotFound(
            f"there is no {request.kind or 'nameless'} policy {request.name!r}",
            reason="POLICY_NOT_FOUND",
            field="name",
            metadata={"kind": request.kind, "name": request.name},
        )

    async def ListPolicies(self, _request: pb.ListPoliciesRequest, _context: Any) -> pb.ListPoliciesResponse:
        """By kind and name."""
        return pb.ListPoliciesResponse(policies=self._all())

    async def Backtest(self, _request: pb.BacktestRequest, _context: Any) -> pb.BacktestResponse:
        """Planned."""
        raise Unimplemented("Backtest is planned; `bench/guard_backtest.py` replays policies over recorded runs")


def _policy(kind: str, name: str, spec: dict[str, Any]) -> pb.Policy:
    policy = pb.Policy(kind=kind, name=name)
    json_format.ParseDict(_finite(spec), policy.spec)
    return policy


def _finite(value: Any) -> Any:
    """JSON has no infinity: a limit that is never reached is said in words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
