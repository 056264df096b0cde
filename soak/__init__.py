"""Trial of what the README promises: kills, full disks, damaged and hostile files, several processes.

    make soak, or: python -m soak [--kills 30] [--only NAME …] [--seed 0]

Every program of the trial computes with one thread, so that many can run on a small machine.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
