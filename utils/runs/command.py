"""Command lines as tables: an option is one record, from which the parser, the defaults, the lists with a value per
block and the definition of "the same run" follow. Imports no torch."""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Mapping

from utils.errors import UserError, first_line

MOST_BLOCKS = 1000


@dataclasses.dataclass(frozen=True)
class Group:
    """A heading in --help and a note below it. `network`: the only kind of network that its options apply to."""

    title: str
    network: str | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command line.

    flags: its spellings, separated by spaces; opposite: the one that sets the default. type: converts a word of the
    command line; None for a switch, which inverts its default. default: the value if it is missing (of every block, if
    per_block). dest: `field`, if it is not the first long flag with '_' for '-'. many: takes several words, of which
    `combine` makes the value. per_block: takes a value per block; a list that stops early is completed with defaults,
    unless it is `complete`: then one value serves all blocks. shortcuts: values that are also flags. fills: `config`,
    if not `field` without scat_ or standard_. free: it does not define the run: it may change when the run is resumed.
    """

    flags: str
    type: Callable | None
    default: object
    help: str
    metavar: str | None = None
    choices: tuple = ()
    dest: str = ""
    required: bool = False
    many: bool = False
    per_block: bool = False
    complete: bool = False
    combine: Callable = list
    opposite: str = ""
    shortcuts: tuple = ()
    fills: str = ""
    free: bool = False
    group: Group = Group("options")

    @property
    def flag(self):
        """The spelling used in messages."""
        return next(flag for flag in self.flags.split() if flag.startswith("--"))

    @property
    def field(self):
        """Its name among the arguments."""
        return self.dest or self.flag.removeprefix("--").replace("-", "_")

    @property
    def config(self):
        """The field of a network's configuration that it fills, if that has such a field."""
        return self.fills or re.sub("^(scat|scattering|standard)_", "", self.field)

    def add_to(self, group):
        """Declares the option to argparse."""
        names = self.flags.split()
        constant = {"dest": self.field, "action": "store_const"}
        if self.type is None:
            group.add_argument(*names, **constant, const=not self.default, help=self.help)
            if self.opposite:
                group.add_argument(self.opposite, **constant, const=self.default, help="the default")
            return
        if self.shortcuts:
            group = group.add_mutually_exclusive_group()
        is_shown = self.default not in (None, []) and self.default is not False
        text = self.help + f" (default {1 if self.default is True else self.default})" * is_shown
        more = {"nargs": "+" if self.many or self.per_block else None, "choices": self.choices or None, "help": text}
        fixed = {"dest": self.field, "type": self.type, "metavar": self.metavar, "required": self.required}
        group.add_argument(*names, **fixed, **more)
        for name in self.shortcuts:
            group.add_argument(f"--{name}", **constant, const=name, help=f"{self.flag} {name}")

    def resolved(self, given, blocks):
        """Its value among those `given`, or the default; a list with a value per block is in full. Raises UserError."""
        values = given.get(self.field, None if self.per_block else self.default)
        if not self.per_block:
            return values
        values = [] if values is None else values
        if self.complete and len(values) == 1:
            return values * blocks
        if len(values) > blocks or (self.complete and 0 < len(values) < blocks):
            found = f"{len(values)} values for {blocks} block{'s' * (blocks != 1)} (--n-blocks)"
            raise UserError(f"{self.flag} has {found}: give a value per block" + ", or one for all" * self.complete)
        return values + [self.default] * (blocks - len(values))


