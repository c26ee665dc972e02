"""What the repository promises about itself: who imports whom, what an import costs, what is stored and how."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("trainers", "pipelines", "evaluation", "configs")  # top-level folder -> fastgen.<folder>
HEAVY = {"diffusers", "transformers", "torchvision", "wandb", "trackio", "tensorboard"}
CORE_NEEDS = {"torch", "numpy", "PIL", "yaml", "safetensors"}
CORE_ALSO = {"cli": {"accelerate", "typer", "click", "rich"}, "train": {"accelerate", "rich"}, "dry_run": {"rich"}}
EVALUATION_LAZY = HEAVY | {"torchmetrics", "cleanfid", "scipy"}


def sources() -> dict[str, Path]:
    """Every module that gets installed, by its import name."""
    found = {}
    for folder in ("fastgen", *DOORS):
        prefix = () if folder == "fastgen" else ("fastgen",)
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in SOURCES.items()}


def imports(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """The absolute names that these nodes of module ``name`` import: a module where it is one of ours."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base)
    return found


def when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those inside functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from when_imported(node)


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def python(code: str) -> str:
    """Run ``code`` in a new interpreter, outside the repository."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.endswith("__main__")])
def test_every_module_imports(name):
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).name == SOURCES[name].name


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith(tuple(f"fastgen.{d}" for d in DOORS))])
def test_a_door_imports_the_core_and_no_other_door(name):
    own = name.split(".")[1]
    others = {f"fastgen.{door}" for door in DOORS if door != own} | set(DOORS)
    used = imports(name, ast.walk(TREES[name]))
    assert not {u for u in used if any(u == o or u.startswith(o + ".") for o in others)}


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith(tuple(f"fastgen.{d}" for d in DOORS))])
def test_the_core_finds_doors_by_name_only(name):
    used = imports(name, ast.walk(TREES[name]))
    assert not {u for u in used if u.split(".")[:1] != ["fastgen"] and u.partition(".")[0] in DOORS}
    if name != "fastgen.cli":  # the only file that wires the rooms together
        assert not {u for u in used if u.startswith("fastgen.") and u.split(".")[1] in DOORS}


@pytest.mark.parametrize(
    "name", [n for n, p in SOURCES.items() if p.parent in (ROOT / "fastgen", ROOT / "fastgen/data")]
)
def test_the_core_needs_torch_and_little_else(name):
    used = roots(imports(name, when_imported(TREES[name]))) - {"fastgen"} - set(sys.stdlib_module_names)
    assert used <= CORE_NEEDS | CORE_ALSO.get(name.rpartition(".")[2], set())


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("fastgen.evaluation")])
def test_metrics_import_heavy_packages_inside_functions(name):
    assert not roots(imports(name, when_imported(TREES[name]))) & EVALUATION_LAZY


def test_no_import_cycles():
    graph = {name: (imports(name, ast.walk(tree)) & SOURCES.keys()) - {name} for name, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


NOT_CORE = {"__main__", *CORE_ALSO}
CORE = [n for n, path in SOURCES.items() if path.parent == ROOT / "fastgen" and n.rpartition(".")[2] not in NOT_CORE]


def test_importing_fastgen_is_light():
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = set(json.loads(python(f"import {', '.join(CORE)}\n{report}")))
    assert "fastgen" in loaded
    assert not loaded & (HEAVY | {"torchmetrics", "cleanfid", "scipy", "accelerate", "peft"})


def test_importing_fastgen_takes_under_two_seconds_beyond_torch():
    clock = f"import time, torch; t = time.perf_counter(); import {', '.join(CORE)}; print(time.perf_counter() - t)"
    assert min(float(python(clock)) for _ in range(3)) < 2.0


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Each place where something is, or may be, pickled to or from a file; reading tensors alone is not."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    tensors_alone = {
        id(call.func) for call in calls if any(ast.unparse(k) == "weights_only=True" for k in call.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in roots(set(names)) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                yield f"line {node.lineno}: import of {name}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                for name in {"save", "load"} & {alias.name for alias in node.names}:
                    yield f"line {node.lineno}: torch.{name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in tensors_alone:
            called = f"{node.value.id}.{node.attr}"
            if called in {"torch.save", "torch.load", "accelerator.save_state", "accelerator.load_state"}:
                yield f"line {node.lineno}: {called}"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in {
                ("allow_pickle", True),
                ("safe_serialization", False),
                ("use_safetensors", False),
                ("weights_only", False),
            }:
                yield f"line {node.value.lineno}: {node.arg}={node.value.value!r}"


@pytest.mark.parametrize("path", sorted([*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]), ids=str)
def test_no_pickle(path):
    assert not list(unsafe(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "from torch import save",
        "np.load(path, allow_pickle=True)",
        "pipe.save_pretrained(path, safe_serialization=False)",
        "accelerator.save_state(path)",
    ],
)
def test_the_search_for_pickle_finds_it(line):
    assert len(list(unsafe(ast.parse(line)))) == 1


def test_reading_tensors_alone_is_no_pickle():
    assert not list(unsafe(ast.parse("torch.load(path, map_location='cpu', weights_only=True)")))
    assert len(list(unsafe(ast.parse("torch.load(path, weights_only=False)")))) == 2


def test_every_package_is_named_in_pyproject():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    folders = {name.rpartition(".")[0] if path.name != "__init__.py" else name for name, path in SOURCES.items()}
    assert folders <= packages, "a folder with modules lacks its __init__.py"
    assert not {name for name in packages if f'\n    "{name}",' not in listed}


def stored() -> list[Path]:
    """The files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_stay_small():
    assets = ROOT / "fastgen" / "emoji" / "assets"
    sizes = {path: path.stat().st_size for path in stored()}
    assert not {str(path): size for path, size in sizes.items() if size > 5e6 and assets not in path.parents}
    assert sum(size for path, size in sizes.items() if assets in path.parents) <= 70e6
