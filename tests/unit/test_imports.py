"""The import order of docs/design.md, read from the sources. The checker is itself checked, on small made-up trees."""

import ast
import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHELVES = {
    "models",
    "losses",
    "masks",
    "metrics",
    "optim",
    "augment",
    "classify",
    "decode",
    "detect",
    "diffusion",
    "hear",
    "inspect",
    "attribution",
    "rbm",
    "cluster",
    "blackbox",
    "control",
    "search",
    "clean",
    "privacy",
    "splits",
    "data",
    "compress",
    "export",
    "serve",
}
# Short names for `python -m`, and the room that each opens.
COMMANDS = {"dl_jax.results": "harness", "dl_jax.watch": "harness"}
# `dl_jax.core.<name>` may import the names before its own.
CORE = (
    "errors",
    "cores",
    "bucket",
    "files",
    "inputs",
    "events",
    "ragged",
    "stream",
    "leaves",
    "flops",
    "equations",
    "step",
    "devices",
    "seeds",
    "pmap",
    "target",
    "recorder",
    "program",
    "fit",
    "evaluate",
)
ON_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "qwix", "jax2onnx"}
SLOW = {
    "ai_edge_litert",
    "coremltools",
    "litert_converter",
    "stablehlo_coreml",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "matplotlib",
    "tensorboardX",
    "qwix",
    "jax2onnx",
    "onnx",
    "onnxruntime",
    "sacrebleu",
    "numpyro",
    "optuna",
    "cleanlab",
    "mlxtend",
    "dp_accounting",
    "scipy",
}
FOREIGN = {"tensorflow", "torch"}


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # dotted; for `from a import b` it is a.b
    line: int
    at_start: bool  # runs when the module is imported, rather than inside a function
    typing: bool  # below `if TYPE_CHECKING:`, never runs


@dataclasses.dataclass(frozen=True)
class Module:
    name: str  # dotted, from the root: dl_jax.data.source
    path: str
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        """The file or folder below dl_jax; "" for dl_jax/__init__.py and outside."""
        return self.name.split(".")[1] if self.name.startswith("dl_jax.") else ""


def read_imports(source: str, package: str) -> Iterator[Import]:
    """All imports of a file in `package`, relative ones resolved."""

    def visit(node: ast.AST, at_start: bool, typing: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, at_start, typing) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                origin = ".".join([*parts, *([module] if module else [])])
                yield from (Import(f"{origin}.{alias.name}", node.lineno, at_start, typing) for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
                yield Import(str(name), node.lineno, at_start, typing)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        body = node.body if isinstance(node, ast.If) else []
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_start and not is_function, typing or (is_typing and child in body))

    yield from visit(ast.parse(source), True, False)


