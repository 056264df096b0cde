"""Reads the pickled dictionaries that ImageNet32 is published as, without running anything that they name.

A pickle is a small program that may call any function by name. Here the few names that numpy arrays need denote
stand-ins, which check their arguments, so that even numpy's own construction from a pickle's state and its arrays of
objects are out of reach; every other name is refused.
"""

import pickle
import re

import numpy as np

from utils.errors import UserError, first_line

_NUMBERS = re.compile(r"[<>|=]?[buif][1248]")


class _Refused(Exception):
    pass


def read_pickle(path):
    """The dictionary in the file `path`, of arrays of numbers, bytes, strings, numbers, lists and dictionaries.

    Raises UserError if the file is missing, truncated, not a dictionary, or names anything but an array.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()  # of Python 2's strings, which may be bytes
    except _Refused as error:
        raise UserError(f"{path}: refused, it asks for {error}; data are arrays, numbers, strings and lists") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever bytes that are not a pickle lead to
        raise UserError(f"{path}: damaged or not a pickle ({first_line(error)}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of a dictionary")
    return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


class _Number:
    """Stands for numpy.dtype: a type of number."""

    def __init__(self, name, *_):
        if not _NUMBERS.fullmatch(name):
            raise _Refused(f"an array of {name}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray, and for an array under construction."""

    array = None

    def __setstate__(self, state):
        _, shape, number, fortran, data = state
        self.array = _from_buffer(data, number, shape, "F" if fortran else "C")


def _from_buffer(data, number, shape, order):
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, number.dtype).reshape(shape, order=order)


_STAND_INS = {
    ("numpy", "dtype"): _Number,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, *_: kind(),
    ("numpy.core.multiarray", "scalar"): lambda number, data: _from_buffer(data, number, (), "C").item(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes in the first protocols
}
