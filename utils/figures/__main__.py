"""The command `python -m utils.figures`."""

import os

from utils import machine
from utils.errors import run_main

# isort: split
os.environ.update(machine.for_threads())  # torch must find them

from utils.figures.command import main

run_main(main)