def read_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for folder in ("dl_jax", "experiments", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            package = ".".join(parts[:-1])
            name = package if parts[-1] == "__init__" else ".".join(parts)
            imports = tuple(read_imports(path.read_text(), package))
            modules[name] = Module(name, str(path.relative_to(root)), imports)
    return modules


def target(name: str, modules: Mapping[str, Module]) -> str | None:
    """The module of ours that an import of `name` runs: `dl_jax.data.load` is dl_jax.data, or a file of that name."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def house(name: str) -> str:
    """Where a module of ours stands: "core", "shelf" or "harness"; "" for dl_jax itself and where it has no place."""
    room = COMMANDS.get(name) or (name.split(".")[1] if name.startswith("dl_jax.") else "")
    return room if room in ("core", "harness") else "shelf" if room in SHELVES else ""


def order_problem(module: Module, imported: Module) -> str | None:
    """Why `module` must not import `imported`, a module of dl_jax."""
    if not module.name.startswith("dl_jax"):
        return None
    if module.name == "dl_jax":
        return "dl_jax/__init__.py imports nothing of ours"
    here, there = house(module.name), house(imported.name)
    if here == "core" and there not in ("core", ""):
        return f"{imported.name} stands above core/"
    if {here, there} == {"shelf", "harness"}:
        return f"shelves and harness/ do not know each other: {imported.name}"
    if here == there == "core":
        mine, other = (name.removeprefix("dl_jax.core").removeprefix(".") for name in (module.name, imported.name))
        if not mine:
            return "core/__init__.py imports nothing: data/ reads core/errors.py and must not load JAX"
        if mine in CORE and other in CORE and CORE.index(other) > CORE.index(mine):
            return f"core/{other}.py stands above core/{mine}.py"
    return None


def package_problem(module: Module, imported: Import) -> str | None:
    """Why `module` must not import this package of others, or must not import it there."""
    package = imported.name.split(".")[0]
    if imported.name == "?":
        return "no string stands for code"
    if package == "flax" and module.room != "models":
        return "only models/ imports flax"
    runs_at_start = imported.at_start and not imported.typing and not module.name.startswith("benchmarks")
    if runs_at_start and package in SLOW:
        return f"{package} takes seconds to import: import it inside the function that needs it"
    if runs_at_start and package in FOREIGN:
        return f"{package} is not one of our dependencies: import it inside the function that needs it"
    return None


def problems_of(module: Module, modules: Mapping[str, Module]) -> Iterator[tuple[int, str]]:
    """(line, what is wrong there)."""
    if module.room and not house(module.name):
        yield (
            1,
            f"{module.room} has no place in the house: give it one in this test and in docs/design.md",
        )
    if module.name.startswith("dl_jax.core.") and module.name.split(".")[2] not in CORE:
        yield 1, f"{module.name} has no place in core/: give it one in this test and in docs/design.md"
    scripts = {path.rpartition(".")[2] for path in modules if path.startswith("experiments.")}
    for each in module.imports:
        ours = target(each.name, modules)
        if each.name.split(".")[0] in {"experiments", *scripts}:
            yield each.line, "nobody imports experiments"
        elif ours and ours.startswith("dl_jax"):
            problem = order_problem(module, modules[ours])
            if problem:
                yield each.line, problem
        else:
            problem = package_problem(module, each)
            if problem:
                yield each.line, problem


def graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it runs, at once or later."""
    return {
        name: {t for each in module.imports if not each.typing and (t := target(each.name, modules)) and t != name}
        for name, module in modules.items()
    }


def path_between(start: str, goals: set[str], edges: Mapping[str, set[str]]) -> list[str] | None:
    """The shortest way along `edges`, of at least one step, from `start` to one of `goals`."""
    ways, seen = [[start, following] for following in sorted(edges[start])], set()
    for way in ways:
        if way[-1] in goals:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            ways.extend([*way, following] for following in sorted(edges[way[-1]]))
    return None


def problems(root: Path) -> list[str]:
    modules = read_modules(root)
    edges = graph(modules)
    found = [f"{m.path}:{line}: {what}" for m in modules.values() for line, what in problems_of(m, modules)]
    on_jax = {
        name
        for name, module in modules.items()
        if any(each.name.split(".")[0] in ON_JAX and not each.typing for each in module.imports)
    }
    for name, module in modules.items():
        circle = path_between(name, {name}, edges)
        if circle and name == min(circle):
            found.append(f"{module.path}: a cycle, {' -> '.join(circle)}")
        if module.room == "data":
            way = [name] if name in on_jax else path_between(name, on_jax, edges)
            if way:
                found.append(f"{module.path}: data/ never imports jax: {' -> '.join([*way, 'jax'])}")
    return found


def test_the_import_order_holds() -> None:
    assert problems(ROOT) == []


def test_every_folder_is_read() -> None:
    modules = read_modules(ROOT)
    assert {"dl_jax", "dl_jax.core.step", "dl_jax.models.vision.lenet", "dl_jax.core.errors"} <= modules.keys()
    assert any(each.name == "flax.linen" for each in modules["dl_jax.models.vision.lenet"].imports)


LEGAL = {
    "dl_jax/__init__.py": "",
    "dl_jax/results.py": "from dl_jax.harness.results.page import main",
    "dl_jax/core/__init__.py": "",
    "dl_jax/core/errors.py": "import difflib",
    "dl_jax/core/step.py": "import jax, optax",
    "dl_jax/core/fit.py": "import numpy as np\nfrom dl_jax.core.step import State",
    "dl_jax/losses/__init__.py": "from ..core.errors import InputError\nfrom dl_jax.core.step import Tree",
    "dl_jax/metrics.py": "from dl_jax import losses",
    "dl_jax/inspect.py": "from dl_jax.core import step",
    "dl_jax/data/__init__.py": "from dl_jax.data.source import load",
    "dl_jax/data/source.py": "from typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n  from dl_jax.core.step import Batch\n"
    "from .batches import epoch\nfrom ..core.errors import InputError\ndef load():\n  import tensorflow_datasets",
    "dl_jax/data/batches.py": "import numpy",
    "dl_jax/models/__init__.py": "",
    "dl_jax/models/net.py": "from flax import linen as nn\nimport flax.linen\nfrom dl_jax.models import parts",
    "dl_jax/models/parts.py": "",
    "dl_jax/harness/__init__.py": "from dl_jax.harness.run import Run",
    "dl_jax/harness/store.py": "def save():\n  import orbax.checkpoint\n  from matplotlib import pyplot",
    "dl_jax/harness/run.py": "from dl_jax.harness import store\nfrom dl_jax.core.step import Tree",
    "dl_jax/harness/results/page.py": "from dl_jax.harness.run import Run",
    "experiments/vision/lenet.py": "import jax\nimport dl_jax.models.net\nfrom dl_jax import data, harness",
    "benchmarks/train_step.py": "from dl_jax.core import fit\ntry:\n  import torch\nexcept ImportError:\n  pass",
}


def write(root: Path, tree: Mapping[str, str]) -> Path:
    for path, text in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_legal_tree_has_no_problems(tmp_path: Path) -> None:
    assert problems(write(tmp_path, LEGAL)) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "dl_jax/core/errors.py",
            "from dl_jax.core.fit import fit",
            "errors.py:1: core/fit.py stands above core/errors",
        ),
        ("dl_jax/core/step.py", "def f():\n  from . import fit", "step.py:2: core/fit.py stands above core/step.py"),
        ("dl_jax/core/fit.py", "import dl_jax.models.net", "fit.py:1: dl_jax.models.net stands above core/"),
        ("dl_jax/core/fit.py", "from ..harness import run", "fit.py:1: dl_jax.harness.run stands above core/"),
        ("dl_jax/core/fit.py", "def f():\n  from dl_jax.data import load", "fit.py:2: dl_jax.data stands above core/"),
        (
            "dl_jax/core/__init__.py",
            "from dl_jax.core import errors",
            "__init__.py:1: core/__init__.py imports nothing",
        ),
        ("dl_jax/core/extra.py", "", "extra.py:1: dl_jax.core.extra has no place in core/"),
        (
            "dl_jax/metrics.py",
            "from dl_jax.harness import run",
            "metrics.py:1: shelves and harness/ do not know each other",
        ),
        (
            "dl_jax/harness/run.py",
            "from dl_jax import metrics",
            "run.py:1: shelves and harness/ do not know each other",
        ),
        (
            "dl_jax/results.py",
            "from dl_jax import metrics",
            "results.py:1: shelves and harness/ do not know each other",
        ),
        ("dl_jax/__init__.py", "from dl_jax.core.fit import fit", "__init__.py:1: dl_jax/__init__.py imports nothing"),
        ("dl_jax/extra.py", "", "extra.py:1: extra has no place in the house"),
        ("dl_jax/metrics.py", "from flax import linen", "metrics.py:1: only models/ imports flax"),
        (
            "dl_jax/harness/run.py",
            "def f():\n  import flax.linen as nn",
            "run.py:2: only models/ imports flax",
        ),
        ("experiments/vision/lenet.py", "import flax", "lenet.py:1: only models/ imports flax"),
        ("benchmarks/train_step.py", "import flax", "train_step.py:1: only models/ imports flax"),
        ("dl_jax/data/batches.py", "import jax.numpy as jnp", "data/ never imports jax: dl_jax.data.batches -> jax"),
        ("dl_jax/data/batches.py", "def f():\n  import optax", "data/ never imports jax: dl_jax.data.batches -> jax"),
        (
            "dl_jax/data/batches.py",
            "from dl_jax.core import step",
            "jax: dl_jax.data.batches -> dl_jax.core.step -> jax",
        ),
        (
            "dl_jax/data/batches.py",
            "from dl_jax import metrics",
            "dl_jax.metrics -> dl_jax.losses -> dl_jax.core.step -> jax",
        ),
        ("dl_jax/harness/run.py", "from experiments.vision import lenet", "run.py:1: nobody imports experiments"),
        ("benchmarks/train_step.py", "import experiments.vision.lenet", "py:1: nobody imports experiments"),
        ("experiments/vision/other.py", "import lenet", "other.py:1: nobody imports experiments"),
        ("experiments/vision/other.py", "from . import lenet", "other.py:1: nobody imports experiments"),
        ("dl_jax/harness/store.py", "import orbax.checkpoint as ocp", "store.py:1: orbax takes seconds to import"),
        ("dl_jax/harness/run.py", "class A:\n  from matplotlib import pyplot", "run.py:2: matplotlib takes seconds"),
        (
            "dl_jax/harness/run.py",
            "try:\n  import tensorboardX\nexcept ImportError: pass",
            "py:2: tensorboardX takes seconds",
        ),
        ("dl_jax/data/source.py", "import tensorflow_datasets as tfds", "py:1: tensorflow_datasets takes seconds"),
        ("dl_jax/data/batches.py", "import grain", "batches.py:1: grain takes seconds to import"),
        ("experiments/vision/lenet.py", "import matplotlib.pyplot", "lenet.py:1: matplotlib takes seconds to import"),
        ("dl_jax/harness/run.py", "if a:\n  pass\nelse:\n  import qwix", "run.py:4: qwix takes seconds to import"),
        (
            "dl_jax/harness/run.py",
            "if TYPE_CHECKING:\n  pass\nelse:\n  import qwix",
            "run.py:4: qwix takes seconds to import",
        ),
        ("dl_jax/data/source.py", "import tensorflow as tf", "source.py:1: tensorflow is not one of our dependencies"),
        ("experiments/vision/lenet.py", "import torch", "lenet.py:1: torch is not one of our dependencies"),
        ("dl_jax/harness/run.py", "import importlib\nimportlib.import_module(name)", "py:2: no string stands for code"),
        ("dl_jax/harness/run.py", "def f(name):\n  return __import__(name)", "run.py:2: no string stands for code"),
        (
            "dl_jax/core/fit.py",
            "from importlib import *\nimport_module('dl_jax.data')",
            "fit.py:2: dl_jax.data stands above core/",
        ),
        (
            "dl_jax/losses/__init__.py",
            "from dl_jax import metrics",
            "a cycle, dl_jax.losses -> dl_jax.metrics -> dl_jax.losses",
        ),
        ("dl_jax/losses/__init__.py", "def f():\n  from .. import metrics", "a cycle, dl_jax.losses -> dl_jax.metrics"),
        (
            "dl_jax/models/parts.py",
            "from .net import Net",
            "a cycle, dl_jax.models.net -> dl_jax.models.parts -> dl_jax.models.net",
        ),
    ],
)
def test_a_problem_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    found = problems(write(tmp_path, {**LEGAL, path: text}))
    assert any(expected in problem for problem in found), found


def test_a_script_hides_no_module() -> None:
    """A script's folder comes first in `sys.path`, so JAX would import benchmarks/compression.py for Python 3.14's
    `compression`."""
    of_newer_pythons = {"annotationlib", "compression"}
    taken = of_newer_pythons | sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    scripts = [*ROOT.glob("experiments/*/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert scripts
    assert [path.name for path in scripts if path.stem in taken] == []
