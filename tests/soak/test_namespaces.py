"""Processes that do not see each other: containers on one machine, with names and process numbers of their own."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.soak.programs import training, wait_for

UNSHARED = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--uts", "--mount-proc"]


def can_unshare():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARED, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="no right to namespaces")
def test_of_two_containers_on_one_folder_one_runs(tmp_path, record_property):
    def start(command, host):
        within = f"hostname {host}; exec {sys.executable} " + " ".join(f"'{word}'" for word in map(str, command))
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*UNSHARED, "sh", "-c", within], cwd=ROOT, **streams)

    for first_host, second_host in (("one", "one"), ("one", "two")):
        root = tmp_path / f"{first_host}-{second_host}"
        holder = start(training(root, "--epochs", "9999", name="long"), first_host)
        try:
            wait_for(lambda root=root: (root / "long" / "epoch_1.pt").exists())
            second = start(training(root, "--epochs", "9999", name="long"), second_host)
            output = second.communicate(timeout=120)[0]
            assert second.returncode == 2 and "is in use by main_block.py" in output, output
            assert holder.poll() is None
        finally:
            holder.kill()
            holder.wait()
    record_property("starts in another container refused", 2)
