"""Values of options: each function converts one word of a command line, or says what is wrong with it."""

import argparse
import sys

from models.names import IDENTITY, MODULES, check_names

_LARGEST = 2**31 - 1


def _number(kind, low, what, strict=False, high=_LARGEST):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not value >= low or (strict and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


_FLOAT = sys.float_info.max
positive_int = _number(int, 1, "a positive integer")
natural = _number(int, 0, "an integer of at least 0")
seed = _number(int, 0, "an integer of at least 0", high=2**63 - 1)
positive_float = _number(float, 0, "a positive number", strict=True, high=_FLOAT)
non_negative_float = _number(float, 0, "a number of at least 0", high=_FLOAT)
finite_float = _number(float, -_FLOAT, "a finite number", high=_FLOAT)


def text(word):
    """Any text but the empty one."""
    if not word.strip():
        raise argparse.ArgumentTypeError("empty")
    return word


def matrix_file(word):
    """The name of a file that holds one matrix."""
    return text(word)


def channels(word):
    """A number of channels, or 'id' for the identity."""
    return IDENTITY if word == IDENTITY else positive_int(word)


def bit(word):
    """0 or 1, as a bool."""
    if word not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{word!r} is not 0 or 1")
    return word == "1"


def module_names(word):
    """A list of modules of the block grammar, written as one string."""
    names = word.split()
    try:
        check_names(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def architecture(word):
    """The modules of a block as a list, or the name of a standard network as a string."""
    words = word.split()
    if not words:
        raise argparse.ArgumentTypeError("empty; for example 'Fw Std Pr N', or resnet18-custom")
    if len(words) == 1 and words[0] not in MODULES and word == word.lower():
        return words[0]
    return module_names(word)


def interval(word):
    """START:STOP[:STEP] as [start, stop, step], each an integer or None, as in Python's slices."""
    parts = word.split(":")
    try:
        if len(parts) not in (2, 3):
            raise ValueError
        start, stop, step = ([int(part) if part else None for part in parts] + [None])[:3]
        if step is not None and step <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not START:STOP or START:STOP:STEP (STEP > 0)") from None
    return [start, stop, step]
