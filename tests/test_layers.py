"""Imports go one way: a module imports only from layers below its own, or from its own layer without a circle."""

import ast
from graphlib import TopologicalSorter

from tests.support.paths import ROOT

#: From the bottom up. A name stands for a module, or for all modules of a package; the longest name that fits counts.
LAYERS = """
utils.errors utils.types utils.random_streams metrics
utils.runtime
utils.alife utils.class_similarity utils.contrastive utils.latent_masked utils.latent_space \
utils.loss utils.distillation utils.masks utils.pseudo utils.pod
utils.balance utils.checkpointing utils.options utils.optimizer utils.scheduler
utils.reporting
dataset modules
segmentation_module
methods
argparser
metrics.evaluation
train
run"""
HEIGHT = {name: height for height, layer in enumerate(LAYERS.splitlines()) for name in layer.split()}
PACKAGES = ("utils", "metrics", "dataset", "modules", "methods")
FILES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in FILES
    if path.read_text()
}


def height(module: str) -> int | None:
    """Layer of a module, by the longest of its prefixes that has one."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((HEIGHT[prefix] for prefix in prefixes if prefix in HEIGHT), None)


def test_imports_go_down():
    below = {name: set() for name in MODULES}
    for name, node in ((name, node) for name, tree in MODULES.items() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):  # of a module, or of what is in one
            paths = {f"{node.module}.{alias.name}" for alias in node.names}
            below[name] |= paths if paths <= set(MODULES) else paths | {node.module}
        elif isinstance(node, ast.Import):
            below[name] |= {alias.name for alias in node.names}
    below = {name: names & set(MODULES) for name, names in below.items()}
    assert [name for name in MODULES if height(name) is None] == [], "name their layer above"
    assert [(a, b) for a, names in below.items() for b in names if height(b) > height(a)] == []
    TopologicalSorter(below).prepare()  # raises CycleError
