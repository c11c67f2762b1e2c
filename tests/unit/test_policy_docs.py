"""The policies that the docs show can be used as they stand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from interlock.core.policy import run_policy
from interlock.core.recovery import RecoveryPolicy
from interlock.core.retention import RetentionPolicy

PAGE = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text()


def test_every_toml_block_is_a_policy() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    policies = [run_policy(tomllib.loads(block)) for block in blocks]
    assert [policy.guard.name for policy in policies] == ["robust", "mine"]
    assert policies[0].retention == RetentionPolicy()
    documented, default = policies[0].recovery, RecoveryPolicy()
    assert documented.plans == default.plans[:2], "the first two retries are the defaults"
    assert (documented.confirm_after, documented.rewind, documented.max_rollbacks) == (50, 10, 3)
