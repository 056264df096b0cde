"""How long a training step takes on a quiet and on a busy machine, by how OpenMP's threads wait for one another.

    python benchmarks/busy.py [--rounds 5] [--seconds 4] [--others 2]

Every setting is timed in processes of its own, in turn, alone and beside others that compute all the time. Quiet: the
fastest round's median step over that of the default; busy: the median round's over the quiet one. If processors are
shared fairly, as many others as processors double it. Measured on two processors: 10000 costs 1 % when
quiet, and a step takes 2.3 times as long when busy (28×28) or 2.7 (8×8), where by default it takes 5.0 and 4.1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from utils import machine  # noqa: E402

SETTINGS = {
    "default": {},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10000)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
OTHER = "while True: pass"


def steps(seconds):
    """Prints the median seconds of a step, by network, as JSON."""
    import torch
    from train_step import NETWORKS, NORM, network, step

    from models import build
    from models.signal import Signal

    found = {}
    for name, (config, batch) in {
        "28×28": (network(NORM, (32, 64, 128, 256), Signal(1, 28, 28), 10), 64),
        "8×8": NETWORKS["laptop"],
    }.items():
        torch.manual_seed(0)
        run, times = step(build(config), config, batch), []
        run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times)
    print(json.dumps(found))


def measure(setting, seconds):
    """What `steps` prints under a setting."""
    environment = {name: value for name, value in os.environ.items() if name not in machine.SPINNING}
    command = [sys.executable, __file__, "--steps", str(seconds)]
    return json.loads(subprocess.check_output(command, env={**environment, **SETTINGS[setting]}))


def main():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--rounds", type=int, default=5, help="rounds of all settings (default 5)")
    top.add_argument("--seconds", type=float, default=4, help="of each network in a round (default 4)")
    top.add_argument("--others", type=int, default=machine.cores(), help="busy processes (default: one per processor)")
    top.add_argument("--steps", type=float, help=argparse.SUPPRESS)
    args = top.parse_args()
    if args.steps:
        return steps(args.steps)
    found = {}
    for _ in range(args.rounds):
        for others in (0, args.others):
            processes = [subprocess.Popen([sys.executable, "-c", OTHER]) for _ in range(others)]
            try:
                for setting in SETTINGS:
                    for name, seconds in measure(setting, args.seconds).items():
                        found.setdefault((name, setting, others > 0), []).append(seconds)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
    print(f"{machine.cores()} processors, {args.others} others, {args.rounds} rounds")
    for name, setting in sorted({key[:2] for key in found}):
        quiet, busy = min(found[name, setting, False]), statistics.median(found[name, setting, True])
        ratio = quiet / min(found[name, "default", False])
        print(f"{name:6} {setting:24} {1e3 * quiet:8.2f} ms, {ratio:5.2f} of the default; busy {busy / quiet:6.2f}")
    return None


if __name__ == "__main__":
    main()
