"""The house: what may import what, how long things may be, what no source may do, and the README's map."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter

from tests.conftest import ROOT

LIBRARIES = ("rainbow", "models", "utils")
GROUND = ("utils.errors", "utils.files", "utils.device", "utils.lock", "utils.machine")
# What the modules under a name may import, the longest name deciding; scripts import any library, and nothing a script.
ARROWS = {
    "rainbow": ("rainbow",),
    "models": ("models",),
    "models.rainbow_layers": ("models", "rainbow"),
    **dict.fromkeys(GROUND, GROUND),
    "utils.data": (*GROUND, "utils.data", "models.signal", "models.names"),
    "utils.runs": (*GROUND, "utils.data", "utils.runs", "models"),
    "utils.experiments": (*GROUND, "utils.experiments", "utils.runs.options"),
    "utils.figures": LIBRARIES,
}
PATHS = [*ROOT.glob("*.py"), *(path for library in LIBRARIES for path in (ROOT / library).rglob("*.py"))]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in PATHS
}
UNPICKLER = "utils.data.safe_pickle"  # restricted to arrays, lists and numbers


def is_under(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def imports(tree):
    """The names of all modules that a module imports, in functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in TREES else node.module for name in names)


IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}
GRAPH = {name: imported & TREES.keys() for name, imported in IMPORTS.items()}


def violations():
    for name, imported in GRAPH.items():
        place = max((place for place in ARROWS if is_under(name, place)), key=len, default=None)
        allowed = ARROWS[place] if place else () if is_under(name, "utils") else LIBRARIES
        yield from (f"{name} -> {other}" for other in imported if not any(is_under(other, each) for each in allowed))
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= 150 and name != "models.fast":
                yield f"{name}: class {node.name}"
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 40:
                yield f"{name}: function {node.name}"


def test_arrows_and_lengths():
    assert not list(violations())


def test_no_module_imports_itself_in_a_circle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(TREES)


def test_the_analysis_needs_only_torch_numpy_and_scipy():
    roots = {each.partition(".")[0] for name in TREES if is_under(name, "rainbow") for each in IMPORTS[name]}
    assert roots <= {"rainbow", "torch", "numpy", "scipy", *sys.stdlib_module_names}


def test_experiments_run_without_torch():
    names = [name for name in TREES if is_under(name, "utils.experiments")]
    program = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"


def test_nothing_read_is_run():
    """No eval, no star import, and no pickle but what a restricted unpickler reads."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), name
            if isinstance(node, ast.Attribute) and name != UNPICKLER:
                assert ast.unparse(node) not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), name
            if isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec", "__import__"), name
                assert called != "torch.load" or keywords.get("weights_only") == "True", name
                assert keywords.get("allow_pickle", "False") == "False", name


def test_the_readme_names_every_folder():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    readme = (ROOT / "README.md").read_text()
    folders = {path.parent.name for path in ROOT.glob("[!.]*/[!_]*")}  # a folder of caches only is none
    folders = {name for name in folders if not any(fnmatch(name, each) for each in ignored)}
    assert {name for name in folders if f"`{name}/`" not in readme} == set()
