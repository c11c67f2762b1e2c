"""Artifacts in S3, over the real protocol against moto's server: whole or not there, resumed, bounded, and errors that say what is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onnx_models
from interlock.errors import (
    Cancelled,
    FailedPrecondition,
    InterlockError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from interlock.stores import artifacts, remote
from interlock.stores.remote import RemoteArtifacts, RemoteOptions

pytest.importorskip("moto.server", reason="pip install 'moto[s3,server]'")
s3_world = pytest.importorskip("s3_world", reason="pip install 'interlock[s3]'")
KEYS, Bucket = s3_world.KEYS, s3_world.Bucket


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_world.a_store() as url:
        yield url


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_world.use_credentials(monkeypatch, tmp_path)


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path) -> Bucket:
    return Bucket(endpoint, tmp_path)


def test_a_version_is_fetched_once_and_proven(bucket: Bucket) -> None:
    digest = bucket.version()
    fetched = bucket.artifacts().fetch(bucket.uri("models/policy/3"))
    assert fetched == bucket.cache / digest.removeprefix("blake3:")
    assert artifacts.verify(fetched, digest).digest == digest
    assert bucket.left() == [digest.removeprefix("blake3:")]
    for key in ("manifest.json", "model.onnx"):
        bucket.s3.delete_object(Bucket=bucket.name, Key=f"models/policy/3/{key}")
    assert bucket.artifacts().fetch(bucket.uri("models/policy/3"), digest) == fetched, "by its digest it needs no store"
    with pytest.raises(NotFound):
        bucket.artifacts().fetch(bucket.uri("models/policy/3"))


def test_a_single_file_becomes_a_folder(bucket: Bucket) -> None:
    bucket.s3.put_object(Bucket=bucket.name, Key="p.onnx", Body=onnx_models.constant(1.0))
    fetched = bucket.artifacts().fetch(bucket.uri("p.onnx"))
    assert (fetched / "model.onnx").read_bytes() == onnx_models.constant(1.0)
    assert artifacts.verify(fetched).digest.endswith(fetched.name)


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3://b/\n", "http://b/k"])
def test_what_is_no_address(bucket: Bucket, uri: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        bucket.artifacts().fetch(uri)
    assert (refused.value.reason, refused.value.field) == ("INVALID_ARTIFACT_URI", "artifact_uri")


def test_what_is_missing_is_named(bucket: Bucket) -> None:
    bucket.version()
    bucket.s3.delete_object(Bucket=bucket.name, Key="models/policy/3/model.onnx")
    for uri, key in (
        (bucket.uri("none"), "none/manifest.json"),
        (bucket.uri("models/policy/3"), "models/policy/3/model.onnx"),
        (bucket.uri("n.onnx"), "n.onnx"),
    ):
        with pytest.raises(NotFound, match=key) as refused:
            bucket.artifacts().fetch(uri)
        assert refused.value.reason == "ARTIFACT_MISSING"
    with pytest.raises(NotFound, match="nosuchbucket/x/manifest"):
        bucket.artifacts().fetch("s3://nosuchbucket/x")


def test_bytes_that_are_not_what_the_manifest_says(bucket: Bucket) -> None:
    digest, key = bucket.version(), "models/policy/3/model.onnx"
    body = bucket.s3.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    for changed, text in ((body[:-1] + b"\x00", "blake3"), (body + b"x", "has more than"), (body[:-5], "fewer bytes")):
        bucket.s3.put_object(Bucket=bucket.name, Key=key, Body=changed)
        with pytest.raises(InterlockError, match=text) as refused:
            bucket.artifacts().fetch(bucket.uri("models/policy/3"))
        assert refused.value.reason in ("DIGEST_MISMATCH", "ARTIFACT_UNREACHABLE")
        assert not (bucket.cache / digest.removeprefix("blake3:")).exists()
    bucket.s3.put_object(Bucket=bucket.name, Key=key, Body=body)
    assert artifacts.verify(bucket.artifacts().fetch(bucket.uri("models/policy/3"))).digest == digest, (
        "and what lies there from before does no harm"
    )
    with pytest.raises(FailedPrecondition, match="expected blake3:00") as other:
        bucket.artifacts().fetch(bucket.uri("models/policy/3"), "blake3:00")
    assert other.value.reason == "DIGEST_MISMATCH"


@pytest.mark.parametrize("body", [b"{}", b"\x80\x04", b'{"files": [{"path": "../x", "size_bytes": 1, "blake3": ""}]}'])
def test_a_manifest_that_is_none(bucket: Bucket, body: bytes) -> None:
    bucket.s3.put_object(Bucket=bucket.name, Key="v/manifest.json", Body=body)
    with pytest.raises(FailedPrecondition) as refused:
        bucket.artifacts().fetch(bucket.uri("v"))
    assert refused.value.reason == "INVALID_ARTIFACT"


def test_a_manifest_can_not_reach_other_keys_or_places(bucket: Bucket) -> None:
    files = (artifacts.FileEntry("../../outside.onnx", 1, "00"),)
    body = f'{{"format": 1, "digest": "{artifacts.Manifest(files).digest}", "files": [{{"path": "../../outside.onnx", "size_bytes": 1, "blake3": "00"}}]}}'
    bucket.s3.put_object(Bucket=bucket.name, Key="v/manifest.json", Body=body.encode())
    with pytest.raises(FailedPrecondition, match="inside the folder"):
        bucket.artifacts().fetch(bucket.uri("v"))
    assert bucket.left() == []


def test_a_fetch_goes_on_where_it_stopped(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 200)
    digest = bucket.version()
    asked: list[str] = []

    def after_some() -> None:
        asked.append("piece")
        if len(asked) == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        bucket.artifacts().fetch(bucket.uri("models/policy/3"), between=after_some)
    part = bucket.cache / f".part-{digest.removeprefix('blake3:')}"
    assert part.is_dir()
    assert not (bucket.cache / digest.removeprefix("blake3:")).exists(), (
        "never half of one where a whole one is looked for"
    )
    ranges: list[str] = []
    again = bucket.artifacts()
    client = again._s3()
    get = client.get_object
    monkeypatch.setattr(
        client, "get_object", lambda **asked_for: (ranges.append(asked_for.get("Range", "")), get(**asked_for))[1]
    )
    fetched = again.fetch(bucket.uri("models/policy/3"))
    assert artifacts.verify(fetched, digest)
    assert any(each.startswith("bytes=") for each in ranges)
    assert not part.exists()


def test_a_connection_that_is_cut_is_taken_up_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = bucket.version()
    fetcher = bucket.artifacts()
    client = fetcher._s3()
    get, cuts = client.get_object, []

    class Cut:
        """Gives half of what is left, then breaks."""

        def __init__(self, body: Any) -> None:
            self.data, self.given = body.read(), False

        def read(self, size: int) -> bytes:
            if self.given:
                raise ConnectionResetError("cut")
            self.given = True
            return self.data[: len(self.data) // 2]

        def close(self) -> None:
            pass

    def cutting(**asked: Any) -> Any:
        answer = get(**asked)
        if asked["Key"].endswith("model.onnx") and len(cuts) < 2:
            cuts.append(asked.get("Range", ""))
            answer["Body"] = Cut(answer["Body"])
        return answer

    monkeypatch.setattr(client, "get_object", cutting)
    assert artifacts.verify(fetcher.fetch(bucket.uri("models/policy/3")), digest)
    assert cuts[0] == ""
    assert cuts[1].startswith("bytes=")


def test_a_store_that_does_not_answer(bucket: Bucket) -> None:
    fetcher = RemoteArtifacts(bucket.cache, RemoteOptions("http://127.0.0.1:9", "us-east-1", timeout_seconds=0.2))
    with pytest.raises(Unavailable, match="manifest") as refused:
        fetcher.fetch(bucket.uri("models/policy/3"))
    assert refused.value.reason == "ARTIFACT_UNREACHABLE"
    assert refused.value.retry_after_seconds


def test_a_store_that_refuses(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    bucket.version()
    fetcher = bucket.artifacts()
    denied = ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")
    monkeypatch.setattr(fetcher._s3(), "get_object", lambda **_: (_ for _ in ()).throw(denied))
    with pytest.raises(FailedPrecondition, match="AccessDenied") as refused:
        fetcher.fetch(bucket.uri("models/policy/3"))
    assert refused.value.reason == "ARTIFACT_DENIED"
    for name in KEYS:
        if name != "AWS_EC2_METADATA_DISABLED":
            monkeypatch.delenv(name)
    with pytest.raises(FailedPrecondition, match="credential") as nobody:
        bucket.artifacts().fetch(bucket.uri("models/policy/3"))
    assert nobody.value.reason == "ARTIFACT_DENIED"


def test_the_cache_is_bounded_and_what_is_used_stays(bucket: Bucket) -> None:
    digests = [bucket.version(f"v/{n}", float(n)) for n in range(4)]
    one = sum(p.stat().st_size for p in (bucket.home / "local/v/0").rglob("*"))
    used: set[Path] = set()
    fetcher = RemoteArtifacts(
        bucket.cache, RemoteOptions(bucket.endpoint, "us-east-1", cache_bytes=int(2.5 * one)), lambda: used
    )
    used.add(fetcher.fetch(bucket.uri("v/0")))
    for n in (1, 2, 3):
        time.sleep(0.01)
        fetcher.fetch(bucket.uri(f"v/{n}"))
    assert set(bucket.left()) == {digests[n].removeprefix("blake3:") for n in (0, 3)}


def test_two_that_want_the_same_take_turns(bucket: Bucket) -> None:
    digest = bucket.version()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: bucket.artifacts().fetch(bucket.uri("models/policy/3")), range(8)))
    assert [p.name for p in found] == [digest.removeprefix("blake3:")]
    assert artifacts.verify(found.pop(), digest)


def test_a_cache_that_can_not_be_written(bucket: Bucket) -> None:
    bucket.version()
    bucket.cache.write_text("a file where the folder should be")
    with pytest.raises(ResourceExhausted) as refused:
        bucket.artifacts().fetch(bucket.uri("models/policy/3"))
    assert refused.value.reason == "REPOSITORY_UNWRITABLE"


def test_its_library_is_imported_with_the_first_fetch_only() -> None:
    code = "import interlock.stores.remote, interlock_inference.parts, sys; sys.exit('boto3' if 'boto3' in sys.modules else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
