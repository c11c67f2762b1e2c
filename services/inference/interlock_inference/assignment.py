"""What a replica was last told to serve, on disk: so that it serves again after a crash when nobody is there to tell it.

Written before a route comes into force and whenever a higher fencing token is seen; one small JSON file, replaced whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from interlock.core.route import Route, Weight
from interlock.stores.artifacts import write_durably
from interlock_inference.slots import Origin

FORMAT = 1
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Assigned:
    """One routed version: enough to load it again."""

    artifact_uri: str
    digest: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class AssignedModel:
    """One model's route, what the controller calls its stable version, and the routed versions."""

    route: Route
    stable_version: str
    updated_at: float
    versions: Mapping[str, Assigned]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything the replica was told. `fencing_token` is the highest seen."""

    fencing_token: int = 0
    models: Mapping[str, AssignedModel] = field(default_factory=dict)


class AssignmentFile:
    """The file of one replica."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Assignment:
        """The last assignment; an empty one when there is none or it can't be read, which is logged and kept aside."""
        try:
            return _parse(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return Assignment()
        except (ValueError, KeyError, TypeError) as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            _log.error("assignment_unreadable", path=str(self._path), kept_as=str(aside), problem=repr(error))
            return Assignment()

    def write(self, assignment: Assignment) -> None:
        """Replaces the file, durably. Blocks for an fsync."""
        models = {
            model: {
                "epoch": assigned.route.epoch,
                "weights": {w.version: w.weight for w in assigned.route.weights},
                "stable_version": assigned.stable_version,
                "updated_at": assigned.updated_at,
                "versions": {version: asdict(each) for version, each in assigned.versions.items()},
            }
            for model, assigned in assignment.models.items()
        }
        body = {"format": FORMAT, "fencing_token": assignment.fencing_token, "models": models}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, (json.dumps(body, indent=1) + "\n").encode())


def _parse(body: Mapping[str, object]) -> Assignment:
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']!r} is not {FORMAT}")
    models = body["models"]
    token = body["fencing_token"]
    if not isinstance(models, dict) or not isinstance(token, int):
        raise TypeError("models or fencing_token has the wrong type")
    return Assignment(token, {model: _parse_model(model, entry) for model, entry in models.items()})


def _parse_model(model: str, entry: Mapping[str, object]) -> AssignedModel:
    weights, versions, epoch, updated_at = entry["weights"], entry["versions"], entry["epoch"], entry["updated_at"]
    if (
        not isinstance(weights, dict)
        or not isinstance(versions, dict)
        or not isinstance(epoch, int)
        or not isinstance(updated_at, float | int)
    ):
        raise TypeError(f"{model}: a field has the wrong type")
    route = Route(model, epoch, tuple(Weight(version, int(weight)) for version, weight in weights.items()))
    assigned = {
        v: Assigned(str(e["artifact_uri"]), str(e["digest"]), Origin(**e["origin"])) for v, e in versions.items()
    }
    if set(weights) != set(assigned):
        raise ValueError(f"{model}: weights and versions disagree")
    return AssignedModel(route, str(entry["stable_version"]), float(updated_at), assigned)
