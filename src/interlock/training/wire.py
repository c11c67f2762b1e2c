"""Protobuf to plain values and back, for the trainer's contracts. Used by the loop's side and by the trainer's servicers alike; no torch.

Names on the wire are resource names; ids are in the values. A time is a Timestamp on the wire and seconds since the epoch in a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from interlock.api.trainer.v1 import loop_service_pb2 as loop_pb
from interlock.api.trainer.v1 import metrics_service_pb2 as metrics_pb
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.core import names
from interlock.core.fields import plain
from interlock.core.policy import run_policy
from interlock.core.promotion import PromotionPolicy, check_policy
from interlock.core.recovery import CheckpointState, Plan, Rollback
from interlock.core.retention import Better
from interlock.core.steps import StepRecord
from interlock.training import terms
from interlock.training.terms import CheckpointInfo, Hello, Order, Result

STATES = {
    CheckpointState.CANDIDATE: run_pb.Checkpoint.STATE_CANDIDATE,
    CheckpointState.GOOD: run_pb.Checkpoint.STATE_GOOD,
    CheckpointState.QUARANTINED: run_pb.Checkpoint.STATE_QUARANTINED,
}
STATES_BACK = {number: state for state, number in STATES.items()}


def timestamp(seconds: float) -> Timestamp:
    """A Timestamp; zero seconds is the epoch."""
    whole = int(seconds // 1)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def seconds(stamp: Timestamp) -> float:
    """Seconds since the epoch."""
    return float(stamp.seconds) + float(stamp.nanos) / 1e9


def struct(data: Any) -> Struct:
    """A Struct from plain data."""
    message = Struct()
    json_format.Parse(json.dumps(data), message)
    return message


def data_of(message: Struct) -> dict[str, Any]:
    """Plain data from a Struct; every number is a float."""
    data: dict[str, Any] = json_format.MessageToDict(message)
    return data


def record_message(record: StepRecord) -> metrics_pb.StepRecord:
    """A step record for the wire."""
    return metrics_pb.StepRecord(
        seq=record.seq, step=record.step, attempt=record.attempt, time=timestamp(record.time), metrics=record.metrics
    )


def record_value(message: metrics_pb.StepRecord) -> StepRecord:
    """A step record from the wire."""
    return StepRecord(message.attempt, message.seq, message.step, seconds(message.time), dict(message.metrics))


def records_message(records: Iterable[StepRecord]) -> loop_pb.StepBatch:
    """A batch for the loop's stream."""
    return loop_pb.StepBatch(records=[record_message(record) for record in records])


def checkpoint_message(run: str, info: CheckpointInfo, *, pinned: bool = False) -> run_pb.Checkpoint:
    """A checkpoint for the wire."""
    return run_pb.Checkpoint(
        name=names.checkpoint_name(run, info.checkpoint),
        step=info.step,
        attempt=info.attempt,
        seq=info.seq,
        state=STATES[info.state],
        pinned=pinned,
        size_bytes=info.size_bytes,
        digest=info.digest,
        metrics=info.metrics,
        create_time=timestamp(info.time),
        message=info.message,
        reason=info.reason,
    )


def checkpoint_value(message: run_pb.Checkpoint) -> CheckpointInfo:
    """A checkpoint from the wire."""
    return CheckpointInfo(
        checkpoint=names.parse_checkpoint(message.name, "checkpoint.name")[1],
        attempt=message.attempt,
        step=message.step,
        seq=message.seq,
        time=seconds(message.create_time),
        metrics=dict(message.metrics),
        reason=message.reason,
        size_bytes=message.size_bytes,
        digest=message.digest,
        state=STATES_BACK.get(message.state, CheckpointState.CANDIDATE),
        message=message.message,
    )


