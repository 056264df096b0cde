"""What reads images or computes beside others: workers that are killed, little shared memory, a busy machine."""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests import training_runs
from tests.conftest import ROOT
from tests.published_files import write_imagenet
from tests.soak.programs import PATIENCE, Program, assert_same, children, content, run, training, wait_for
from utils import machine


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data set of image files."""
    top = tmp_path_factory.mktemp("images")
    write_imagenet(top, 4, 60)
    return top


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """What an undisturbed training on the image files leaves."""
    root = tmp_path_factory.mktemp("whole")
    run(on_files(images, root))
    return root


def on_files(images, root, workers=2):
    """The command of a small training on image files."""
    files = ["--data", images, "--resize-images", "64", "--bad-images", "skip", "-j", workers, "--checkpoints", root]
    return ["main_block.py", *training_runs.COMMON[3:], *training_runs.NETWORKS["norm"], *files, "--dir", "run"]


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_worker_ends_the_run_in_a_line(seed, images, whole, tmp_path, record_property):
    draw, killed = random.Random(seed), 0
    for _ in range(4):
        with Program(on_files(images, tmp_path)) as program:
            wait_for(lambda p=program: p.wait(0) is not None or children(p.process.pid))
            time.sleep(draw.uniform(0, 1))
            for pid in children(program.process.pid)[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGBUS]))
            program.wait()
        assert program.status in (0, 1) and "Traceback" not in program.output, program.output
        assert program.status == 0 or "-j" in program.last_line, program.output
        killed += program.status
    run(on_files(images, tmp_path))
    assert_same(tmp_path, whole)
    record_property("runs whose worker was killed ended in a line and resumed", killed)


def with_shared_memory(size, command):
    """The end of a command that finds a /dev/shm of this size."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", mount, "sh", *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.skipif(
    not shutil.which("unshare") or with_shared_memory("4k", ["true"]).returncode, reason="may not mount"
)
@pytest.mark.parametrize("size, words", [("4k", "-j 0"), ("64k", "/dev/shm"), ("256k", "/dev/shm"), ("1g", "")])
def test_little_shared_memory_is_done_without_or_explained(size, words, images, whole, tmp_path, record_property):
    ended = with_shared_memory(size, [sys.executable, *on_files(images, tmp_path)])
    lines = set(ended.stderr.splitlines())  # both data sets say it
    assert "Traceback" not in ended.stderr and words in " ".join(lines) and len(lines) <= 1, ended.stderr
    assert ended.returncode == (size == "4k"), ended.stderr
    if size == "4k":
        run(on_files(images, tmp_path, workers=0))
    assert_same(tmp_path, whole)
    record_property("trainings beside a small /dev/shm, or explained", 1)


def test_a_busy_machine_slows_a_run_as_much_as_its_share(tmp_path, record_property):
    unset = ("OMP_NUM_THREADS", *machine.SPINNING)
    environment = {name: value for name, value in os.environ.items() if name not in unset}

    def speed(name):
        command = [sys.executable, *map(str, training(tmp_path, name=name))]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        rows = content(tmp_path / name / "metrics.csv")[2:]
        return statistics.median(float(row["images_per_second"]) for row in rows)

    quiet = speed("quiet")
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(machine.cores())]
    try:
        busy = speed("busy")
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert busy > quiet / 3
    record_property("percent of its speed that a training kept on a busy machine", round(100 * busy / quiet))
