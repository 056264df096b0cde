"""Runs the checks and prints what they found: python -m soak (--help lists the options)."""

import argparse
import random
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path

from soak import disks, divergence, hostile, kills, load, locks, ranks
from soak.trial import Trial

CHECKS = {
    "training-killed": kills.training_killed,
    "sampling-killed": kills.sampling_killed,
    "runner-killed": kills.runner_killed,
    "terminated": kills.terminated,
    "disk-full": disks.full,
    "checkpoint-damaged": disks.damaged,
    "two-at-once": locks.two_at_once,
    "diverged": divergence.diverged,
    "hostile-files": hostile.refused,
    "names": hostile.names,
    "ranks": ranks.ranks,
    "imagenet-load": load.imagenet,
}
WIDTH = 100
SHOWN = 15  # lines of a failure


def parser():
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m soak", description="Trial of what the README promises.")
    top.add_argument("--kills", type=int, default=30, metavar="N", help="kills of each program (default 30)")
    top.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="NAME",
        help=f"these checks: {', '.join(CHECKS)}",
    )
    top.add_argument("--seed", type=int, help="of the moments and damages (default: another each time, printed)")
    return top


def check(name, args, folder):
    """Runs one check and prints its line. Returns whether everything held."""
    trial = Trial(folder, random.Random(f"{args.seed} {name}"), args.kills)
    folder.mkdir()
    began, figures = time.monotonic(), "it broke off"
    try:
        figures = CHECKS[name](trial)
    except Exception:  # the other checks are worth their figures
        trial.expect(False, traceback.format_exc())
    shutil.rmtree(folder, ignore_errors=True)
    verdict = f"{len(trial.failures)} FAILED" if trial.failures else "ok"
    first, *rest = textwrap.wrap(figures, WIDTH)
    print(f"{name:19} {time.monotonic() - began:5.0f} s  {verdict:9} {first}")
    for line in rest:
        print(f"{'':38} {line}")
    for failure in trial.failures[:3]:
        print(textwrap.indent("\n".join(failure.splitlines()[-SHOWN:]), "    | "))
    sys.stdout.flush()
    return not trial.failures


def main(argv=None):
    args = parser().parse_args(argv)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1000)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        print(f"seed {args.seed}")
        held = [check(name, args, Path(folder) / name) for name in args.only]
    print(f"{sum(held)} of {len(held)} checks held, in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
