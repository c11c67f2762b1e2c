"""The Open Inference Protocol's messages: the same wire as tritonclient's, in the same process as tritonclient."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from interlock.api.oip import messages, rpc

ROOT = Path(__file__).resolve().parents[2]


def run_python(source: str) -> str:
    """Runs a fresh interpreter, warnings as errors; its standard output."""
    code = textwrap.dedent(source)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ["ours first", "tritonclient first"])
def test_both_can_be_imported_in_one_process(order: str) -> None:
    imports = ["from interlock.api.oip import messages, rpc", "import tritonclient.grpc.service_pb2 as triton"]
    if order == "tritonclient first":
        imports.reverse()
    source = (
        "\n".join(imports)
        + "\n"
        + "print(messages.POOL.FindMessageTypeByName('inference.ModelInferRequest') is not triton.ModelInferRequest.DESCRIPTOR)"
    )
    assert run_python(source).strip() == "True"


COMPARE = """
from interlock.api.oip import messages
import tritonclient.grpc.service_pb2 as service, tritonclient.grpc.model_config_pb2 as config
from google.protobuf import descriptor_pool
theirs = descriptor_pool.Default()
ADDED = {("inference.RepositoryModelLoadResponse", n) for n in ("model_name", "isLoaded")}
ADDED |= {("inference.RepositoryModelUnloadResponse", n) for n in ("model_name", "isUnloaded")}
count = 0
def walk(ours):
    global count
    their = theirs.FindMessageTypeByName(ours.full_name)
    for field in ours.fields:
        if (ours.full_name, field.name) in ADDED:
            assert field.number not in their.fields_by_number, field.full_name
            continue
        other = their.fields_by_name[field.name]
        kind = lambda f: (f.number, f.type, f.is_repeated, f.message_type and f.message_type.full_name, f.enum_type and f.enum_type.full_name)
        assert kind(field) == kind(other), (field.full_name, kind(field), kind(other))
        assert (field.containing_oneof is None) == (other.containing_oneof is None), field.full_name
        count += 1
    for nested in ours.nested_types:
        walk(nested)
for message in messages.DESCRIPTOR.message_types_by_name.values():
    walk(message)
enum = messages.DESCRIPTOR.enum_types_by_name["DataType"]
assert [(v.name, v.number) for v in enum.values] == [(v.name, v.number) for v in theirs.FindEnumTypeByName("inference.DataType").values]
import tritonclient.grpc.service_pb2 as s
ours = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
their = s.DESCRIPTOR.services_by_name["GRPCInferenceService"]
shape = lambda m: (m.name, m.input_type.full_name, m.output_type.full_name, m.client_streaming, m.server_streaming)
assert sorted(map(shape, ours.methods)) == sorted(map(shape, their.methods))
print(count)
"""


def test_every_field_has_tritonclients_number_and_type() -> None:
    assert int(run_python(COMPARE)) > 80


def test_bytes_of_one_are_read_by_the_other() -> None:
    source = """
    from interlock.api.oip import messages
    import tritonclient.grpc.service_pb2 as triton
    def fill(m):
        r = m.ModelInferRequest(model_name="policy", model_version="3", id="7", raw_input_contents=[b"1234"])
        r.parameters["p"].int64_param = -5
        r.inputs.add(name="x", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(0.5)
        r.outputs.add(name="y")
        return r
    wire = fill(messages).SerializeToString(deterministic=True)
    assert wire == fill(triton).SerializeToString(deterministic=True)
    assert messages.ModelInferRequest.FromString(wire).parameters["p"].int64_param == -5
    # KServe's load request has the model's name in field 1
    assert messages.RepositoryModelLoadRequest.FromString(b"\\x0a\\x01m").repository_name == "m"
    """
    run_python(source)


def test_the_chained_pool_finds_both_sides() -> None:
    from grpc_health.v1 import health_pb2

    pool = rpc.chained_pool()
    assert pool.FindFileContainingSymbol("inference.GRPCInferenceService").name == "oip/grpc_service.proto"
    assert pool.FindFileContainingSymbol("grpc.health.v1.Health").name == health_pb2.DESCRIPTOR.name
    assert pool.FindMessageTypeByName("inference.ModelInferRequest") is messages.ModelInferRequest.DESCRIPTOR
    assert pool.FindAllExtensions(messages.ModelInferRequest.DESCRIPTOR) == []
    with pytest.raises(KeyError):
        pool.FindFileByName("nowhere.proto")


def test_generated_files_are_what_the_generator_writes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "genproto_oip.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
