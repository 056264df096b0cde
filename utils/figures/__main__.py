"""The command `python -m utils.figures`."""

from utils.errors import run_main
from utils.figures.command import main

run_main(main)
