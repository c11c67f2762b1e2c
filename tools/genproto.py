"""Regenerates src/interlock/api from protos/. `--check` writes nothing and fails when the committed code differs.

The version of grpcio-tools that runs here is the oldest runtime the generated code accepts, so it is pinned in the `dev` extra and is
the floor of the `grpcio` and `protobuf` dependencies.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
API = ROOT / "src" / "interlock" / "api"
INCLUDE = Path(grpc_tools.__file__).parent / "_proto"
HEADER = '"""Generated from protos/ by tools/genproto.py. Do not edit."""\n'


def _protoc(target: Path) -> None:
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "interlock").rglob("*.proto"))
    arguments = ["protoc", f"-I{PROTOS}", f"-I{INCLUDE}"]
    # beside this interpreter, whatever PATH says: `.venv/bin/python -m pytest` runs without the environment being activated
    arguments += [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    arguments += [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    arguments += [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    if protoc.main([*arguments, *files]) != 0:
        sys.exit("protoc failed")


def _finish(folder: Path) -> None:
    """Adds packages and drops the gRPC files of protos without services."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        (path / "__init__.py").write_text(HEADER)
    for path in folder.rglob("*_pb2_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()
            path.with_suffix(".pyi").unlink(missing_ok=True)


def generate(target: Path) -> Path:
    """Writes the generated package below `target`; returns the `interlock/api` folder."""
    _protoc(target)
    folder = target / "interlock" / "api"
    _finish(folder)
    return folder


def _differences(fresh: Path, committed: Path) -> list[str]:
    names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
    names |= {
        p.relative_to(committed)
        for p in committed.rglob("*.py*")
        if p.suffix in {".py", ".pyi"} and "oip" not in p.parts
    }
    return sorted(
        str(name)
        for name in names
        if not (
            (fresh / name).is_file()
            and (committed / name).is_file()
            and filecmp.cmp(fresh / name, committed / name, shallow=False)
        )
    )


def main() -> int:
    """Generates, or checks with `--check`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the committed code differs; write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        if check:
            stale = _differences(fresh, API)
            print(
                "\n".join(["src/interlock/api is stale; run `make proto`:", *stale])
                if stale
                else "src/interlock/api is up to date"
            )
            return 1 if stale else 0
        for path in fresh.rglob("*"):
            if path.is_file():
                destination = API / path.relative_to(fresh)
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, destination)
    print(f"wrote {API.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
