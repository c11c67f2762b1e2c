"""MetricsService: step records, from the log and live. Every reader has its own cursor into the log, so none slows the run or another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from interlock.api.trainer.v1 import metrics_service_pb2 as pb
from interlock.api.trainer.v1 import metrics_service_pb2_grpc as pb_grpc
from interlock.core import names
from interlock.core.steps import StepRecord
from interlock.errors import InvalidArgument
from interlock.stores.steplog import live_line
from interlock.stores.trainer import TrainerStore
from interlock.training import wire
from interlock_trainer.runs import Runs

BATCH_SIZE, MAX_BATCH_SIZE = 100, 10_000
INTERVAL_SECONDS = 0.2
LIMIT = 10_000
NOW = -1


class MetricsServicer(pb_grpc.MetricsServiceServicer):
    """Reads only."""

    def __init__(self, runs: Runs, store: TrainerStore) -> None:
        self._runs = runs
        self._store = store

    async def StreamStepMetrics(
        self, request: pb.StreamStepMetricsRequest, context: Any
    ) -> AsyncIterator[pb.StreamStepMetricsResponse]:
        """The log from `from_seq` on, then what is stored as it is stored; ends after the last record of an ended run."""
        session = self._runs.get(names.parse_run(request.run, "run"))
        if request.from_seq < NOW:
            raise InvalidArgument("from_seq: must be at least -1", reason="INVALID_FIELD", field="from_seq")
        size = min(request.batch_size or BATCH_SIZE, MAX_BATCH_SIZE)
        interval = request.batch_interval.ToNanoseconds() / 1e9 or INTERVAL_SECONDS
        latest = request.mode == pb.StreamStepMetricsRequest.MODE_LATEST
        cursor = session.head_seq + 1 if request.from_seq == NOW else max(request.from_seq, 1)
        yield pb.StreamStepMetricsResponse(head_seq=session.head_seq)
        while True:
            ended = session.terminal
            skipped = 0
            if latest and session.head_seq - cursor + 1 > 1:
                skipped, cursor = session.head_seq - cursor, session.head_seq
            records = self._store.steps.read(session.run, cursor, size)
            if records:
                cursor = records[-1].seq + 1
                yield pb.StreamStepMetricsResponse(
                    records=_messages(records, request.metrics), head_seq=session.head_seq, skipped_count=skipped
                )
            elif ended:
                return
            if cursor > session.head_seq and not session.terminal:
                await session.grown(max(interval, 1.0))

    async def QueryStepMetrics(self, request: pb.QueryStepMetricsRequest, context: Any) -> pb.QueryStepMetricsResponse:
        """Records of a range of steps: of the live lineage, of one attempt, or of all."""
        run = names.parse_run(request.run, "run")
        self._runs.get(run)
        if request.limit < 0:
            raise InvalidArgument("limit: is negative", reason="INVALID_FIELD", field="limit")
        limit = request.limit or LIMIT
        found: Iterable[StepRecord] = self._store.steps.by_step(run, request.from_step, request.to_step or 2**62)
        if request.attempt == 0:
            found = live_line(found)
        elif request.attempt > 0:
            found = [record for record in found if record.attempt == request.attempt]
        records = list(found)
        return pb.QueryStepMetricsResponse(
            records=_messages(records[:limit], request.metrics), truncated=len(records) > limit
        )


def _messages(records: Iterable[StepRecord], wanted: Iterable[str]) -> list[pb.StepRecord]:
    chosen = set(wanted)
    messages = [wire.record_message(record) for record in records]
    if chosen:
        for message in messages:
            for name in [name for name in message.metrics if name not in chosen]:
                del message.metrics[name]
    return messages