def rollback_message(
    run: str,
    rollback: Rollback,
    *,
    state: run_pb.Rollback.State.ValueType = run_pb.Rollback.STATE_ROLLING_BACK,
    quarantined: Iterable[str] = (),
    decided_by: str = "",
    create_time: float = 0.0,
    complete_time: float = 0.0,
    trace_id: str = "",
) -> run_pb.Rollback:
    """A rollback for the wire."""
    plan = rollback.plan
    skip = plan.skip_before + plan.skip_after + 1 if plan.skips_data else 0
    return run_pb.Rollback(
        rollback_id=rollback.rollback,
        run=names.run_name(run),
        state=state,
        rule=rollback.rule or ("manual" if rollback.actor != "restart" else rollback.actor),
        metric=rollback.metric,
        value=rollback.value,
        limit=rollback.limit,
        from_step=rollback.from_step,
        onset_step=rollback.onset_step,
        to_step=rollback.to_step,
        target_checkpoint=names.checkpoint_name(run, rollback.checkpoint),
        quarantined_checkpoints=[names.checkpoint_name(run, item) for item in quarantined],
        plan=run_pb.RetryPlan(
            learning_rate_factor=plan.lr_factor,
            learning_rate_step_count=plan.lr_steps,
            skip_step_count=skip,
            skip_from_step=max(rollback.to_step + 1, rollback.onset_step - plan.skip_before) if skip else 0,
            reset_moments=plan.reset_moments,
            new_seed=rollback.attempt if plan.new_seed else 0,
        ),
        attempt=rollback.attempt,
        decided_by=decided_by,
        create_time=timestamp(create_time) if create_time else None,
        complete_time=timestamp(complete_time) if complete_time else None,
        trace_id=trace_id,
        message="; ".join(part for part in (rollback.reason, rollback.fallback) if part),
    )


def rollback_value(message: run_pb.Rollback) -> Rollback:
    """A rollback from the wire."""
    plan = message.plan
    before = max(0, message.onset_step - plan.skip_from_step) if plan.skip_step_count else 0
    return Rollback(
        rollback=message.rollback_id,
        attempt=message.attempt,
        checkpoint=names.parse_checkpoint(message.target_checkpoint, "target_checkpoint")[1],
        from_step=message.from_step,
        from_seq=0,
        to_step=message.to_step,
        onset_step=message.onset_step,
        plan=Plan(
            lr_factor=plan.learning_rate_factor or 1.0,
            lr_steps=plan.learning_rate_step_count,
            skip_before=before,
            skip_after=max(0, plan.skip_step_count - before - 1),
            reset_moments=plan.reset_moments,
            new_seed=bool(plan.new_seed),
        ),
        level=0,
        reason=message.message,
        actor="guard" if message.rule not in ("manual", "restart", "") else (message.rule or "manual"),
        rule="" if message.rule in ("manual", "restart") else message.rule,
        metric=message.metric,
        value=message.value,
        limit=message.limit,
    )


def promotion_message(promotion: PromotionPolicy) -> run_pb.PromotionPolicy:
    """A promotion policy for the wire."""
    higher = promotion.better is Better.HIGHER
    message = run_pb.PromotionPolicy(
        model=names.model_name(promotion.model),
        metric=promotion.metric,
        direction=run_pb.PromotionPolicy.DIRECTION_MAXIMIZE if higher else run_pb.PromotionPolicy.DIRECTION_MINIMIZE,
        min_improvement=promotion.min_improvement,
    )
    message.min_interval.FromNanoseconds(int(promotion.min_interval_seconds * 1e9))
    return message


def promotion_value(message: run_pb.PromotionPolicy) -> PromotionPolicy:
    """A promotion policy from the wire.

    Raises:
        InvalidArgument: `INVALID_POLICY`, naming the field.
    """
    lower = message.direction == run_pb.PromotionPolicy.DIRECTION_MINIMIZE
    policy = PromotionPolicy(
        model=names.parse_model(message.model, "promotion.model"),
        metric=message.metric or "reward",
        better=Better.LOWER if lower else Better.HIGHER,
        min_improvement=message.min_improvement,
        min_interval_seconds=message.min_interval.ToNanoseconds() / 1e9,
    )
    return check_policy(policy)


def hello_message(hello: Hello) -> loop_pb.Hello:
    """A hello for the wire."""
    return loop_pb.Hello(
        run=names.run_name(hello.run),
        pid=hello.pid,
        attempt=hello.attempt,
        step=hello.step,
        seq=hello.seq,
        policy=struct(plain(hello.policy)),
        promotion=promotion_message(hello.promotion) if hello.promotion else None,
        checkpoint_folder=hello.checkpoint_folder,
        recipe=hello.recipe,
        servable=hello.servable,
        starting=hello.starting,
    )


