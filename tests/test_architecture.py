"""The plan of ARCHITECTURE.md, checked against the code: which module imports which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nmoe_edge", "nmoe_export", "nmoe_train")

# Module of nmoe_edge -> what it may import of nmoe_edge, besides `errors` and the leaves in common/.
# A module that is missing here fails the test.
EDGE = {
    "__init__": "client device.node device.rules",
    "errors": "",
    "common": "",
    "common.files": "",
    "common.imports": "",
    "common.limits": "",
    "common.memory": "",
    "common.npz": "",
    "common.progress": "",
    "common.public": "",
    "common.schema": "",
    "common.text": "",
    "common.command": "common.text",
    "common.folders": "common.files",
    "common.log": "common.text",
    "protocol": "",
    "protocol.tensor": "",
    "protocol.messages": "protocol.tensor",
    "protocol.wire": "protocol.messages protocol.tensor",
    "protocol.routing": "protocol.messages",
    "protocol.combine": "",
    "protocol.exchange": "protocol.combine protocol.messages protocol.routing",
    "protocol.health": "",
    "protocol.classmix": "",
    "protocol.familiar": "",
    "protocol.answering": "protocol.classmix protocol.combine protocol.routing",
    "protocol.thresholds": "protocol.answering",
    "bundle": "",
    "bundle.onnxfile": "",
    "bundle.manifest": "protocol.messages protocol.tensor",
    "bundle.selftest": "bundle.manifest protocol.routing",
    "bundle.statistics": "bundle.manifest protocol.familiar",
    "bundle.folder": "bundle.manifest bundle.onnxfile bundle.selftest bundle.statistics protocol.familiar",
    "bundle.fleet": "bundle.folder protocol.messages",
    "bundle.image": "bundle.manifest",
    "models": "bundle.folder bundle.selftest",
    "keys": "bundle.fleet",
    "frames": "",
    "status": "",
    "client": "bundle.fleet frames keys protocol.combine protocol.messages protocol.tensor protocol.wire status",
    "device": "",
    "device.metrics": "status",
    "device.rules": "bundle.manifest",
    "device.membership": "bundle.fleet bundle.manifest keys",
    "device.saved_mix": "bundle.manifest protocol.classmix",
    "device.dns": "bundle.fleet",
    "device.mdns": "",
    "device.sockets": "bundle.fleet device.metrics frames keys protocol.messages protocol.wire",
    "device.peers": "bundle.fleet device.dns device.metrics device.sockets protocol.health protocol.messages status",
    "device.service": "device.metrics device.sockets models protocol.messages protocol.tensor protocol.wire",
    "device.extraction": "models",
    "device.requests": (
        "bundle.manifest device.extraction device.metrics device.peers device.rules models protocol.answering"
        " protocol.classmix protocol.exchange protocol.messages protocol.routing protocol.tensor protocol.wire"
    ),
    "device.files": "device.membership device.rules models",
    "device.report": (
        "__init__ device.metrics device.peers device.requests device.rules device.sockets models protocol.classmix"
        " status"
    ),
    "device.node": (
        "bundle.fleet client device.dns device.extraction device.files device.metrics device.peers device.report"
        " device.requests device.rules device.saved_mix device.service device.sockets models protocol.messages"
        " protocol.tensor status"
    ),
    "device.process": "device.mdns device.node",
    "bench": "",
    "bench.samples": "",
    "bench.board": "",
    "bench.cells": "",
    "bench.plan": "bundle.fleet",
    "bench.probe": "bench.board bench.samples bundle.folder models protocol.exchange protocol.routing",
    "bench.load": ("bench.board bench.samples bundle.manifest client protocol.messages protocol.tensor protocol.wire"),
    "bench.record": "bench.board bench.samples",
    "bench.compare": "bench.record bench.samples",
    "bench.notes": "bench.cells bench.probe bench.record bench.samples",
    "bench.tables": "bench.board bench.cells bench.compare bench.notes bench.probe bench.record bench.samples",
    "bench.remote": (
        "bench.board bench.load bench.plan bench.probe bench.record bundle.fleet bundle.folder client keys status"
    ),
    "bench.measure": (
        "__init__ bench.board bench.plan bench.probe bench.record bench.remote bundle.folder device.membership models"
    ),
    "bench.cli": "bench.compare bench.measure bench.plan bench.record bench.tables bundle.fleet options",
    "options": "",
    "display": "bundle.fleet bundle.folder bundle.selftest client protocol.messages status",
    "cli": (
        "bench.cli bundle.fleet bundle.folder bundle.image bundle.manifest client device.node device.process"
        " device.rules device.saved_mix display keys models options"
    ),
    "__main__": "cli",
}
PURE_LEAVES = {"errors", "common.limits", "common.schema", "common.text"}
"""What protocol/ may import besides itself: no disk, clock, thread or log."""

# The modules of the other packages, in an order in which each imports only modules before it.
ORDER = {
    "nmoe_export": (
        "errors targets source graphs calibrate cache samples quantize fp16 fusion simulation speed candidate"
        " assignment trial search bundles existing report export __init__ cli"
    ),
    "nmoe_train": (
        "errors meter vision nets config recipes settings data data.partition data.views data.datasets data.clients"
        " stages stages.federation stages.weights stages.losses stages.privacy stages.extractor stages.scaffold"
        " stages.experts"
        " stages.gate stages.statistics stages.statgate stages.calibration stages.familiarity checkpoint record run"
        " results results.evaluation"
        " results.rules results.pages"
        " results.pages.svg results.pages.plane"
        " results.pages.grid results.pages.charts results.pages.formats results.pages.render"
        " results.pages.resource_tables results.pages.run_page"
        " results.resources trainer assessment pipeline results.centralised results.rivals results.lda"
        " results.baselines"
        " results.paper results.paper.published results.paper.units results.paper.folder results.paper.measured"
        " results.paper.work results.paper.cells results.paper.tables results.paper.figures results.paper.plots"
        " terminal options results.paper.commands __init__ cli"
    ),
}
# Modules of nmoe_edge.protocol that say how a device answers: training and export measure with them.
ANSWERING = ("answering", "classmix", "combine", "familiar", "thresholds")
# Package -> what it may import of its sisters.
SISTERS = {
    "nmoe_edge": (),
    "nmoe_train": (
        *("nmoe_edge.common.*", "nmoe_edge.errors"),
        *(f"nmoe_edge.protocol.{module}" for module in ANSWERING),
    ),
    "nmoe_export": (
        "nmoe_edge",
        "nmoe_edge.common.*",
        *(f"nmoe_edge.bundle.{module}" for module in ("fleet", "folder", "manifest", "selftest", "statistics")),
        *(f"nmoe_edge.protocol.{module}" for module in (*ANSWERING, "routing", "tensor")),
        *("nmoe_edge.errors", "nmoe_edge.models"),
        *("nmoe_train.errors", "nmoe_train.run", "nmoe_train.results.pages.*"),
    ),
}
# Package from outside -> the only modules of nmoe_edge that may import it.
ONLY_IN = {
    "onnxruntime": {"models"},
    "zeroconf": {"device.mdns"},
    "ifaddr": {"device.mdns"},
    "zmq": {"frames", "device.sockets", "client", "keys"},
    "click": {"cli", "bench.cli", "common.command", "options"},
    "torch": set(),
    "onnx": set(),
}
IMPURE = {"socket", "time", "datetime", "threading", "asyncio", "os", "pathlib", "zmq", "random", "subprocess"}


def modules(package):
    """Dotted name inside the package -> path of every module."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / package).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path):
    """Every module that a file imports, also inside its functions and for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if is_module(name)} or {node.module}
    return found


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("name", sorted(EDGE))
def test_a_module_of_the_edge_imports_only_what_the_plan_allows(name):
    found = {m.removeprefix("nmoe_edge.") for m in imports(modules("nmoe_edge")[name]) if m.startswith("nmoe_edge.")}
    leaves = {m for m in EDGE if m.startswith("common.") or m == "errors"}
    if name.startswith("protocol"):
        leaves = PURE_LEAVES
    allowed = set(EDGE[name].split()) | (set() if name in leaves else leaves)
    assert found <= allowed


def test_the_plan_names_every_module_of_the_edge():
    assert set(modules("nmoe_edge")) == set(EDGE)


@pytest.mark.parametrize("package", ORDER)
def test_a_module_imports_only_modules_before_it(package):
    order = ORDER[package].split()
    assert set(order) == set(modules(package))
    for name, path in modules(package).items():
        inside = {found.removeprefix(f"{package}.") for found in imports(path) if found.startswith(f"{package}.")}
        late = [found for found in inside if order.index(found) >= order.index(name)]
        assert not late, f"{package}.{name} imports {late}"


def test_the_stages_of_training_know_neither_runs_nor_results():
    inside = (
        "nmoe_train.config",
        "nmoe_train.data.views",
        "nmoe_train.errors",
        "nmoe_train.nets",
        "nmoe_train.stages.",
    )
    allowed = (*inside, "nmoe_edge.protocol.")
    for name, path in modules("nmoe_train").items():
        if name.startswith("stages"):
            found = {module for module in imports(path) if module.startswith(("nmoe_train", "nmoe_edge"))}
            assert all(module.startswith(allowed) for module in found), name


def test_the_top_level_of_the_edge_has_at_most_twelve_files():
    assert len([path for path in (ROOT / "nmoe_edge").iterdir() if path.is_file()]) <= 12


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_each_other_only_as_planned(package):
    for name, path in modules(package).items():
        for found in imports(path):
            if found.split(".")[0] in set(PACKAGES) - {package}:
                allowed = SISTERS[package]
                whole = f"{found.rpartition('.')[0]}.*" in allowed
                assert whole or found in allowed, f"{package}.{name} imports {found}"


@pytest.mark.parametrize(("outside", "inside"), ONLY_IN.items())
def test_a_foreign_package_is_imported_in_one_place(outside, inside):
    edge = modules("nmoe_edge")
    users = {name for name, path in edge.items() if outside in {found.split(".")[0] for found in imports(path)}}
    assert users <= inside


def test_the_protocol_imports_no_socket_no_clock_and_no_disk():
    for name, path in modules("nmoe_edge").items():
        if name.startswith("protocol"):
            assert not {found.split(".")[0] for found in imports(path)} & IMPURE, name


def test_nothing_is_pickled_anywhere():
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for package in PACKAGES:
        for path in modules(package).values():
            assert not {found.split(".")[0] for found in imports(path)} & forbidden_modules, path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in {"torch.load", "torch.save"}, path
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {"np.load", "np.lib.format.write_array"}:
                    assert "allow_pickle=False" in {ast.unparse(keyword) for keyword in node.keywords}, path
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    assert ast.unparse(node) == "allow_pickle=False", path


def in_a_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_every_module_of_the_edge_brings_no_torch_no_onnx_and_no_sister():
    names = [f"nmoe_edge.{name}" for name in EDGE if not name.startswith("__")]
    loaded = in_a_fresh_interpreter(f"import sys, {', '.join(names)}; print(*sys.modules)")
    assert "nmoe_edge.models" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "onnx", "nmoe_train", "nmoe_export"}


def test_asking_a_command_for_help_loads_nothing_heavy():
    code = "import sys, nmoe_edge.cli, nmoe_export.cli, nmoe_train.cli; print(*sys.modules)"
    assert not in_a_fresh_interpreter(code) & {"numpy", "onnxruntime", "torch", "onnx", "zmq", "importlib.metadata"}


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_small(package):
    for name, path in modules(package).items():
        assert len(path.read_text().splitlines()) <= 400, f"split {package}.{name}: it has more than one subject"


def test_architecture_md_names_every_module():
    words = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(words.splitlines()) <= 150
    plan = words.partition("## Where things are")[2].partition("\n## ")[0]
    for package in PACKAGES:
        for path in modules(package).values():
            if not path.stem.startswith("__"):
                assert re.search(rf"\b{path.stem}\b", plan), f"{package}/{path.name} is missing in ARCHITECTURE.md"
