"""Rows and the core's values to messages of the controller's services, and requests back. No decision stands here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blake3 import blake3
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from interlock.api.controller.v1 import model_service_pb2 as model_pb
from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.core import swap as core
from interlock.core.route import Route, Weight
from interlock.core.swap import CompareLimits, Concurrency, Strategy, Swap, SwapSpec
from interlock.core.swap_plan import Replica as ReplicaView
from interlock.core.swap_plan import SwapReceipt, progress
from interlock.errors import InvalidArgument, Unimplemented
from interlock.runtime.telemetry import trace_id_of
from interlock.stores.controller import Origin, Request, RollbackRow, SwapEvent, VersionRow

_STATES = {state: swap_pb.Swap.State.Value(f"STATE_{state.value}") for state in core.State}
_STRATEGIES = {
    swap_pb.SwapSpec.STRATEGY_UNSPECIFIED: Strategy.BLUE_GREEN,
    swap_pb.SwapSpec.STRATEGY_BLUE_GREEN: Strategy.BLUE_GREEN,
    swap_pb.SwapSpec.STRATEGY_CANARY: Strategy.CANARY,
}
_CONCURRENCIES = {
    swap_pb.SwapSpec.CONCURRENCY_UNSPECIFIED: Concurrency.REJECT,
    swap_pb.SwapSpec.CONCURRENCY_REJECT: Concurrency.REJECT,
    swap_pb.SwapSpec.CONCURRENCY_QUEUE: Concurrency.QUEUE,
    swap_pb.SwapSpec.CONCURRENCY_SUPERSEDE: Concurrency.SUPERSEDE,
}


def timestamp(seconds: float | None) -> Timestamp | None:
    """A point in time; None and 0 are absent."""
    if not seconds:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def duration(seconds: float) -> Duration:
    """A length of time."""
    length = Duration()
    length.FromNanoseconds(int(seconds * 1e9))
    return length


def request_of(request: Any, verb: str) -> Request | None:
    """The idempotency key of a mutating request with the digest of what it asks; None when it has no key."""
    change = request.change
    if len(change.request_id) > 128:
        raise InvalidArgument(
            f"change.request_id: {len(change.request_id)} characters; at most 128",
            reason="INVALID_REQUEST_ID",
            field="change.request_id",
        )
    if not change.request_id:
        return None
    body: Message = type(request)()
    body.CopyFrom(request)
    body.ClearField("change")
    return Request(change.request_id, verb, blake3(body.SerializeToString(deterministic=True)).hexdigest())


# --- swaps ------------------------------------------------------------------------------------------------------------------------


def spec_of(spec: swap_pb.SwapSpec) -> SwapSpec:
    """A swap's specification with the defaults filled in.

    Raises:
        InvalidArgument: `INVALID_NAME`, `INVALID_ID`, `INVALID_SPEC`.
        Unimplemented: strategy SHADOW.
    """
    model, candidate = names.parse_version(spec.candidate_version, "spec.candidate_version")
    if spec.strategy not in _STRATEGIES:
        raise Unimplemented("spec.strategy: SHADOW is planned; BLUE_GREEN and CANARY are built", field="spec.strategy")
    given: dict[str, Any] = {}
    for field, name in (
        ("drain_timeout", "drain_seconds"),
        ("prepare_timeout", "prepare_seconds"),
        ("soak_duration", "soak_seconds"),
        ("keep_warm_duration", "keep_warm_seconds"),
        ("approval_timeout", "approval_seconds"),
        ("canary_step_duration", "canary_step_seconds"),
    ):
        if spec.HasField(field):  # type: ignore[arg-type]  # the literal names of the tuple above
            given[name] = getattr(spec, field).ToNanoseconds() / 1e9
    if spec.warmup_iterations:
        given["warmup_iterations"] = spec.warmup_iterations
    if spec.error_rate_max:
        given["error_rate_max"] = spec.error_rate_max
    limits = spec.compare_limits
    return SwapSpec(
        model,
        candidate,
        strategy=_STRATEGIES[spec.strategy],
        concurrency=_CONCURRENCIES[spec.concurrency],
        compare=CompareLimits(
            limits.abs_error_max or None, limits.rel_error_max or None, limits.top1_agreement_min or None
        ),
        approval_required=spec.approval_required,
        canary_percents=tuple(spec.canary_percents),
        force=spec.force,
        **given,
    )


def spec_message(spec: SwapSpec) -> swap_pb.SwapSpec:
    """A specification as the wire has it, defaults included."""
    return swap_pb.SwapSpec(
        candidate_version=names.version_name(spec.model, spec.candidate),
        strategy=swap_pb.SwapSpec.Strategy.Value(f"STRATEGY_{spec.strategy.value}"),
        concurrency=swap_pb.SwapSpec.Concurrency.Value(f"CONCURRENCY_{spec.concurrency.value}"),
        warmup_iterations=spec.warmup_iterations,
        drain_timeout=duration(spec.drain_seconds),
        prepare_timeout=duration(spec.prepare_seconds),
        soak_duration=duration(spec.soak_seconds),
        keep_warm_duration=duration(spec.keep_warm_seconds),
        approval_required=spec.approval_required,
        approval_timeout=duration(spec.approval_seconds),
        compare_limits=swap_pb.CompareLimits(
            abs_error_max=spec.compare.abs_error_max or 0.0,
            rel_error_max=spec.compare.rel_error_max or 0.0,
            top1_agreement_min=spec.compare.top1_agreement_min or 0.0,
        ),
        canary_percents=spec.canary_percents,
        canary_step_duration=duration(spec.canary_step_seconds),
        force=spec.force,
        error_rate_max=spec.error_rate_max,
    )


def swap_message(swap: Swap, replicas: tuple[ReplicaView, ...] = ()) -> swap_pb.Swap:
    """A swap; with the replicas' views its progress is finer."""
    stable = swap.stable_version
    held = " (held)" if swap.paused_at is not None else ""
    return swap_pb.Swap(
        name=names.swap_name(swap.id),
        model=names.model_name(swap.spec.model),
        stable_version=names.version_name(swap.spec.model, stable) if stable else "",
        spec=spec_message(swap.spec),
        state=_STATES[swap.state],
        progress_percent=progress(swap, replicas),
        message=swap.message + held,
        reason=swap.reason,
        epoch=swap.epoch,
        change=types_pb2.Change(request_id=swap.request_id, reason=swap.why, actor=swap.actor),
        create_time=timestamp(swap.created_at),
        update_time=timestamp(swap.changed_at),
        end_time=timestamp(swap.ended_at),
        revision=swap.revision,
        trace_id=trace_id_of(swap.trace),
    )


