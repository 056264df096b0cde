"""The Makefile sets up an environment however pip is configured, and never takes an empty one for ready."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path):
    """A copy of the Makefile whose only requirement is a wheel beside it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    with zipfile.ZipFile(tmp_path / "nothing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nothing.py", "")
        wheel.writestr("nothing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1\n")
        wheel.writestr("nothing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("nothing-1.dist-info/RECORD", "")
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "requirements-dev.txt").write_text(f"{tmp_path / 'nothing-1-py3-none-any.whl'}\n")
    return tmp_path


def make(folder, **environment):
    command = ["make", f"PYTHON={sys.executable}", ".venv/ready"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, check=False)


def test_packages_go_into_the_environment_however_pip_is_configured(folder):
    elsewhere = {"PIP_USER": "1", "PIP_TARGET": str(folder / "target"), "PYTHONPATH": str(folder / "path")}
    ended = make(folder, **elsewhere)
    assert ended.returncode == 0, ended.stderr.decode()
    found = subprocess.run([folder / ".venv" / "bin" / "python", "-c", "import nothing; print(nothing.__file__)"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout.startswith(str(folder / ".venv")) and (folder / ".venv" / "ready").exists()


def test_an_empty_environment_is_not_ready(folder):
    (folder / "requirements-dev.txt").write_text("")
    ended = make(folder)
    assert ended.returncode != 0 and b"nothing was installed" in ended.stderr
    assert not (folder / ".venv" / "ready").exists()
