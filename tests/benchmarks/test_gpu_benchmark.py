"""benchmarks/gpu.py runs on whatever is available, and says so if there is nothing."""

import re
import sys

import pytest
import torch

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402

from utils.errors import UserError  # noqa: E402


@pytest.fixture(autouse=True)
def precision_as_before():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = bool(before[1])


def test_without_an_accelerator_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "pick_device", lambda name: torch.device("cpu"))
    assert gpu.main([]) == 0
    assert re.fullmatch("No accelerator is available: .*\n", capsys.readouterr().out)


def test_it_runs_on_a_cpu(capsys):
    variants, names = ("float32", "amp"), ("laptop", "resnet18-cifar")
    argv = f"--device cpu --batch-size 2 --steps 1 --variants {' '.join(variants)} --only {' '.join(names)}"
    assert gpu.main(argv.split()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(names)]
    assert [row[:3] for row in rows] == [[name, variant, "2"] for variant in variants for name in names]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)


def test_a_variant_that_the_device_lacks_is_refused():
    with pytest.raises(UserError, match="--variants tf32: not available on cpu"):
        gpu.main("--device cpu --variants tf32".split())
