"""What a process may use: affinity, control groups, SLURM; what is set before torch is imported; GPUs."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import machine


@pytest.fixture
def eight(monkeypatch):
    """A process that the scheduler of the kernel lets run on eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)


V1 = "3:memory:/job/7\n4:cpu,cpuacct:/job/7\n1:name=systemd:/\n"
QUOTAS = [  # /proc/self/cgroup, files of groups, processors of eight
    ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
    ("0::/not/in/this/container\n", {"cpu.max": "200000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
    (V1, {"cpu/job/7/cpu.cfs_quota_us": "-1\n", "cpu/job/7/cpu.cfs_period_us": "100000\n"}, 8),
    (V1, {"cpu/job/7/cpu.cfs_quota_us": "250000\n", "cpu/job/7/cpu.cfs_period_us": "50000\n"}, 5),
    (V1, {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
]


@pytest.mark.parametrize("groups, files, expected", QUOTAS)
def test_processors_are_those_of_the_container(eight, tmp_path, groups, files, expected):
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": text for k, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cores(tmp_path) == expected


def test_processors_are_those_of_the_task(eight, tmp_path, monkeypatch):
    assert machine.cores(tmp_path) == 8
    for given, expected in (("3", 3), ("64", 8), ("", 8), ("many", 8), ("0", 1)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        assert machine.cores(tmp_path) == expected


def test_threads_are_told_what_the_user_has_not_said(eight, monkeypatch):
    assert machine.for_threads() == {"GOMP_SPINCOUNT": "10000"}
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert machine.for_threads() == {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": "1"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert machine.for_threads() == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.for_threads() == {"GOMP_SPINCOUNT": "10000"}


@pytest.mark.parametrize("script", ["main_block", "resample", "utils.figures.__main__", "rainbow"])
def test_programs_tell_threads_before_torch_is_imported(script):
    program = f"""
import builtins, os, sys
plain = builtins.__import__
def watch(name, *rest, **more):
    if name == "torch" and "torch" not in sys.modules:
        print("told" if "GOMP_SPINCOUNT" in os.environ else "not told")
        sys.stdout.flush()
        os._exit(0)
    return plain(name, *rest, **more)
builtins.__import__ = watch
import {script}
"""
    environment = {key: value for key, value in os.environ.items() if key not in machine.SPINNING}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stdout == ("not told\n" if script == "rainbow" else "told\n"), ended.stderr


@pytest.mark.parametrize(
    "visible, expected",
    [
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,2", ("0", "2")),
        ("1,-1,2", ("1",)),
        (" 1 , 0", ("1", "0")),
        ("GPU-8f, MIG-1", ("GPU-8f", "MIG-1")),
        ("none", ()),
    ],
)
def test_gpus_are_those_that_are_visible(visible, expected):
    assert machine.gpus(visible) == expected
