"""What other people's programs rely on: protos and their generated code, exports, imports, the command line's names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("tool", ["genproto.py", "genproto_oip.py", "gendocs.py"])
def test_generated_code_is_fresh(tool: str) -> None:
    done = run(sys.executable, f"tools/{tool}", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_protos_follow_the_rules() -> None:
    buf = shutil.which("buf") or str(Path(sys.executable).parent / "buf")
    if not Path(buf).exists():
        pytest.skip("buf is not installed: pip install buf-bin")
    done = run(buf, "lint")
    assert done.returncode == 0, done.stdout + done.stderr
    formatted = run(buf, "format", "--diff", "--exit-code")
    assert formatted.returncode == 0, formatted.stdout


def test_importing_the_package_is_light() -> None:
    """STYLE: `import interlock` brings no torch, pydantic or gRPC."""
    heavy = ["torch", "pydantic", "grpc", "numpy", "onnxruntime", "fastapi", "structlog"]
    code = f"import interlock, sys; found = [m for m in {heavy!r} if m in sys.modules]; sys.exit(', '.join(found) or 0)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_light() -> None:
    code = "import sys; from interlock.cli.__main__ import cli; sys.exit(', '.join(m for m in ('torch', 'numpy', 'grpc', 'pydantic') if m in sys.modules) or 0)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    import interlock

    assert sorted(interlock.__all__) == ["__version__", "attach"]
    assert all(getattr(interlock, name) for name in interlock.__all__)


def test_rooms_without_torch_start_without_torch() -> None:
    """DESIGN 3: the gateway, the controller and a replica run without torch."""
    modules = [
        "interlock_gateway.__main__",
        "interlock_controller.__main__",
        "interlock_inference.__main__",
        "interlock_trainer.__main__",
    ]
    for module in modules:
        code = f"import importlib, sys; importlib.import_module({module!r}); sys.exit('torch' if 'torch' in sys.modules else 0)"
        done = run(sys.executable, "-c", code)
        assert done.returncode == 0, f"{module}: {done.stderr}"


def test_imports_go_one_way() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    if not lint.exists():
        pytest.skip("import-linter is not installed: pip install import-linter")
    done = run(str(lint))
    assert done.returncode == 0, done.stdout
