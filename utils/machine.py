"""What a process may use of its machine. torch is not needed to know, and has to be told before it is imported."""

import itertools
import os
from pathlib import Path, PurePosixPath

SPINNING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}


def cores(root="/"):
    """Processors for this process, at least 1: by its affinity, by SLURM's --cpus-per-task and by the quotas of its
    control groups, whose files are under `root`."""
    limits = [_affinity(), *_quotas(Path(root))]
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, int(min(limits)))


def _affinity():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root):
    """Processors that the control groups of this process have, of version 1 or 2, its own and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            files = [base / str(group)[1:] / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
            words = " ".join(file.read_text() for file in files if file.is_file()).split()
            if len(words) == 2 and words[0].isdigit():  # "max" or -1: no limit
                yield int(words[0]) / int(words[1])


def for_threads():
    """Variables of the environment under which torch should be imported, but for those that the user has set.

    Threads that wait for one another do not spin for long, which on a busy machine would keep the others from working
    (benchmarks/busy.py); there are as many as processors.
    """
    wanted = {} if SPINNING & os.environ.keys() else {"GOMP_SPINCOUNT": "10000"}
    if cores() < _affinity() and "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(cores())
    return wanted


def gpus(visible):
    """The GPUs in a value of CUDA_VISIBLE_DEVICES: those before the first that is none, such as -1 or NoDevFiles."""
    names = (name.strip() for name in visible.split(","))
    return tuple(itertools.takewhile(lambda name: name.isdigit() or name.startswith(("GPU-", "MIG-")), names))
