"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` loads outputs of the original program; without the files the test skips."""

    def load(name):
        path = GOLDEN / f"{name}.pt"
        if not path.is_file():
            pytest.skip(f"outputs of the original program are not at {GOLDEN}")
        return torch.load(path, weights_only=True)

    return load


@pytest.fixture(scope="session")
def golden_names():
    """The names of all golden networks (not the filters); empty where the files are absent."""
    return sorted(path.stem for path in GOLDEN.glob("*.pt") if path.stem != "filters")
