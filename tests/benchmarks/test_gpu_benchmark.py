"""benchmarks/gpu.py runs on whatever is there, and says so where there is nothing."""

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


def test_without_an_accelerator_it_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "pick_device", lambda name: torch.device("cpu"))
    assert gpu.main([]) == 0
    assert re.fullmatch("There is no accelerator here: .*\n", capsys.readouterr().out)


def test_a_cpu_takes_its_place(capsys):
    argv = "--device cpu --batch-size 2 --steps 1 --variants float32 amp --only laptop resnet18-cifar"
    assert gpu.main(argv.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match("laptop|resnet18", line)]
    assert [row[:3] for row in rows] == [
        [name, variant, "2"] for variant in ("float32", "amp") for name in ("laptop", "resnet18-cifar")
    ]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)


def test_every_network_can_be_built():
    for config, batch in gpu.NETWORKS.values():
        assert batch > 0 and config.num_classes in (10, 1000)
    with pytest.raises(UserError, match="--variants tf32"):
        gpu.main("--device cpu --variants tf32".split())
