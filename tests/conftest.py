"""The folder of the checkout, and what every test begins with."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seed():
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
