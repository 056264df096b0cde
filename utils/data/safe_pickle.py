"""Reads the pickled dictionaries that CIFAR and ImageNet32 are published as, running nothing of what they name.

A pickle is a small program that may call any function by name. Here the few names that numpy arrays need stand for
functions of this file, which check what they are given; every other name is refused.
"""

import pickle
import re

import numpy as np

from utils.errors import UserError

_NUMBERS = re.compile(r"[<>|=]?[buif][1248]")


class _Refused(Exception):
    pass


def read_pickle(path):
    """The dictionary in the file `path`, keys as str: arrays of numbers, bytes, strings, numbers, lists, dicts.

    Raises UserError where the file is missing, truncated, no dictionary, or names anything but an array.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except _Refused as error:
        raise UserError(f"{path}: refused, it asks for {error}; data are arrays, numbers, strings and lists") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever bytes that are no pickle lead to
        raise UserError(f"{path}: damaged or no pickle ({error or type(error).__name__}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} where a dictionary was expected")
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}


def _text(key):
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, key):
        raise _Refused("an object outside the file")


class _Number:
    """Stands for numpy.dtype: a type of number."""

    def __init__(self, name, *_):
        name = _text(name)
        if not _NUMBERS.fullmatch(name):
            raise _Refused(f"an array of {name}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(_text(state[1]))


class _Array:
    """Stands for numpy.ndarray, and for an array under construction."""

    array = None

    def __setstate__(self, state):
        _, shape, number, fortran, data = state
        self.array = np.frombuffer(data, number.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind, *_):
    return kind()


def _from_buffer(data, number, shape, order):
    return np.frombuffer(data, number.dtype).reshape(shape, order=order)


def _scalar(number, data):
    return np.frombuffer(data, number.dtype)[0].item()


def _encode(text, encoding):
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "dtype"): _Number,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
