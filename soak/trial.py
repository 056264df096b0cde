"""One check at work: a folder to write to, random numbers, and what did not hold."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from soak.folders import differences, left_overs, unreadable


@dataclass
class Trial:
    """A check's folder, its random numbers, how many kills are asked for, and the failures it has found."""

    folder: Path
    random: random.Random
    kills: int
    failures: list = field(default_factory=list)

    def expect(self, holds, message):
        """Notes a failure unless something holds. Returns whether it does."""
        if not holds:
            self.failures.append(str(message))
        return bool(holds)

    def expect_status(self, program, *statuses):
        """A program should have ended with one of the statuses."""
        return self.expect(
            program.status in statuses, f"{program.command[0]} ended with {program.status}:\n{program.output[-1500:]}"
        )

    def expect_readable(self, root):
        for complaint in unreadable(root):
            self.expect(False, complaint)

    def expect_same(self, root, whole, ignored=()):
        """Everything under `root` should be as in the undisturbed `whole`, with nothing left over."""
        for difference in differences(root, whole, ignored):
            self.expect(False, difference)
        for path in left_overs(root):
            self.expect(path.name in ignored, f"{path} is left over")

    def fresh(self, name, source=None):
        """A new folder of this name, empty or a copy of `source`; one of the same name before is gone."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        if source is None:
            root.mkdir()
        else:
            shutil.copytree(source, root)
        return root