def receipt_message(
    receipt: SwapReceipt, candidate: VersionRow | None, stable: VersionRow | None, events: Iterable[SwapEvent]
) -> swap_pb.SwapReceipt:
    """A receipt with the digests and origin of its versions and the states it went through."""
    figures = receipt.figures
    message = swap_pb.SwapReceipt(
        swap=names.swap_name(receipt.swap),
        state=_STATES[receipt.state],
        stable_version=names.version_name(receipt.model, receipt.stable) if receipt.stable else "",
        candidate_version=names.version_name(receipt.model, receipt.candidate),
        stable_digest=stable.digest if stable else "",
        candidate_digest=receipt.candidate_digest or (candidate.digest if candidate else ""),
        origin=origin_message(candidate.origin) if candidate else None,
        epoch_before=receipt.epoch_before,
        epoch_after=receipt.epoch_after,
        warmup_median_ms=receipt.warmup_median_ms,
        warmup_iterations=receipt.warmup_iterations,
        compare_sample_count=receipt.compare_samples,
        compare_max_abs_error=receipt.compare_max_abs_error,
        compare_top1_agreement=receipt.compare_top1_agreement,
        switch_duration=duration(receipt.switch_seconds),
        in_flight_count=receipt.in_flight,
        drained_count=receipt.drained,
        cut_count=receipt.cut,
        failed_count=receipt.failed,
        failed_request_ids=receipt.failed_request_ids,
        latency_seconds_p99_before=figures.latency_p99_before,
        latency_seconds_p99_during=figures.latency_p99_during,
        latency_seconds_p99_after=figures.latency_p99_after,
        verdicts=figures.verdicts,
        actor=receipt.actor,
        reason=receipt.why,
        trace_id=trace_id_of(receipt.trace),
    )
    for event in events:
        message.events.add(state=_STATES[event.swap.state], time=timestamp(event.at), message=event.swap.message)
    return message


