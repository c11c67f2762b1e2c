"""Ensembles in a replica: which slots a request's steps run on, whether they fit together, and running them in one thread. Queues nothing.

Rules of this file
- A request resolves its members once, at admission, and holds each to its end: whatever is swapped meanwhile, it is answered by one set of versions.
- Two steps of one model that follow its route get the same version.
- An ensemble is checked against its members when it is loaded, and against a member's candidate before that may be switched to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from interlock.core.ensemble import SERVING, Step
from interlock.core.names import version_name
from interlock.errors import FailedPrecondition, InterlockError, Unavailable
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference.engines import Array, Signature
from interlock_inference.engines.ensemble import Plan
from interlock_inference.slots import ANSWERS, RETRY_SECONDS, ModelRoute, Registry, Slot, Snapshot

Runner = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]
Choice = Callable[[ModelRoute], str | None]


def in_turn(route: ModelRoute) -> str | None:
    """The version that the next request gets. The route remembers that it was given: for requests only."""
    return route.picker.pick()


def heaviest(route: ModelRoute) -> str | None:
    """The version with the largest share."""
    return route.route.heaviest()


# --- who takes part ---


def members(plan: Plan, snapshot: Snapshot, choose: Choice = in_turn) -> list[Slot]:
    """The slot of each step, one and the same for all steps that name a model alike.

    Args:
        choose: the version of a route: for a request the next in turn, which the route remembers; for anything else the heaviest.

    Raises:
        Unavailable: `MEMBER_NOT_READY`, naming the step's model; worth trying again.
    """
    picked: dict[tuple[str, str], Slot] = {}
    for step in plan.steps:
        key = step.model, step.version
        if key not in picked:
            picked[key] = _member(step, snapshot, choose)
    return [picked[step.model, step.version] for step in plan.steps]


def _member(step: Step, snapshot: Snapshot, choose: Choice) -> Slot:
    if step.version == SERVING:
        routed = snapshot.routes.get(step.model)
        version = choose(routed) if routed is not None else None
        slot = routed.slots[version] if routed is not None and version is not None else None
    else:
        slot = snapshot.slots.get(step.model, {}).get(step.version)
    if slot is None or slot.opened is None or slot.state not in ANSWERS:
        raise Unavailable(
            f"models/{step.model}, which is part of this ensemble, has {_which(step)} here",
            reason="MEMBER_NOT_READY",
            retry_after_seconds=RETRY_SECONDS,
            metadata={"model": step.model, "version": step.version},
        )
    return slot


def _which(step: Step) -> str:
    return "nothing routed" if step.version == SERVING else f"no version {step.version} that answers"


def is_ready(slot: Slot, snapshot: Snapshot) -> bool:
    """True when a request that this slot gets would find what it needs: for an ensemble, its members too."""
    plan = slot.plan
    if slot.state not in ANSWERS:
        return False
    try:
        return plan is None or bool(members(plan, snapshot, heaviest))
    except Unavailable:
        return False


def is_model_ready(model: str, snapshot: Snapshot) -> bool:
    """True when a request that names no version would be answered."""
    routed = snapshot.routes.get(model)
    return routed is not None and bool(routed.slots) and all(is_ready(s, snapshot) for s in routed.slots.values())


def using(model: str, registry: Registry) -> Iterator[tuple[Slot, Plan]]:
    """The ensembles that answer here and have a step on this model."""
    for slot in registry.all_slots():
        plan = slot.plan
        if plan is not None and slot.state in ANSWERS and any(step.model == model for step in plan.steps):
            yield slot, plan


def check_not_needed(model: str, version: str, registry: Registry) -> None:
    """Raises FailedPrecondition `MEMBER_OF_ENSEMBLE` when an ensemble that answers here names this very version."""
    for slot, plan in using(model, registry):
        if any((step.model, step.version) == (model, version) for step in plan.steps):
            raise FailedPrecondition(
                f"{version_name(model, version)} is part of {slot.name}, which names it; release the ensemble, or serve one that follows the route",
                reason="MEMBER_OF_ENSEMBLE",
                metadata={"ensemble": slot.name, "version": version_name(model, version)},
            )


def check_model_not_needed(model: str, registry: Registry) -> None:
    """Raises FailedPrecondition `MEMBER_OF_ENSEMBLE` when an ensemble that answers here has a step on this model."""
    for slot, _ in using(model, registry):
        raise FailedPrecondition(
            f"models/{model} is part of {slot.name}; take the ensemble out of service first",
            reason="MEMBER_OF_ENSEMBLE",
            metadata={"ensemble": slot.name, "model": model},
        )


# --- do they fit ---


def check_fits(spec: ModelSpec, plan: Plan, snapshot: Snapshot) -> None:
    """Holds an ensemble to the members that it has now.

    Raises:
        FailedPrecondition: `ENSEMBLE_MEMBER_MISSING`, `SIGNATURE_MISMATCH`, naming the step and the tensor.
    """
    try:
        slots = members(plan, snapshot, heaviest)
    except Unavailable as error:
        raise FailedPrecondition(
            f"{error.message}; load it, and route to it, before the ensemble",
            reason="ENSEMBLE_MEMBER_MISSING",
            field="steps",
            metadata=error.metadata,
        ) from None
    for number, slot in enumerate(slots):
        if slot.plan is not None:
            raise _mismatch(
                f"steps[{number}].model", f"{slot.name} is an ensemble itself; name its members here instead"
            )
    check_tensors(spec, plan, [_signature(slot) for slot in slots])


def check_tensors(spec: ModelSpec, plan: Plan, signatures: Sequence[Signature]) -> None:
    """Holds every tensor's source to those that take it. Raises FailedPrecondition `SIGNATURE_MISMATCH`."""
    known = {tensor.name: tensor for tensor in spec.inputs}
    for number in (n for level in plan.levels for n in level):
        step, signature = plan.steps[number], signatures[number]
        given = {tensor.name: tensor for tensor in signature.outputs}
        for tensor in signature.inputs:
            where = f"steps[{number}].inputs.{tensor.name}"
            if tensor.name not in step.inputs:
                raise _mismatch(where, f"models/{step.model} takes it, and the step does not say from where")
            _check_goes(where, known[step.inputs[tensor.name]], tensor)
        for name in step.inputs:
            if name not in {tensor.name for tensor in signature.inputs}:
                raise _mismatch(f"steps[{number}].inputs.{name}", f"models/{step.model} has no such input")
        for name, called in step.outputs.items():
            if name not in given:
                raise _mismatch(f"steps[{number}].outputs.{name}", f"models/{step.model} has no such output")
            known[called] = given[name]
    for index, tensor in enumerate(spec.outputs):
        _check_goes(f"outputs[{index}]", known[tensor.name], tensor)


