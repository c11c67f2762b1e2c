"""Images over HTTP: real PNG and JPEG of scikit-learn's digits through /predict and /batch, the limits, and what bad uploads hear."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnx_models
from gateway_world import http_request, raw, world
from inline_world import inline, settings
from interlock.api.oip import messages
from interlock.errors import FailedPrecondition, InvalidArgument
from interlock.runtime.arrays import encode_raw
from interlock.stores import artifacts, modelspec
from interlock.stores.imagespec import PostprocessSpec, PreprocessSpec
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference import processing
from interlock_inference.engines import Signature

BEFORE = PreprocessSpec(size=(8, 8), color="L", scale=16 / 255, layout="NF")
BEHIND = PostprocessSpec(activation="softmax", labels=tuple("0123456789"), top_k=3)


class Digits:
    """A classifier of 8 x 8 digits, trained here, and the digits that it has not seen."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression

        x, y = load_digits(return_X_y=True)
        model = LogisticRegression(max_iter=300).fit(x[:1200], y[:1200])
        self.weights, self.bias = model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)
        self.pixels = x[1200:1400].astype(np.float32)
        self.truth = y[1200:1400]

    def onnx(self) -> bytes:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c]) for n, c in (("x", 64), ("y", 10))]
        weights = (numpy_helper.from_array(self.weights, "w"), numpy_helper.from_array(self.bias, "b"))
        return onnx_models.make(nodes, [info[0]], [info[1]], weights)

    def image(self, index: int) -> Image.Image:
        grey = np.round(self.pixels[index].reshape(8, 8) * 255 / 16).astype(np.uint8)
        return Image.fromarray(grey)

    def png(self, index: int) -> bytes:
        return encoded(self.image(index))


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(folder: Path, digits: Digits, before: PreprocessSpec | None = BEFORE, behind: PostprocessSpec | None = BEHIND) -> Path:  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(digits.onnx())
    tensors = ((TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
    modelspec.write_spec(folder, ModelSpec("digits", *tensors, preprocess=before, postprocess=behind))
    artifacts.write_manifest(folder)
    return folder


@pytest.fixture
def http(tmp_path: Path, digits: Digits) -> Iterator[Any]:
    """`async with http() as client`: the digits served in one process."""

    @asynccontextmanager
    async def serving(**gateway: Any) -> AsyncIterator[httpx.AsyncClient]:
        write(tmp_path / "models" / "digits" / "1", digits)
        async with inline(settings(tmp_path, gateway)) as (client, _):
            yield client

    return serving


def file(body: bytes, name: str = "digit.png", kind: str = "image/png") -> dict[str, tuple[str, bytes, str]]:
    return {"file": (name, body, kind)}


async def test_png_and_jpeg_of_digits_are_classified_as_their_pixels_are(http: Any, digits: Digits) -> None:
    """Accuracy through /predict and /batch equals the raw path's."""
    async with http() as client:
        rows = digits.pixels.tolist()
        outputs = (await client.post("/predict", json={"instances": rows})).json()["outputs"]["y"]
        tensors = np.argmax(outputs, axis=1)
        assert (tensors == digits.truth).mean() > 0.85
        for start in range(0, 200, 50):
            files = [("files", (f"{i}.png", digits.png(i), "image/png")) for i in range(start, start + 50)]
            answer = (await client.post("/batch", files=files)).json()
            assert (answer["num_ok"], answer["num_failed"]) == (50, 0)
            seen = [int(result["predictions"][0]["label"]) for result in answer["results"]]
            assert seen == tensors[start : start + 50].tolist()
        agree = 0
        for i in range(40):
            body = encoded(digits.image(i), "JPEG", quality=95)
            answer = (await client.post("/predict", files=file(body, "x.JPG", "image/jpeg"))).json()
            agree += int(answer["predictions"][0]["label"]) == tensors[i]
        assert agree >= 38
        assert (answer["model"], answer["version"], answer["file"], answer["epoch"]) == ("digits", "1", "x.JPG", 1)
        scores = [p["score"] for p in answer["predictions"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)


async def test_bare_images_webp_bmp_and_orientation(http: Any, digits: Digits) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = digits.image(7).transpose(Image.Transpose.ROTATE_90)
    variants = {
        "image/png": digits.png(7),
        "image/webp": encoded(digits.image(7), "WEBP", lossless=True),
        "image/bmp": encoded(digits.image(7), "BMP"),
        "image/jpeg": encoded(turned, "JPEG", quality=100, exif=exif.tobytes()),
    }
    async with http() as client:
        seen = {}
        for kind, body in variants.items():
            answer = await client.post("/predict", content=body, headers={"content-type": kind})
            assert answer.status_code == 200, answer.text
            seen[kind] = answer.json()["predictions"][0]["label"]
        assert len(set(seen.values())) == 1, seen
        form = await client.post("/predict", files=file(digits.png(7)), data={"model": "digits", "version": "1"})
        assert form.json()["predictions"][0]["label"] == seen["image/png"]
        assert form.headers["interlock-version"] == "models/digits/versions/1"


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def bad(digits: Digits) -> dict[str, tuple[dict[str, Any], int, str]]:
    """What is wrong: (the request, status, reason)."""
    png = digits.png(0)
    many = [("f", (f"{i}.png", png, "image/png")) for i in range(2)]
    return {
        "extension": ({"files": file(png, "x.gif")}, 415, "UNSUPPORTED_IMAGE"),
        "no extension": ({"files": file(png, "x")}, 415, "UNSUPPORTED_IMAGE"),
        "content type": ({"files": file(png, "x.png", "text/html")}, 415, "UNSUPPORTED_IMAGE"),
        "extension and type disagree": ({"files": file(png, "x.png", "image/jpeg")}, 415, "UNSUPPORTED_IMAGE"),
        "extension lies": ({"files": file(png, "x.jpg", "image/jpeg")}, 415, "UNSUPPORTED_IMAGE"),
        "bytes of nothing": ({"files": file(b"GIF89a....")}, 415, "UNSUPPORTED_IMAGE"),
        "a script": ({"files": file(b"<svg onload=alert(1)>")}, 415, "UNSUPPORTED_IMAGE"),
        "empty": ({"files": file(b"")}, 422, "INVALID_IMAGE"),
        "cut off": ({"files": file(png[:60])}, 422, "INVALID_IMAGE"),
        "a flipped byte": ({"files": file(png[:50] + bytes([png[50] ^ 255]) + png[51:])}, 422, "INVALID_IMAGE"),
        "a bomb": ({"files": file(bomb())}, 413, "IMAGE_TOO_LARGE"),
        "too large a file": ({"files": file(png + bytes(1 << 20))}, 413, "IMAGE_TOO_LARGE"),
        "too large a body": ({"files": file(png + bytes(3 << 20))}, 413, "BODY_TOO_LARGE"),
        "two files": ({"files": many}, 413, "TOO_MANY_FILES"),
        "no file": ({"files": {"model": (None, b"digits")}}, 400, "INVALID_REQUEST"),
        "unknown field": ({"files": file(png), "data": {"colour": "1"}}, 400, "INVALID_REQUEST"),
        "another form": ({"content": b"x", "headers": {"content-type": "multipart/mixed; boundary=b"}}, 415, "UNSUPPORTED_IMAGE"),
        "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 415, "UNSUPPORTED_IMAGE"),
        "not the form it says": ({"content": b"hello", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "INVALID_REQUEST"),
        "a form cut off": ({"content": b'--b\r\ncontent-disposition: form-data; name="f"; filename="a.png"\r\n\r\nabc', "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "INVALID_REQUEST"),
        "unknown model": ({"files": file(png), "data": {"model": "nobody"}}, 404, "MODEL_NOT_FOUND"),
    }  # fmt: skip


async def test_bad_uploads_hear_what_is_wrong_and_serving_goes_on(http: Any, digits: Digits) -> None:
    async with http(max_upload_mb=1, max_body_mb=2) as client:
        for name, (request, status, reason) in bad(digits).items():
            answer = await client.post("/predict", **request)
            problem = answer.json()
            assert (answer.status_code, problem["reason"]) == (status, reason), f"{name}: {problem}"
            assert problem["detail"]
            assert problem.get("field") or reason == "MODEL_NOT_FOUND", name
        assert (await client.post("/predict", files=file(digits.png(0)))).status_code == 200


async def test_a_batch_answers_each_file_by_itself(http: Any, digits: Digits) -> None:
    good = digits.png(3)
    files = [
        ("f", ("a.png", good, "image/png")),
        ("f", ("b.gif", good, "image/gif")),
        ("f", ("c.png", good[:60], "image/png")),
        ("f", ("d.png", bomb(), "image/png")),
        ("f", ("e.png", good, "application/octet-stream")),
    ]
    async with http(max_batch_files=5) as client:
        answer = await client.post("/batch", files=files)
        assert answer.status_code == 200
        body = answer.json()
        assert (body["num_ok"], body["num_failed"], body["version"]) == (2, 3, "1")
        a, b, c, d, e = body["results"]
        assert [r["file"] for r in body["results"]] == ["a.png", "b.gif", "c.png", "d.png", "e.png"]
        assert a["predictions"] == e["predictions"]
        assert [r["error"]["status"] for r in (b, c, d)] == [415, 422, 413]
        none = (await client.post("/batch", files=files[1:4])).json()
        assert (none["num_ok"], none["num_failed"]) == (0, 3)
        many = await client.post("/batch", files=[*files, files[0]])
        assert (many.status_code, many.json()["reason"]) == (413, "TOO_MANY_FILES")
        wrong = await client.post("/batch", json={"instances": []})
        assert (wrong.status_code, wrong.json()["reason"]) == (415, "UNSUPPORTED_IMAGE")


async def test_an_upload_that_does_not_come_in_is_given_up(tmp_path: Path, digits: Digits) -> None:
    write(tmp_path / "models" / "digits" / "1", digits)
    config = settings(tmp_path, {"receive_timeout_seconds": 0.2})
    async with inline(config) as (_, port):
        head = http_request(bytes(100), b"content-type: multipart/form-data; boundary=b", path=b"/batch")[:-60]
        assert (await raw(port, head)).startswith(b"HTTP/1.1 408")


async def test_images_and_labels_by_the_protocol_itself_through_the_hop(tmp_path: Path, digits: Digits) -> None:
    """Any client may send encoded images as the BYTES input `image`, and ask for `labels` and `scores` of tensors."""
    async with world(tmp_path) as w:
        folder = write(tmp_path / "models" / "digits" / "1", digits)
        await w.replica.prepare("1", str(folder), model="digits")
        from interlock.api.inference.v1 import runtime_service_pb2 as pb

        await w.replica.command("Warm", pb.WarmRequest(fence=w.replica.fence, version="models/digits/versions/1"))
        await w.replica.route(1, "1", model="digits")
        images = np.array([digits.png(0), digits.png(1)], dtype=object)
        request = messages.ModelInferRequest(model_name="digits", raw_input_contents=[encode_raw(images, "BYTES")])
        request.inputs.add(name="image", datatype="BYTES", shape=[2])
        answer = await w.replica.oip.ModelInfer(request)
        assert [o.name for o in answer.outputs] == ["labels", "scores"]
        assert [list(o.shape) for o in answer.outputs] == [[2, 3], [2, 3]]
        asked = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": digits.pixels[0].tolist()}],
            "outputs": [{"name": "labels"}, {"name": "y"}],
        }
        outputs = (await w.http.post("/v2/models/digits/infer", json=asked)).json()["outputs"]
        assert outputs[0]["data"][0] == str(np.argmax(outputs[1]["data"]))
        upload = await w.http.post("/predict", files=file(digits.png(0)), data={"model": "digits"})
        assert upload.json()["predictions"][0]["label"] == outputs[0]["data"][0]
        refused = await w.http.post("/predict", files=file(digits.png(0)), data={"model": "policy"})
        assert (refused.status_code, refused.json()["reason"]) == (415, "NO_IMAGES")


def signature(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Signature:
    return Signature(inputs, outputs, {})


SIGNATURES = {
    "NCHW": signature((TensorSpec("x", "FP32", (-1, 3, 4, 6)),), (TensorSpec("y", "FP32", (-1, 10)),)),
    "NHWC": signature((TensorSpec("x", "UINT8", (-1, -1, -1, 3)),), (TensorSpec("y", "FP32", (-1, 10)),)),
    "NHW": signature((TensorSpec("x", "FP32", (-1, 4, 6)),), (TensorSpec("y", "FP32", (-1, 10)),)),
    "two": signature(
        (TensorSpec("a", "FP32", (-1, 3, 4, 6)), TensorSpec("b", "FP32", (-1, 2))),
        (TensorSpec("labels", "FP32", (-1,)),),
    ),
    "text": signature((TensorSpec("x", "BYTES", (-1,)),), (TensorSpec("y", "INT64", (-1, 10)),)),
}
WRONG: list[tuple[str, PreprocessSpec | None, PostprocessSpec | None, str]] = [
    # the signature, [preprocess], [postprocess], the key at fault
    ("two", PreprocessSpec(), None, "preprocess.input"),
    ("NCHW", PreprocessSpec(input="z"), None, "preprocess.input"),
    ("text", PreprocessSpec(), None, "preprocess.input"),
    ("NCHW", PreprocessSpec(layout="NHW", color="L"), None, "preprocess.layout"),
    ("NHW", PreprocessSpec(layout="NHW"), None, "preprocess.layout"),
    ("NCHW", PreprocessSpec(size=(4, 4)), None, "preprocess.size"),
    ("NCHW", PreprocessSpec(color="L"), None, "preprocess.size"),
    ("NHWC", PreprocessSpec(layout="NHWC", scale=1), None, "preprocess.size"),
    ("NHWC", PreprocessSpec(layout="NHWC", size=(2, 2)), None, "preprocess.scale"),
    ("NCHW", PreprocessSpec(mean=(1.0, 2.0, 3.0), std=(1.0,), color="L"), None, "preprocess.mean"),
    ("NCHW", None, PostprocessSpec(output="z"), "postprocess.output"),
    ("text", None, PostprocessSpec(), "postprocess.output"),
    ("two", None, PostprocessSpec(), "postprocess"),
    ("NCHW", None, PostprocessSpec(labels=("a", "b")), "postprocess.labels"),
    ("NCHW", None, PostprocessSpec(top_k=11), "postprocess.top_k"),
    ("NCHW", None, PostprocessSpec(labels_file="../../etc/passwd"), "postprocess.labels_file"),
    ("NCHW", None, PostprocessSpec(labels_file="absent.txt"), "postprocess.labels_file"),
    ("NCHW", None, PostprocessSpec(labels_file="a", labels=("b",)), "postprocess.labels_file"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0]}-{case[3]}")
def test_processing_that_does_not_fit_the_signature_is_refused_by_key(tmp_path: Path, case: Any) -> None:
    which, before, behind, key = case
    spec = ModelSpec("m", (), (), preprocess=before, postprocess=behind)
    with pytest.raises(FailedPrecondition) as refused:
        processing.build(tmp_path, spec, SIGNATURES[which])
    assert refused.value.field == key
    assert key in refused.value.message


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"preprocess": {"resize": "squeeze"}}, "preprocess.resize"),
        ({"preprocess": {"size": [0, 8]}}, "preprocess.size"),
        ({"preprocess": {"std": [0.0]}}, "preprocess.std"),
        ({"preprocess": {"scale": float("nan")}}, "preprocess.scale"),
        ({"preprocess": {"colour": "L"}}, "preprocess.colour"),
        ({"postprocess": {"top_k": 0}}, "postprocess.top_k"),
        ({"postprocess": {"labels": [1]}}, "postprocess.labels"),
        ({"postprocess": []}, "postprocess"),
    ],
)
def test_a_table_with_a_mistake_names_the_key(table: dict[str, Any], key: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    with pytest.raises(InvalidArgument) as refused:
        modelspec.parse_spec({"name": "m", "inputs": [tensor], "outputs": [tensor], **table})
    assert refused.value.field == key


def test_the_spec_survives_its_file(tmp_path: Path) -> None:
    tensors = ((TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
    spec = ModelSpec("m", *tensors, preprocess=BEFORE, postprocess=PostprocessSpec(labels_file="l.txt", top_k=2))
    modelspec.write_spec(tmp_path, spec)
    assert modelspec.read_spec(tmp_path) == spec


def pixels(spec: PreprocessSpec, which: str, image: Image.Image) -> Any:
    made = processing.build(Path(), ModelSpec("m", (), (), preprocess=spec), SIGNATURES[which])
    assert made is not None
    assert made.before is not None
    return made.before.array([encoded(image)])


def test_layouts_resizes_and_normalisation_are_what_they_say() -> None:
    red = Image.new("RGB", (12, 8), (255, 0, 0))
    array = pixels(PreprocessSpec(mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 1.0)), "NCHW", red)
    assert array.shape == (1, 3, 4, 6)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[0, :, 0, 0], [1.0, 0.0, 0.0])
    raw_pixels = pixels(PreprocessSpec(layout="NHWC", size=(2, 3), scale=1), "NHWC", red)
    assert raw_pixels.dtype == np.uint8
    assert raw_pixels[0, 0, 0].tolist() == [255, 0, 0]
    square = Image.new("L", (6, 6), 255)
    fitted = pixels(PreprocessSpec(layout="NHW", color="L", resize="fit"), "NHW", square)
    assert fitted[0, :, 0].tolist() == [0.0] * 4, "the edges are black"
    assert fitted[0, :, 3].tolist() == [1.0] * 4
    assert pixels(PreprocessSpec(layout="NHW", color="L", resize="cover"), "NHW", square).min() == 1.0
    with pytest.raises(InvalidArgument, match=r"6 x 6 pixels, the model takes 6 x 4"):
        pixels(PreprocessSpec(layout="NHW", color="L", resize="none"), "NHW", square)
    deep = Image.fromarray(np.full((4, 6), 0xFFFF, np.uint16))
    assert pixels(PreprocessSpec(layout="NHW", color="L"), "NHW", deep).min() == 1.0, "16 bits a pixel"
    clear = Image.new("RGBA", (6, 4), (10, 20, 30, 0))
    assert pixels(PreprocessSpec(scale=1), "NCHW", clear)[0, :, 0, 0].tolist() == [10, 20, 30]