def hello_value(message: loop_pb.Hello) -> Hello:
    """A hello from the wire; raises InvalidArgument for a policy that is none."""
    return Hello(
        run=names.parse_run(message.run, "hello.run"),
        pid=message.pid,
        attempt=message.attempt,
        step=message.step,
        seq=message.seq,
        policy=run_policy(data_of(message.policy)),
        promotion=promotion_value(message.promotion) if message.HasField("promotion") else None,
        checkpoint_folder=message.checkpoint_folder,
        recipe=message.recipe,
        servable=message.servable,
        starting=message.starting,
    )


def result_message(run: str, result: Result) -> loop_pb.OrderResult:
    """An order's result for the wire."""
    return loop_pb.OrderResult(
        order_id=result.order,
        error=result.error,
        attempt=result.attempt,
        step=result.step,
        artifact_uri=result.artifact,
        digest=result.digest,
        max_abs_error=result.max_abs_error,
        max_rel_error=result.max_rel_error,
        checkpoint=names.checkpoint_name(run, result.checkpoint) if result.checkpoint else "",
    )


def result_value(message: loop_pb.OrderResult) -> Result:
    """An order's result from the wire."""
    return Result(
        order=message.order_id,
        error=message.error,
        attempt=message.attempt,
        step=message.step,
        checkpoint=names.parse_checkpoint(message.checkpoint)[1] if message.checkpoint else "",
        artifact=message.artifact_uri,
        digest=message.digest,
        max_abs_error=message.max_abs_error,
        max_rel_error=message.max_rel_error,
    )


def event_message(run: str, event: terms.Begun | terms.Saved | terms.Changed | Result) -> loop_pb.AttachRequest:
    """Any event that is not a step, for the wire."""
    if isinstance(event, Result):
        return loop_pb.AttachRequest(order_result=result_message(run, event))
    checkpoint = checkpoint_message(run, event.info)
    if isinstance(event, terms.Begun):
        return loop_pb.AttachRequest(
            checkpoint_begun=loop_pb.CheckpointBegun(checkpoint=checkpoint, initial=event.initial)
        )
    if isinstance(event, terms.Saved):
        return loop_pb.AttachRequest(checkpoint_saved=loop_pb.CheckpointSaved(checkpoint=checkpoint))
    return loop_pb.AttachRequest(
        checkpoint_changed=loop_pb.CheckpointChanged(checkpoint=checkpoint, deleted=event.deleted)
    )


def order_message(run: str, order: Order) -> loop_pb.Order:
    """An order for the wire."""
    message = loop_pb.Order(order_id=order.order)
    if isinstance(order, terms.SaveOrder):
        message.save.reason = order.reason
    elif isinstance(order, terms.RollBackOrder):
        message.roll_back.CopyFrom(rollback_message(run, order.rollback))
    elif isinstance(order, terms.PauseOrder):
        message.pause.reason = order.reason
    elif isinstance(order, terms.ResumeOrder):
        message.resume.SetInParent()
    elif isinstance(order, terms.StopOrder):
        message.stop.reason = order.reason
    elif isinstance(order, terms.ExportOrder):
        message.export.checkpoint = names.checkpoint_name(run, order.checkpoint)
    elif isinstance(order, terms.ChangeOrder):
        message.change.name, message.change.value, message.change.step_count = order.name, order.value, order.num_steps
    else:
        message.delete.checkpoints.extend(names.checkpoint_name(run, item) for item in order.checkpoints)
    return message


def order_value(message: loop_pb.Order) -> Order | None:
    """An order from the wire; None for one this version does not know."""
    order = message.order_id
    match message.WhichOneof("action"):
        case "save":
            return terms.SaveOrder(order, message.save.reason)
        case "roll_back":
            return terms.RollBackOrder(order, rollback_value(message.roll_back))
        case "pause":
            return terms.PauseOrder(order, message.pause.reason)
        case "resume":
            return terms.ResumeOrder(order)
        case "stop":
            return terms.StopOrder(order, message.stop.reason)
        case "export":
            return terms.ExportOrder(order, names.parse_checkpoint(message.export.checkpoint)[1])
        case "change":
            return terms.ChangeOrder(order, message.change.name, message.change.value, message.change.step_count)
        case "delete":
            return terms.DeleteOrder(order, tuple(names.parse_checkpoint(c)[1] for c in message.delete.checkpoints))
        case _:
            return None
