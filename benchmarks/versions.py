"""Runs the tests on the oldest versions that requirements.txt admits, in an environment of their own.

    python benchmarks/versions.py                            # Python of this interpreter, oldest packages
    python3.10 benchmarks/versions.py --keep                 # the oldest Python too; .venv-oldest is used again
    python benchmarks/versions.py --newest -- -k test_models # what the package index offers today; pytest's options

Every `package>=X.Y` of requirements.txt becomes `package==X.Y`, the tools of requirements-dev.txt come as they are.
The tests then run in one process. Exit status: pytest's. The download is large: torch brings its CUDA libraries.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def pinned(requirements):
    """The lines of a requirements file with every lower bound as the version itself; `-r` lines are left out."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    return [re.sub(r">=\s*([\w.]+)$", r"==\1", line) for line in lines if line and not line.startswith("-")]


def install(python, oldest):
    """Installs the program's and the tests' packages for the interpreter `python`."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not oldest:
        subprocess.run([*pip, "--upgrade", "-r", FOLDER / "requirements-dev.txt"], check=True)
        return
    pins = pinned((FOLDER / "requirements.txt").read_text())
    subprocess.run([*pip, *pins, "-r", FOLDER / "requirements-dev.txt"], check=True)


def versions(python):
    """What is installed of the packages that requirements.txt names, as `name version` lines."""
    names = [re.split(r"[^\w-]", line)[0] for line in pinned((FOLDER / "requirements.txt").read_text())]
    code = "import importlib.metadata as m, sys; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return f"python {sys.version.split()[0]}, {found.stdout.strip()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--newest", action="store_true", help="the newest versions instead of the oldest")
    parser.add_argument("--folder", type=Path, help="of the environment (default .venv-oldest or .venv-newest)")
    parser.add_argument("--keep", action="store_true", help="keep it, and use it again where it is there")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    args = parser.parse_args()
    folder = args.folder or FOLDER / (".venv-newest" if args.newest else ".venv-oldest")
    python = folder / "bin" / "python"
    try:
        if not (args.keep and python.exists()):
            venv.create(folder, clear=True, with_pip=True)
            install(python, oldest=not args.newest)
        print(versions(python), flush=True)
        tests = [python, "-m", "pytest", "-p", "no:cacheprovider", *args.pytest]
        status = subprocess.run(tests, cwd=FOLDER, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