def grouped(*rows):
    """The options among `rows`, each in the group that precedes it."""
    options = []
    for row in rows:
        if isinstance(row, Group):
            group = row
        else:
            options.append(dataclasses.replace(row, group=group))
    return tuple(options)


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line of `UserError`, not a usage dump, and --help that begins with examples."""

    def __init__(self, program, description, examples=(), usage=None, **options):
        text = "\n".join([description, "", *(f"  {example}" for example in examples)])
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(program, usage or "%(prog)s [options]", text, formatter_class=raw, **options)

    def error(self, message):
        raise UserError(f"{message} (--help lists all options)")


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The options of a program. `length`: the field that says how far a run goes; `examples`: that it works with.

    foreign: flags of the authors' program that are none of this one's: what each does there, and what to do here.
    upgraded: a function from stored arguments, of an older version perhaps, to those of this one. Raises UserError.
    """

    program: str
    description: str
    options: tuple[Option, ...]
    length: str
    usage: str | None = None
    examples: tuple[str, ...] = ()
    foreign: Mapping = dataclasses.field(default_factory=dict)
    upgraded: Callable = lambda stored: stored

    @functools.cached_property
    def by_field(self):
        """{field: option}."""
        return {option.field: option for option in self.options}

    @functools.cached_property
    def record(self):
        """The frozen dataclass of resolved arguments: plain values that JSON can hold, a field per option."""
        return dataclasses.make_dataclass("Arguments", list(self.by_field), frozen=True)

    @functools.cached_property
    def parser(self):
        """The argparse parser; it yields only what is given."""
        top = Parser(self.program, self.description, self.examples, self.usage, argument_default=argparse.SUPPRESS)
        for group, options in itertools.groupby(self.options, key=lambda option: option.group):
            place = top.add_argument_group(group.title, group.note)
            for option in options:
                option.add_to(place)
        return top

    def checked(self, flag):
        """What refuses a word that is no value of the option `flag`, and leaves any other as it is."""
        (option,) = [option for option in self.options if flag in option.flags.split()]

        def check(word):
            option.type(word)
            return word

        return check

    def given(self, argv=None):
        """{field: value} of what a command line (default: the program's) gives. Raises UserError."""
        argv = sys.argv[1:] if argv is None else argv
        self._refuse_foreign(argv)
        given, options = vars(self.parser.parse_args(argv)), self.by_field
        return {field: options[field].combine(x) if options[field].many else x for field, x in given.items()}

    def _refuse_foreign(self, argv):
        """Raises UserError for a flag of the authors' program that is none of this one's, or its unique beginning."""
        own = [flag for option in self.options for flag in f"--help {option.flags} {option.opposite}".split()]
        own += [f"--{name}" for option in self.options for name in option.shortcuts]
        for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
            found = [flag] if flag in self.foreign else [each for each in self.foreign if each.startswith(flag)]
            if len(found) == 1 and not any(each.startswith(flag) for each in own):
                raise UserError(f"{found[0]}: a flag of the authors' program that {self.foreign[found[0]]}")

    def resolve(self, values: Mapping):
        """The arguments with these values and defaults for all others; per-block lists are in full. Raises UserError.

        Fields that no option has are ignored.
        """
        blocks = values.get("n_blocks", 1)
        if not isinstance(blocks, int) or not 1 <= blocks <= MOST_BLOCKS:
            raise UserError(f"--n-blocks {blocks}: should be an integer from 1 to {MOST_BLOCKS}")
        return self.record(**{field: option.resolved(values, blocks) for field, option in self.by_field.items()})

    def restore(self, values, source):
        """The arguments stored in the file `source`; options that are newer have their defaults. Raises UserError."""
        required = [option.field for option in self.options if option.required]
        if not isinstance(values, Mapping) or not all(field in values for field in required):
            raise UserError(f"{source}: holds no arguments of {self.program}")
        try:
            return self.resolve(self.upgraded(values))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: holds no arguments of {self.program} ({first_line(error)})") from error

    def changes(self, before, after):
        """{field: (before, after)} of the options that define a run and differ between two sets of arguments."""
        pairs = {field: (getattr(before, field), getattr(after, field)) for field in self.by_field}
        return {field: pair for field, pair in pairs.items() if pair[0] != pair[1] and not self.by_field[field].free}
