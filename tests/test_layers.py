"""Imports go one way: a module imports only from layers below its own, or from its own layer without a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

#: From the bottom up; a package stands for its modules, but utils/ spans several layers.
LAYERS = """
metrics utils.types utils.flags utils.boundary utils.amp utils.distributed utils.checkpoint utils.logger utils.scheduler utils.signals \
utils.random_state utils.events utils.memory utils.structure utils.masks utils.pseudo utils.pod_options utils.pod_distance utils.pod \
utils.distillation utils.loss
dataset modules
segmentation_module
utils.equilibrium utils.optimizer utils.regularizer utils.store utils.networks utils.results utils.visualize
methods
utils.checks argparser
train
run"""
HEIGHT = {name: height for height, layer in enumerate(LAYERS.splitlines()) for name in layer.split()}
ROOT = Path(__file__).parent.parent
FILES = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0][0] != "."]
MODULES = {".".join(p.with_suffix("").parts).removesuffix(".__init__"): ast.parse((ROOT / p).read_text())
           for p in FILES if p.parts[0] not in ("tests", "scripts") and p.parts != ("utils", "__init__.py")}  # fmt: skip


def test_imports_go_down():
    below = {name: set() for name in MODULES}
    for name, node in ((name, node) for name, tree in MODULES.items() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):  # of a module, or of what is in one
            paths = {f"{node.module}.{alias.name}" for alias in node.names}
            below[name] |= paths if paths <= set(MODULES) else paths | {node.module}
        elif isinstance(node, ast.Import):
            below[name] |= {alias.name for alias in node.names}
    below = {name: names & set(MODULES) for name, names in below.items()}
    height = {name: HEIGHT.get(name, HEIGHT.get(name.split(".")[0])) for name in MODULES}
    assert [name for name in MODULES if height[name] is None] == [], "name their layer above"
    assert [(a, b) for a, names in below.items() for b in names if height[b] > height[a]] == []
    TopologicalSorter(below).prepare()  # raises CycleError