def _check_goes(where: str, given: TensorSpec, wanted: TensorSpec) -> None:
    fits = len(given.shape) == len(wanted.shape) and all(
        w in (-1, g) for g, w in zip(given.shape, wanted.shape, strict=True)
    )
    if not fits or given.datatype != wanted.datatype:
        raise _mismatch(
            where, f"{given.datatype} {list(given.shape)} comes, {wanted.datatype} {list(wanted.shape)} is wanted"
        )


def _mismatch(field: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"model.toml: {field}: {problem}", reason="SIGNATURE_MISMATCH", field=field, metadata={"step": field}
    )


def _signature(slot: Slot) -> Signature:
    assert slot.opened is not None, "a member has its engine"
    return slot.opened.engine.signature


# --- running it in one thread: for the warm-up and the comparison ---


def runner(slot: Slot, snapshot: Snapshot, instead: Slot | None = None) -> tuple[Runner, tuple[Slot, ...]]:
    """How a slot is run in a thread, and what must be held meanwhile. `instead` takes the place of its model's routed version in an ensemble."""
    plan = slot.plan
    if plan is None:
        assert slot.opened is not None, "a loaded slot has its engine"
        return slot.opened.engine.run, (slot,)
    slots = members(plan, snapshot, heaviest)
    if instead is not None:
        follows = [step.model == instead.model and step.version == SERVING for step in plan.steps]
        slots = [instead if yes else member for yes, member in zip(follows, slots, strict=True)]
    return lambda inputs, names: run_steps(plan, slots, inputs, names), (slot, *dict.fromkeys(slots))


def run_steps(plan: Plan, slots: Sequence[Slot], inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """Runs the steps one after the other, here and now; the slots are held by the caller."""
    tensors = dict(inputs)
    for number in (n for level in plan.levels for n in level):
        step, opened = plan.steps[number], slots[number].opened
        assert opened is not None, "a held slot keeps its engine"
        try:
            outputs = opened.engine.run({k: tensors[v] for k, v in step.inputs.items()}, list(step.outputs))
        except InterlockError as error:
            raise in_step(error, number, slots[number]) from error
        tensors.update(zip(step.outputs.values(), outputs, strict=True))
    return [tensors[name] for name in names]


def in_step(error: InterlockError, number: int, slot: Slot) -> InterlockError:
    """The same error, saying which step it comes from."""
    return type(error)(
        f"step {number}, {slot.name}: {error.message}",
        reason=error.reason,
        field=error.field,
        metadata={**error.metadata, "step": str(number), "member": slot.name},
        retry_after_seconds=error.retry_after_seconds,
    )
