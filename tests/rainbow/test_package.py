"""The library by itself: installed next to a project that has packages `utils` and `models` of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.conftest import ROOT

PROGRAM = """
import torch, torchvision
import models, utils
from rainbow import Rainbow

assert models.MINE and utils.MINE
network = torchvision.models.resnet18(num_classes=10)
loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(2)]
rainbow = Rainbow.fit(network, loader)
assert max(rainbow.align(network).values()) < 1e-4
assert len(rainbow.table().splitlines()) == 22
assert rainbow.sample()(loader[0][0]).shape == (32, 10)
"""


@pytest.mark.slow
def test_an_installed_copy_analyses_a_network_of_torchvision(tmp_path):
    clone, project = tmp_path / "clone", tmp_path / "project"
    for name in ("rainbow", "models", "utils"):  # building leaves files behind
        shutil.copytree(ROOT / name, clone / name)
    shutil.copy(ROOT / "pyproject.toml", clone)
    for name in ("models", "utils"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("MINE = True\n")
    venv.create(project / "venv", with_pip=False)
    python = project / "venv" / "bin" / "python"
    (site,) = (project / "venv").glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))  # torch
    install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-build-isolation", str(clone)]
    subprocess.run([sys.executable, "-m", *install], check=True, cwd=project)
    assert sorted(path.name for path in site.iterdir()) == ["ours.pth", "rainbow", "rainbow_networks-0.1.0.dist-info"]
    assert {path.name for path in (ROOT / "rainbow").glob("[!_]*")} <= {
        path.name for path in (site / "rainbow").iterdir()
    }
    subprocess.run([python, "-W", "ignore", "-c", PROGRAM], check=True, cwd=project)
