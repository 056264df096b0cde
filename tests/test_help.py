"""--help of every program begins with examples, and they work."""

import shlex

import pytest

import run_exps
from utils.figures import command as figures
from utils.runs import options

PROGRAMS = {
    "main_block.py": (options.TRAINING.parser, options.parse),
    "resample.py": (options.SAMPLING.parser, lambda argv: options.SAMPLING.resolve(options.SAMPLING.given(argv))),
    "run_exps.py": (run_exps.parser(), lambda argv: run_exps.select(run_exps.parser().parse_args(argv))),
    "-m utils.figures": (figures.parser(), lambda argv: figures.parser().parse_args(argv)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_begins_with_three_examples_that_the_program_takes(program):
    parser, take = PROGRAMS[program]
    top = parser.format_help().partition("\n\n  ")[2].partition("\n\n")[0].splitlines()
    examples = [line.strip() for line in top]
    assert len(examples) >= 3
    for example in examples:
        python, *words = shlex.split(example, comments=True)
        start = len(program.split())
        assert python == "python" and words[:start] == program.split()
        assert take(words[start:])


def test_help_of_every_program_stays_within_a_terminal():
    for parser, _ in PROGRAMS.values():
        assert all(len(line) <= 120 for line in parser.format_help().splitlines())
