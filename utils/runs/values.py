"""Values of options: each function converts one word of a command line, or says what is wrong with it."""

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

from models.names import IDENTITY, MODULES, check_names
from utils.errors import UserError


def _number(kind, low, what, strict=False, high=2**31 - 1):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {what}") from None
        if value > high:
            raise ArgumentTypeError(f"{text[:20]}{'…' * (len(text) > 20)} is too large")
        if not value >= low or (strict and value == low):
            raise ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


_PREDEFINED = {  # names of blocks in the authors' program
    "scatnetblock": "Fw rho Std P N",
    "scatnetblockanalysis": "Fw rho Std P N FrhoF",
    "blockanalysis": "Std P N FrhoF",
}
_FLOAT = 3.4e38  # the largest in single precision
positive_int = _number(int, 1, "a positive integer")
natural = _number(int, 0, "an integer of at least 0")
width = _number(int, 1, "a positive integer", high=10**6)  # what no computer could hold is refused before it is tried
few = _number(int, 0, "an integer of at least 0", high=1000)
scale = _number(float, 0, "a positive number", strict=True, high=1e4)
seed = _number(int, 0, "an integer of at least 0", high=2**63 - 1)
positive_float = _number(float, 0, "a positive number", strict=True, high=_FLOAT)
non_negative_float = _number(float, 0, "a number of at least 0", high=_FLOAT)
finite_float = _number(float, -_FLOAT, "a finite number", high=_FLOAT)


def text(word):
    """Any text but the empty one."""
    if not word.strip():
        raise ArgumentTypeError("empty")
    return word


def lower_case(word):
    """Text in lower case, as names of data sets are."""
    return text(word).lower()


def epoch(word):
    """A number of epochs; -1 for the last."""
    return None if word == "-1" else natural(word)


def one_or_many(values):
    """One value as it is, several as a list."""
    return values[0] if len(values) == 1 else values


def path(word):
    """The name of a file or folder, ~ and variables expanded; not one that no disk can have."""
    found = os.path.expandvars(os.path.expanduser(text(word)))
    if re.match(r"~|.*\$(\w|{\w+})", found) and not os.path.lexists(found):
        raise ArgumentTypeError(f"{word!r} names a user or a variable that does not exist")
    if max(map(len, os.fsencode(found).split(b"/"))) > 255 or len(os.fsencode(found)) > 4000:
        raise ArgumentTypeError(f"{word[:40]!r}… is too long a name")
    return found


def folder(word):
    """The path of a folder."""
    return Path(path(word))


def matrix_file(word):
    """The name of a file that holds one matrix."""
    return path(word)


def channels(word):
    """A number of channels, or 'id' for the identity."""
    return IDENTITY if word == IDENTITY else width(word)


def bit(word):
    """0 or 1, as a bool."""
    if word not in ("0", "1"):
        raise ArgumentTypeError(f"{word!r} is not 0 or 1")
    return word == "1"


def module_names(word):
    """A list of modules of the block grammar, written as one string."""
    names = _PREDEFINED.get(word, word).split()
    try:
        check_names(names)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return names


def architecture(word):
    """The modules of a block as a list, or the name of a standard network as a string."""
    words = word.split()
    if not words:
        raise ArgumentTypeError("empty; for example 'Fw Std Pr N', or resnet18-custom")
    if len(words) == 1 and words[0] not in (*MODULES, *_PREDEFINED) and word == word.lower():
        return words[0]
    return module_names(word)


def interval(word):
    """START:STOP[:STEP] as [start, stop, step], each an integer or None, as in Python's slices."""
    match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?(?::(0*[1-9]\d{0,8})?)?", word, re.ASCII)
    if match is None:
        raise ArgumentTypeError(f"{word!r} is not START:STOP or START:STOP:STEP (STEP > 0)")
    return [int(number) if number else None for number in match.groups()]


def images_of(word):
    """START:STOP[:STEP] as `interval`; range(…) as {"range": [start, stop, step]}, [i, …] as {"images": [i, …]}."""
    match = re.fullmatch(r"\s*(?:range\s*\((.+)\)|\[(.+)\])\s*", word)
    if match is None:
        return interval(word)
    try:
        numbers = [int(number) for number in (match[1] or match[2]).split(",")]
        if match[2]:
            return {"images": numbers}
        chosen = range(*numbers)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{word!r} is not a range or list of integers ({error})") from None
    return {"range": [chosen.start, chosen.stop, chosen.step]}


def class_or_classes(word):
    """The number of a class, or START:STOP[:STEP] as `interval`."""
    return natural(word) if word.isdigit() else interval(word)


def classes_of(values):
    """One interval, or numbers of classes as {"classes": [k, …]}."""
    if all(isinstance(value, int) for value in values):
        return {"classes": values}
    if len(values) > 1:
        raise UserError("--classes-subset: numbers of classes, or one START:STOP[:STEP]")
    return values[0]
