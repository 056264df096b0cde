"""The command `python -m utils.figures`."""

import os

from utils import machine
from utils.errors import end_at_interrupts, run_main

# isort: split
os.environ.update(machine.for_threads())  # torch must find them
if __name__ == "__main__":
    end_at_interrupts()

from utils.figures.command import main

run_main(main)
