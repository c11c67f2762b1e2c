"""Settings, keys, logs and errors: what a process decides before it serves anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from interlock import errors
from interlock.errors import InvalidArgument, PermissionDenied, Unauthenticated
from interlock.runtime import logging, settings, status
from interlock.runtime.access import EVERYBODY, KEY_BYTES, Keys, Scope, hash_key, new_key, require, rpc_scope


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("INTERLOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


class TestSettings:
    def test_the_defaults_are_the_designs(self) -> None:
        """DESIGN 10: ports, loopback, state folder."""
        loaded = settings.load()
        ports = (loaded.gateway.port, loaded.inference.port, loaded.trainer.port, loaded.controller.port)
        assert ports == (8000, 8001, 8002, 8003)
        assert (loaded.inference.metrics_port, loaded.trainer.metrics_port, loaded.controller.metrics_port) == (
            9101,
            9102,
            9103,
        )
        assert (loaded.host, loaded.home, loaded.otlp_endpoint) == ("127.0.0.1", Path(".interlock"), "")
        assert loaded.gateway.max_body_mb == 20  # seed 004: MAX_UPLOAD_MB

    def test_the_environment_wins_over_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "interlock.toml").write_text('log_level = "debug"\n[gateway]\nport = 1\nmax_body_mb = 3\n')
        monkeypatch.setenv("INTERLOCK_GATEWAY_PORT", "2")
        loaded = settings.load()
        assert (loaded.gateway.port, loaded.gateway.max_body_mb, loaded.log_level) == (2, 3, "debug")

    @pytest.mark.parametrize("name", ["INTERLOCK_HOEM", "INTERLOCK_GATEWAY_PROT", "INTERLOCK_FOO"])
    def test_a_misspelt_variable_is_refused_by_name(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(name, "1")
        with pytest.raises(ValueError, match=name):
            settings.load()

    @pytest.mark.parametrize(
        ("text", "field"),
        [("[gateway]\nprot = 1\n", "gateway.prot"), ("[gateway]\nport = 70000\n", "gateway.port"), ("colour = 1\n", "colour"), ('log_level = "loud"\n', "log_level")],
    )  # fmt: skip
    def test_a_mistake_in_the_file_names_the_setting(self, tmp_path: Path, text: str, field: str) -> None:
        (tmp_path / "interlock.toml").write_text(text)
        with pytest.raises(ValueError, match=field):
            settings.load()

    def test_a_file_that_was_named_must_be_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INTERLOCK_CONFIG", "nothing.toml")
        with pytest.raises(ValueError, match="nothing"):
            settings.load()

    @pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("127.9.9.9", True), ("0.0.0.0", False), ("10.0.0.1", False), ("example.org", False)])  # fmt: skip
    def test_what_is_loopback(self, host: str, local: bool) -> None:
        assert settings.is_loopback(host) is local

    def test_a_wider_address_needs_keys_or_a_word(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="there are no API keys"):
            settings.refuse_exposed(settings.load(host="0.0.0.0", home=tmp_path))
        settings.refuse_exposed(settings.load(host="0.0.0.0", home=tmp_path, insecure=True))
        (tmp_path / "keys.toml").touch()
        settings.refuse_exposed(settings.load(host="0.0.0.0", home=tmp_path))


def write(home: Path, **keys: str) -> None:
    (home / "keys.toml").write_text(
        "".join(
            f'[[keys]]\nname = "{scope}"\nhash = "{hash_key(key)}"\nscopes = ["{scope}"]\n'
            for scope, key in keys.items()
        )
    )


class TestKeys:
    def test_a_key_is_256_random_bits_and_is_not_stored(self, tmp_path: Path) -> None:
        """REQUIREMENTS X4."""
        key = new_key()
        assert len(key) >= 4 * KEY_BYTES / 3
        assert key != new_key()
        write(tmp_path, admin=key)
        assert key not in (tmp_path / "keys.toml").read_text()

    def test_without_a_file_everybody_may(self, tmp_path: Path) -> None:
        assert Keys(tmp_path).principal(None) is EVERYBODY

    def test_scopes(self, tmp_path: Path) -> None:
        held = {scope: new_key() for scope in ("infer", "train", "admin")}
        write(tmp_path, **held)
        keys = Keys(tmp_path)
        require(keys.principal(held["infer"]), Scope.INFER, "v")
        require(keys.principal(held["admin"]), Scope.TRAIN, "v")
        with pytest.raises(PermissionDenied) as denied:
            require(keys.principal(held["infer"]), Scope.ADMIN, "v")
        assert denied.value.metadata == {"scope": "admin", "key": "infer"}
        with pytest.raises(Unauthenticated):
            require(keys.principal(None), Scope.INFER, "v")
        with pytest.raises(Unauthenticated) as stranger:
            keys.principal("ilk_" + "x" * 43)
        assert "x" * 10 not in stranger.value.message

    def test_a_half_written_file_locks_nobody_out(self, tmp_path: Path) -> None:
        key = new_key()
        write(tmp_path, admin=key)
        keys = Keys(tmp_path)
        assert keys.principal(key).name == "admin"
        (tmp_path / "keys.toml").write_text('[[keys]]\nname = "adm')
        assert keys.principal(key).name == "admin"

    def test_a_revoked_key_is_refused_at_once(self, tmp_path: Path) -> None:
        key, other = new_key(), new_key()
        write(tmp_path, admin=key)
        keys = Keys(tmp_path)
        keys.principal(key)
        write(tmp_path, infer=other)
        with pytest.raises(Unauthenticated):
            keys.principal(key)

    def test_rooms_that_start_at_once_agree_on_the_internal_key(self, tmp_path: Path) -> None:
        assert len({Keys(tmp_path).internal_key() for _ in range(5)}) == 1

    @given(st.text(max_size=60))
    def test_an_unknown_method_has_no_role(self, text: str) -> None:
        assert rpc_scope(f"/nobody.{text}/Anything") is None


def test_a_log_line_is_one_json_object_with_secrets_masked(capsys: pytest.CaptureFixture[str]) -> None:
    """REQUIREMENTS O4, X4: and what a caller wrote cannot forge a second line."""
    before = structlog.get_config()
    try:
        logging.configure("inference")
        structlog.get_logger("t").info(
            "loaded",
            api_key="ilk_secret",
            authorization="Bearer s",
            fencing_token=3,
            text='a\nb\r\n{"event":"forged"}\x1b[31m\x00',
        )
    finally:
        structlog.configure(**before)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    line = json.loads(out[0])
    assert (line["service"], line["event"], line["level"]) == ("inference", "loaded", "info")
    assert (line["api_key"], line["authorization"], line["fencing_token"]) == ("***", "***", 3)
    assert line["timestamp"].endswith("Z")


ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.InterlockError)]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_survives_the_wire(cls: type[errors.InterlockError]) -> None:
    error = cls("what and why", reason="A_REASON", field="a.b", retry_after_seconds=1.5, metadata={"n": "1"})
    back = status.from_status(status.to_status(error))
    assert back.kind == error.kind
    assert (back.message, back.reason, back.field, back.retry_after_seconds, back.metadata) == (
        "what and why",
        "A_REASON",
        "a.b",
        1.5,
        {"n": "1"},
    )


@given(st.text(max_size=300), st.text(max_size=60), st.floats(0, 1e6))
def test_no_text_breaks_the_wire(message: str, field: str, seconds: float) -> None:
    back = status.from_status(status.to_status(InvalidArgument(message, field=field, retry_after_seconds=seconds)))
    assert (back.message, back.field) == (message, field)
    assert back.retry_after_seconds == pytest.approx(seconds, abs=1e-6)
