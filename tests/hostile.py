"""Hostile artifacts: pickles in every disguise, files that point elsewhere, files that lie about themselves. Each maker writes one artifact.

`ARTIFACTS` is name -> maker(place, canary). A maker returns the path to open. Where its bytes can run code at all, that code creates the canary
file. Folders get a manifest that is right about their bytes, so that it is not the digest which refuses them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import onnx_models
from interlock.stores import artifacts

Maker = Callable[[Path, Path], Path]
ARTIFACTS: dict[str, Maker] = {}
TENSORS = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 4]
"""


def touch(canary: Path) -> str:
    """Python source that leaves the mark."""
    return f"open({str(canary)!r}, 'w').close()"


class Runs:
    """Unpickles by running something."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def payload(canary: Path, protocol: int = 4) -> bytes:
    return pickle.dumps(Runs(exec, touch(canary)), protocol)


def artifact(name: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        assert name not in ARTIFACTS
        ARTIFACTS[name] = maker
        return maker

    return register


def folder(place: Path, files: dict[str, bytes], spec: str = "", *, manifest: bool = True) -> Path:
    """A version folder whose manifest tells the truth about it."""
    place.mkdir(parents=True)
    if spec:
        files = {**files, "model.toml": spec.encode()}
    for name, body in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(body)
    if manifest:
        artifacts.write_manifest(place)
    return place


def good() -> bytes:
    return onnx_models.constant(1.0)


def safetensors(table: Any, data: bytes = b"") -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + data


TORCH_SPEC = 'name = "m"\nengine = "torch"\nmodule = "{module}"\n' + TENSORS
ONNX_SPEC = 'name = "m"\n' + TENSORS


# --- pickles, and what leads to them ---

for _protocol in range(6):

    def _raw(place: Path, canary: Path, protocol: int = _protocol) -> Path:
        return folder(place, {"model.onnx": payload(canary, protocol)})

    artifact(f"pickle-protocol-{_protocol}-as-model.onnx")(_raw)

_CALLS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda canary: pickle.dumps(Runs(os.system, f"touch {canary}")),
    "eval": lambda canary: pickle.dumps(Runs(eval, f"exec({touch(canary)!r})")),
    "global-opcode": lambda canary: b"c__builtin__\nexec\n(V" + touch(canary).encode() + b"\ntR.",
    "inst-opcode": lambda canary: b"(V" + touch(canary).encode() + b"\ni__builtin__\nexec\n.",
    "obj-opcode": lambda canary: b"(c__builtin__\nexec\nV" + touch(canary).encode() + b"\no.",
    "runpy": lambda canary: b"cos\nsystem\n(Vtouch " + str(canary).encode() + b"\ntR.",
    "behind-a-list": lambda canary: pickle.dumps([1, {"w": [Runs(exec, touch(canary))]}]),
}
for _name, _body in _CALLS.items():

    def _call(place: Path, canary: Path, body: Callable[[Path], bytes] = _body) -> Path:
        return folder(place, {"model.onnx": body(canary)})

    artifact(f"pickle-{_name}")(_call)

for _suffix in ("pt", "pth", "bin", "pkl", "pickle", "joblib", "ckpt", "dill", "onnx"):

    def _bare(place: Path, canary: Path, suffix: str = _suffix) -> Path:
        place.mkdir(parents=True)
        (place / f"model.{suffix}").write_bytes(payload(canary))
        return place / f"model.{suffix}"

    artifact(f"bare-pickle.{_suffix}")(_bare)

_PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "joblib-zlib": lambda b: b"ZF" + gzip.compress(b),
}  # fmt: skip
for _name, _pack in _PACKED.items():

    def _packed(place: Path, canary: Path, pack: Callable[[bytes], bytes] = _pack) -> Path:
        return folder(place, {"model.onnx": pack(payload(canary))})

    artifact(f"packed-pickle-{_name}")(_packed)


def zipped(files: dict[str, bytes], *, stored: bool = True) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return out.getvalue()


def torch_zip(canary: Path) -> bytes:
    return zipped({"archive/data.pkl": payload(canary, 2), "archive/version": b"3\n", "archive/data/0": b"\0" * 16})


@artifact("torch-zip-as-model.onnx")
def _torch_zip(place: Path, canary: Path) -> Path:
    return folder(place, {"model.onnx": torch_zip(canary)})


@artifact("torch-zip-as-model.safetensors")
def _torch_zip_weights(place: Path, canary: Path) -> Path:
    return folder(place, {"model.safetensors": torch_zip(canary)}, TORCH_SPEC.format(module="torch_models:Constant"))


@artifact("torch-zip-bare.pt")
def _torch_zip_bare(place: Path, canary: Path) -> Path:
    place.mkdir(parents=True)
    (place / "model.pt").write_bytes(torch_zip(canary))
    return place / "model.pt"


@artifact("torch-legacy-tar")
def _torch_tar(place: Path, canary: Path) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages"):
            body = payload(canary, 2)
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return folder(place, {"model.onnx": out.getvalue()})


@artifact("torchscript-zip")
def _torchscript(place: Path, canary: Path) -> Path:
    code = b"class Net(Module):\n  def forward(self, x): return ops.aten.system(x)\n"
    body = zipped(
        {"net/code/__torch__.py": code, "net/data.pkl": payload(canary, 2), "net/constants.pkl": payload(canary, 2)}
    )
    return folder(place, {"model.onnx": body, "model.pt": body})


@artifact("exported-program.pt2")
def _pt2(place: Path, canary: Path) -> Path:
    body = zipped(
        {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": torch_zip(canary), "version": b"8.0"}
    )
    return folder(place, {"model.pt2": body}, 'name = "m"\nfile = "model.pt2"\n' + TENSORS)


@artifact("pt2-as-torch-weights")
def _pt2_weights(place: Path, canary: Path) -> Path:
    body = zipped({"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": torch_zip(canary)})
    return folder(
        place,
        {"w.pt2": body},
        TORCH_SPEC.format(module="torch_models:Constant").replace("engine", 'file = "w.pt2"\nengine', 1),
    )


@artifact("keras-v3-lambda.keras")
def _keras(place: Path, canary: Path) -> Path:
    layer = {
        "class_name": "Lambda",
        "config": {"function": {"class_name": "__lambda__", "config": {"code": touch(canary)}}},
    }
    return folder(
        place,
        {"model.onnx": zipped({"config.json": json.dumps(layer).encode(), "model.weights.h5": b"\x89HDF\r\n\x1a\n"})},
    )


@artifact("keras-h5-lambda")
def _h5(place: Path, canary: Path) -> Path:
    return folder(place, {"model.onnx": b"\x89HDF\r\n\x1a\n" + b"\0" * 64 + payload(canary)})


@artifact("npy-object-array-as-model")
def _npy(place: Path, canary: Path) -> Path:
    out = io.BytesIO()
    np.save(out, np.array([Runs(exec, touch(canary))], dtype=object), allow_pickle=True)
    return folder(place, {"model.onnx": out.getvalue()})


def golden(place: Path, body: bytes) -> Path:
    return folder(place, {"model.onnx": good(), "golden.npz": body}, ONNX_SPEC)


@artifact("golden-object-array")
def _golden(place: Path, canary: Path) -> Path:
    out = io.BytesIO()
    np.savez(out, **{"a/x": np.array([Runs(exec, touch(canary))], dtype=object)})
    return golden(place, out.getvalue())


@artifact("golden-is-a-pickle")
def _golden_pickle(place: Path, canary: Path) -> Path:
    return golden(place, payload(canary))


@artifact("golden-holds-a-pickle")
def _golden_member(place: Path, canary: Path) -> Path:
    return golden(place, zipped({"a/x.npy": payload(canary)}))


@artifact("golden-header-is-code")
def _golden_header(place: Path, canary: Path) -> Path:
    header = f"__import__('os').system('touch {canary}')".ljust(118).encode() + b"\n"
    return golden(place, zipped({"a/x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header}))


@artifact("golden-zip-bomb")
def _golden_bomb(place: Path, canary: Path) -> Path:
    return golden(place, zipped({"a/x.npy": b"\0" * (80 << 20)}, stored=False))


@artifact("golden-shape-of-terabytes")
def _golden_terabytes(place: Path, canary: Path) -> Path:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    return golden(place, zipped({"a/x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header}))


@artifact("onnx-then-pickle")
def _polyglot(place: Path, canary: Path) -> Path:
    return folder(place, {"model.onnx": good() + payload(canary)})


@artifact("safetensors-then-pickle")
def _polyglot_weights(place: Path, canary: Path) -> Path:
    body = safetensors({"value": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4)
    return folder(
        place, {"model.safetensors": body + payload(canary)}, TORCH_SPEC.format(module="torch_models:Constant")
    )


@artifact("safetensors-metadata-pickle")
def _metadata(place: Path, canary: Path) -> Path:
    table = {
        "__metadata__": {"p": [payload(canary).hex()]},
        "value": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    return folder(
        place, {"model.safetensors": safetensors(table, b"\0" * 4)}, TORCH_SPEC.format(module="torch_models:Constant")
    )


@artifact("python-files-beside")
def _beside(place: Path, canary: Path) -> Path:
    code = touch(canary).encode()
    return folder(
        place,
        {"model.onnx": b"import torch", **dict.fromkeys(("sitecustomize.py", "torch.py", "conftest.py"), code)},
        ONNX_SPEC,
    )


# --- model.toml ---

for _module in (
    "os:system", "subprocess:Popen", "builtins:exec", "__main__:exec", "torch:load", "torch.hub:load", "pickle:loads",
    "torch_models:torch", "torch_models:constant", "torch_models:save_file", "canary_module:Net",
):  # fmt: skip

    def _inject(place: Path, canary: Path, module: str = _module) -> Path:
        spec = TORCH_SPEC.format(module=module) + f"[module_args]\ncommand = {json.dumps(f'touch {canary}')}\n"
        made = folder(place, {"model.safetensors": safetensors({}), "canary_module.py": touch(canary).encode()}, spec)
        (place.parent / "canary_module.py").write_text(touch(canary))
        return made

    artifact(f"module-{_module}")(_inject)

_SPECS: dict[str, str] = {
    "module-is-a-path": TORCH_SPEC.format(module="../../evil.py:Net"),
    "module-is-an-expression": TORCH_SPEC.format(module="__import__('os').system('true')"),
    "module-for-onnx": ONNX_SPEC.replace('"m"', '"m"\nmodule = "os:system"', 1),
    "engine-pickle": ONNX_SPEC.replace('"m"', '"m"\nengine = "pickle"', 1),
    "engine-python": ONNX_SPEC.replace('"m"', '"m"\nengine = "python"', 1),
    "unknown-key": ONNX_SPEC.replace('"m"', '"m"\npickle = "model.pkl"', 1),
    "file-outside": ONNX_SPEC.replace('"m"', '"m"\nfile = "../model.onnx"', 1),
    "file-absolute": ONNX_SPEC.replace('"m"', '"m"\nfile = "/etc/passwd"', 1),
    "file-backslash": ONNX_SPEC.replace('"m"', '"m"\nfile = "..\\\\\\\\model.onnx"', 1),
    "file-not-listed": ONNX_SPEC.replace('"m"', '"m"\nfile = "other.onnx"', 1),
    "yaml": "!!python/object/apply:os.system ['true']",
    "deep": "a = " + "[" * 100_000,
    "huge-number": ONNX_SPEC.replace("-1, 4", "-1, " + "9" * 5000),
    "overflowing-shape": ONNX_SPEC.replace("-1, 4", "-1, 9223372036854775808"),
    "negative-shape": ONNX_SPEC.replace("-1, 4", "-1, -4"),
    "provider-loads-a-library": ONNX_SPEC
    + "[engine_options.provider_options.TensorrtExecutionProvider]\ntrt_extra_plugin_lib_paths = 'evil.so'\n",
    "provider-writes-a-file": ONNX_SPEC
    + "[engine_options.provider_options.CUDAExecutionProvider]\nep_context_file_path = '/tmp/x'\n",
    "not-utf8": "name = '\udcff'",
    "too-large": "# " + "x" * (2 << 20),
}
for _name, _text in _SPECS.items():

    def _spec(place: Path, canary: Path, text: str = _text) -> Path:
        files = {
            "model.onnx": good(),
            "model.safetensors": safetensors({}),
            "model.toml": text.encode(errors="surrogateescape"),
        }
        return folder(place, files)

    artifact(f"model.toml-{_name}")(_spec)


# --- the manifest ---


def manifest(place: Path, change: Callable[[dict[str, Any]], Any], files: dict[str, bytes] | None = None) -> Path:
    folder(place, files or {"model.onnx": good()})
    path = place / artifacts.MANIFEST_FILE
    body = json.loads(path.read_text())
    changed = change(body)
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(body).encode())
    return place


def _listing(path: str) -> Callable[[dict[str, Any]], None]:
    """The manifest lists `path`, with the digest right for it."""

    def change(body: dict[str, Any]) -> None:
        body["files"][0]["path"] = path
        body["digest"] = _digest(body["files"])

    return change


def _digest(files: list[dict[str, Any]]) -> str:
    return artifacts.Manifest(tuple(artifacts.FileEntry(f["path"], f["size_bytes"], f["blake3"]) for f in files)).digest


_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parent": _listing("../model.onnx"),
    "absolute": _listing("/etc/passwd"),
    "inner-parent": _listing("a/../../model.onnx"),
    "backslash": _listing("..\\model.onnx"),
    "nul": _listing("model.onnx\0.txt"),
    "newline": _listing("model.onnx\nx"),
    "empty-path": _listing(""),
    "dot-path": _listing("."),
    "folder-as-file": _listing("sub"),
    "twice": lambda body: body.update(files=body["files"] * 2, digest=_digest(body["files"] * 2)),
    "infinite-size": lambda body: json.dumps(body).replace(str(body["files"][0]["size_bytes"]), "1e999", 1).encode(),
    "deep": lambda body: b'{"format":' + b"[" * 200_000,
    "number": lambda body: b"7",
    "pickle": lambda body: pickle.dumps(Runs(exec, "1")),
    "wrong-digest": lambda body: body.update(digest="blake3:" + "0" * 64),
    "format-2": lambda body: body.update(format=2),
}
for _name, _change in _MANIFESTS.items():

    def _manifest(place: Path, canary: Path, change: Callable[[dict[str, Any]], Any] = _change) -> Path:
        return manifest(place, change)

    artifact(f"manifest-{_name}")(_manifest)


@artifact("manifest-is-a-pipe")
def _pipe(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": good()}, manifest=False)
    os.mkfifo(place / artifacts.MANIFEST_FILE)
    return place


@artifact("model-is-a-pipe")
def _model_pipe(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": good()})
    (place / "model.onnx").unlink()
    os.mkfifo(place / "model.onnx")
    return place


@artifact("model-is-a-link")
def _model_link(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": good()})
    (place / "model.onnx").rename(place.parent / "elsewhere.onnx")
    (place / "model.onnx").symlink_to(place.parent / "elsewhere.onnx")
    return place


@artifact("folder-of-the-model-is-a-link")
def _folder_link(place: Path, canary: Path) -> Path:
    folder(place, {"sub/model.onnx": good()}, 'name = "m"\nfile = "sub/model.onnx"\n' + TENSORS)
    (place / "sub").rename(place.parent / "elsewhere")
    (place / "sub").symlink_to(place.parent / "elsewhere")
    return place


@artifact("a-file-nobody-vouched-for")
def _unlisted(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": good()})
    (place / "model.toml").write_text(ONNX_SPEC)
    return place


@artifact("a-link-nobody-vouched-for")
def _unlisted_link(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": good()})
    (place / "weights.bin").symlink_to("/etc/passwd")
    return place


# --- ONNX ---


def external(location: str, **more: str) -> bytes:
    """A graph whose weight [4, 4] lies at `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "64", **more}.items():
        weight.external_data.add(key=key, value=value)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    return onnx_models.make([helper.make_node("MatMul", ["x", "w"], ["y"])], [info[0]], [info[1]], (weight,))


_LOCATIONS = {
    "parent": "../secret.bin", "absolute": "/etc/passwd", "proc": "/proc/self/environ", "inner-parent": "a/../../secret.bin",
    "backslash": "..\\secret.bin", "missing": "missing.bin", "memory-address": "*/_ORT_MEM_ADDR_/*", "url": "http://127.0.0.1/w",
    "empty": "", "not-listed": "secret.bin", "library": "evil.so",
}  # fmt: skip
for _name, _location in _LOCATIONS.items():

    def _external(place: Path, canary: Path, location: str = _location) -> Path:
        made = folder(place, {"model.onnx": external(location)})
        (place.parent / "secret.bin").write_bytes(b"\0" * 64)
        return made

    artifact(f"external-data-{_name}")(_external)


@artifact("external-data-of-a-bare-file")
def _external_bare(place: Path, canary: Path) -> Path:
    place.mkdir(parents=True)
    (place / "weights.bin").write_bytes(b"\0" * 64)
    (place / "model.onnx").write_bytes(external("weights.bin"))
    return place / "model.onnx"


@artifact("external-data-linked-out")
def _external_link(place: Path, canary: Path) -> Path:
    folder(place, {"model.onnx": external("weights.bin"), "weights.bin": b"\0" * 64})
    (place / "weights.bin").unlink()
    (place / "weights.bin").symlink_to("/etc/passwd")
    return place


@artifact("external-data-beyond-its-end")
def _external_short(place: Path, canary: Path) -> Path:
    return folder(
        place, {"model.onnx": external("weights.bin", offset="18446744073709551600"), "weights.bin": b"\0" * 64}
    )


@artifact("external-data-in-a-subgraph")
def _external_deep(place: Path, canary: Path) -> Path:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=_external_tensor("/etc/passwd"))], "i", [], [
        helper.make_tensor_value_info("c", TensorProto.FLOAT, [4, 4])])  # fmt: skip
    node = helper.make_node("If", ["b"], ["c1"], then_branch=inner, else_branch=inner)
    info = [
        helper.make_tensor_value_info("b", TensorProto.BOOL, []),
        helper.make_tensor_value_info("c1", TensorProto.FLOAT, [4, 4]),
    ]
    return folder(place, {"model.onnx": onnx_models.make([node], [info[0]], [info[1]])})


def _external_tensor(location: str) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    return made


def graph(nodes: list[Any], *weights: Any, shape: Any = ("n", 4)) -> bytes:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in ("x", "y")]
    return onnx_models.make(nodes, [info[0]], [info[1]], weights)


def _bad_initializer(dims: list[int], raw: bytes = b"\0" * 16, kind: int = TensorProto.FLOAT) -> TensorProto:
    made = TensorProto(name="w", data_type=kind, raw_data=raw)
    made.dims.extend(dims)
    return made


def _nested(depth: int) -> bytes:
    """Fields inside fields, deeper than any parser should follow."""
    body = b""
    for _ in range(depth):
        body = b"\x32" + _varint(len(body)) + body  # AttributeProto.g
        body = b"\x2a" + _varint(len(body)) + body  # NodeProto.attribute
        body = b"\x0a" + _varint(len(body)) + body  # GraphProto.node
    return b"\x08\x08" + b"\x3a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


_ADD_W = [helper.make_node("Add", ["x", "w"], ["y"])]
_GRAPHS: dict[str, Callable[[], bytes]] = {
    "custom-domain": lambda: graph([helper.make_node("Run", ["x"], ["y"], domain="evil.so")]),
    "python-operator": lambda: graph([helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib", code="1")]),
    "engine-context": lambda: graph([
        helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../evil.so", embed_mode=0)]),
    "unknown-operator": lambda: graph([helper.make_node("SystemCall", ["x"], ["y"])]),
    "negative-dims": lambda: graph(_ADD_W, _bad_initializer([-4])),
    "overflowing-dims": lambda: graph(_ADD_W, _bad_initializer([1 << 40, 1 << 40])),
    "dims-that-wrap-to-their-bytes": lambda: graph(_ADD_W, _bad_initializer([1 << 62, 4, 4])),
    "dims-larger-than-data": lambda: graph(_ADD_W, _bad_initializer([1000])),
    "data-larger-than-dims": lambda: graph(_ADD_W, _bad_initializer([1])),
    "unknown-type": lambda: graph(_ADD_W, _bad_initializer([4], kind=99)),
    "two-outputs-of-one-name": lambda: graph([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])]),
    "cycle": lambda: graph([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["y"])]),
    "fold-petabytes": lambda: graph(
        [helper.make_node("ConstantOfShape", ["w"], ["c"]), helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0), helper.make_node("Add", ["x", "s"], ["y"])],
        numpy_helper.from_array(np.array([1 << 50]), "w")),
    "nested-too-deep": lambda: _nested(5000),
    "length-beyond-the-end": lambda: good()[:2] + b"\x3a\xff\xff\xff\xff\x7f",
    "endless-number": lambda: b"\x08" + b"\xff" * 64,
    "group-wire-type": lambda: good() + b"\x0b" * 32,
    "empty": lambda: b"",
    "text": lambda: b"#!/bin/sh\ntrue\n",
    "ort-format": lambda: b"\x18\0\0\0ORTM" + b"\xff" * 256,
    "elf": lambda: b"\x7fELF\x02\x01\x01" + b"\0" * 128,
}  # fmt: skip
for _name, _make in _GRAPHS.items():

    def _graph(place: Path, canary: Path, make: Callable[[], bytes] = _make) -> Path:
        return folder(place, {"model.onnx": make()})

    artifact(f"onnx-{_name}")(_graph)


# --- safetensors ---

_F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\0" * 7,
    "length-beyond-the-end": struct.pack("<Q", 1 << 40) + b"{}",
    "length-negative": struct.pack("<q", -1) + b"{}",
    "length-over-the-limit": struct.pack("<Q", 200_000_000) + b"{}",
    "not-json": safetensors(b"\x80\x04\x95junk"),
    "not-utf8": safetensors(b'{"\xff": 1}'),
    "a-list": safetensors([]),
    "deep": safetensors(b'{"a":' + b"[" * 100_000),
    "twice": safetensors(b'{"value":' + json.dumps(_F32).encode() + b',"value":' + json.dumps(_F32).encode() + b"}", b"\0" * 4),
    "overlap": safetensors({"value": _F32, "w": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}, b"\0" * 6),
    "same-place": safetensors({"value": _F32, "w": _F32}, b"\0" * 4),
    "hole": safetensors({"value": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "trailing-bytes": safetensors({"value": _F32}, b"\0" * 5),
    "beyond-the-end": safetensors({"value": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "backwards": safetensors({"value": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
    "negative-offset": safetensors({"value": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"\0" * 4),
    "negative-shape": safetensors({"value": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "shape-overflow": safetensors({"value": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
    "shape-of-booleans": safetensors({"value": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4),
    "offset-overflow": safetensors({"value": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 64, (1 << 64) + 4]}}, b"\0" * 4),
    "dtype-lies": safetensors({"value": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "dtype-unknown": safetensors({"value": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "surplus-key": safetensors({"value": {**_F32, "code": "x"}}, b"\0" * 4),
    "wrong-name": safetensors({"other": _F32}, b"\0" * 4),
    "wrong-shape": safetensors({"value": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
}  # fmt: skip
for _name, _bytes in _WEIGHTS.items():

    def _weights(place: Path, canary: Path, body: bytes = _bytes) -> Path:
        return folder(place, {"model.safetensors": body}, TORCH_SPEC.format(module="torch_models:Constant"))

    artifact(f"safetensors-{_name}")(_weights)


SAMPLE = (
    "pickle-protocol-4-as-model.onnx", "torch-zip-as-model.safetensors", "golden-object-array", "module-os:system", "manifest-parent",
    "external-data-memory-address", "onnx-custom-domain", "onnx-fold-petabytes", "onnx-nested-too-deep", "model.toml-deep",
)  # fmt: skip
"""Those that a real replica is given too."""


def main(root: Path, canary: Path) -> None:
    """Opens everything, as a replica's loader would, in this process; one line of JSON each."""
    from interlock.errors import InterlockError
    from interlock.stores import golden as golden_sets
    from interlock_inference import audit, repository
    from interlock_inference.engines import EngineOptions, made_up_inputs
    from interlock_inference.engines import torch as _imported_before_the_watch  # noqa: F401

    audit.install()
    ran: list[str] = []
    sys.addaudithook(lambda event, args: ran.append(event) if event in WATCHED else None)
    options = EngineOptions(torch_modules=("torch_models",))
    for name, maker in ARTIFACTS.items():
        print(json.dumps({"name": name}), flush=True)  # if it ends the process, this says which
        path = maker(root / name.replace("/", "_") / "v", canary)
        ran.clear()
        said: dict[str, str] = {}
        try:
            opened = repository.open_artifact(path, "", options, lambda percent, message: None)
            golden_sets.read(path)
            opened.engine.run(
                made_up_inputs(opened.engine.signature),
                [each.name for each in opened.spec.outputs] if opened.spec else ["y"],
            )
        except InterlockError as error:
            said = {"reason": error.reason, "message": error.message}
        except Exception as error:  # noqa: BLE001 - that is what must not happen
            said = {"crash": repr(error)[:300]}
        print(json.dumps({"name": name, **said, "ran": ran, "canary": canary.exists()}), flush=True)


WATCHED = frozenset(
    {"os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class", "ctypes.dlopen"}
)

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