# --- versions, routes, rollbacks ------------------------------------------------------------------------------------------------------


def origin_of(origin: types_pb2.Origin) -> Origin:
    """Where a version came from; names are checked."""
    if origin.run:
        names.parse_run(origin.run, "origin.run")
    if origin.checkpoint:
        names.parse_checkpoint(origin.checkpoint, "origin.checkpoint")
    return Origin(origin.run, origin.checkpoint, origin.step, origin.attempt, origin.checkpoint_digest)


def origin_message(origin: Origin) -> types_pb2.Origin:
    """The same as a message."""
    return types_pb2.Origin(
        run=origin.run,
        checkpoint=origin.checkpoint,
        step=origin.step,
        attempt=origin.attempt,
        checkpoint_digest=origin.checkpoint_digest,
    )


def _version_state(row: VersionRow) -> model_pb.Version.State.ValueType:
    if row.quarantined:
        return model_pb.Version.STATE_QUARANTINED
    return model_pb.Version.STATE_GATE_FAILED if row.gate_failure else model_pb.Version.STATE_AVAILABLE


def version_message(row: VersionRow) -> model_pb.Version:
    """A version."""
    return model_pb.Version(
        name=names.version_name(row.model, row.version),
        digest=row.digest,
        artifact_uri=row.artifact_uri,
        origin=origin_message(row.origin),
        state=_version_state(row),
        message=row.quarantined or row.gate_failure,
        create_time=timestamp(row.created_at),
        metrics=row.metrics,
        size_bytes=row.size_bytes,
    )


def weights_of(model: str, weights: Iterable[types_pb2.RouteWeight]) -> tuple[Weight, ...]:
    """The weights of a route of `model`; versions of another one are refused."""
    found = []
    for i, weight in enumerate(weights):
        of, version = names.parse_version(weight.version, f"weights[{i}].version")
        if of != model:
            raise InvalidArgument(
                f"weights[{i}].version: {weight.version!r} is not a version of {names.model_name(model)}",
                reason="INVALID_WEIGHTS",
                field=f"weights[{i}].version",
            )
        found.append(Weight(version, weight.weight))
    return tuple(found)


def route_message(route: Route) -> types_pb2.Route:
    """A route."""
    heaviest = route.heaviest()
    message = types_pb2.Route(model=names.model_name(route.model), epoch=route.epoch)
    message.stable_version = names.version_name(route.model, heaviest) if heaviest else ""
    for weight in route.weights:
        message.weights.add(version=names.version_name(route.model, weight.version), weight=weight.weight)
    return message


def rollback_message(row: RollbackRow) -> model_pb.RollbackRecord:
    """What is on record of a run's rollback."""
    return model_pb.RollbackRecord(
        rollback_id=row.id,
        run=row.run,
        rule=row.rule,
        value=row.value,
        limit=row.limit,
        from_step=row.from_step,
        to_step=row.to_step,
        target_checkpoint=row.target,
        decided_by=row.decided_by,
        affected_versions=row.affected,
        create_time=timestamp(row.created_at),
        trace_id=trace_id_of(row.trace),
    )
