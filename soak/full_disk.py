"""Runs a script on a disk that is full from its Nth write on.

    python soak/full_disk.py N FOLDER SCRIPT [ARGUMENT …]

Files opened for writing, renames and links under FOLDER are counted. At the Nth, files may no longer grow (EFBIG,
which the kernel gives as it gives ENOSPC) or the rename is refused; "full_disk: PATH" on stderr says which it was.
"""

import errno
import os
import resource
import runpy
import sys

WRITING = os.O_WRONLY | os.O_RDWR


class FullDisk:
    """An audit hook: Python calls it before everything that touches a file."""

    def __init__(self, first, folder):
        self.left, self.folder = first, os.path.realpath(folder)

    def __call__(self, event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self._count(arguments[0], self._fill)
        elif event in ("os.rename", "os.link"):
            self._count(arguments[1], self._refuse)

    def _count(self, path, act):
        if isinstance(path, int) or not os.path.realpath(path).startswith(self.folder + os.sep):
            return
        self.left -= 1
        if self.left == 0:
            os.write(2, f"full_disk: {os.fsdecode(path)}\n".encode())
            act(path)

    def _fill(self, path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _refuse(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def main():
    first, folder, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.addaudithook(FullDisk(int(first), folder))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
