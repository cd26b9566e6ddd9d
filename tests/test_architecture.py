"""The floor plan, held against the code: who imports whom, and what is imported by nobody."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nmoe_edge", "nmoe_export", "nmoe_train")

# Module of nmoe_edge -> the modules of nmoe_edge that it may import. A module that is not listed fails the test.
LEAVES: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        *(
            "__init__",
            "errors",
            "schema",
            "npz",
            "folders",
            "onnxfile",
            "program",
            "protocol",
            "counts",
            "log",
            "memory",
        ),
        *("bench.samples", "bench.board"),
    ),
    (),
)
EDGE = LEAVES | {
    "bench": (),
    "protocol.tensor": ("errors",),
    "protocol.messages": ("errors", "schema", "protocol.tensor"),
    "protocol.wire": ("errors", "schema", "protocol.messages", "protocol.tensor"),
    "protocol.routing": ("errors", "protocol.messages"),
    "protocol.combine": ("errors",),
    "protocol.health": (),
    "protocol.classmix": (),
    "protocol.exchange": ("errors", "protocol.combine", "protocol.messages", "protocol.routing"),
    "manifest": ("errors", "schema", "protocol.messages", "protocol.tensor"),
    "bundle": ("errors", "manifest", "npz", "folders", "onnxfile"),
    "fleet": ("errors", "schema", "bundle", "protocol.messages"),
    "models": ("errors", "bundle", "protocol.routing"),
    "image": ("errors", "manifest", "npz"),
    "keys": ("errors", "fleet"),
    "place": ("errors", "manifest", "fleet", "keys"),
    "state": ("log", "manifest", "npz", "protocol.classmix"),
    "frames": (),
    "client": (
        "errors",
        "schema",
        "fleet",
        "frames",
        "keys",
        *(f"protocol.{part}" for part in ("combine", "messages", "tensor", "wire")),
    ),
    "names": ("fleet",),
    "sockets": ("errors", "counts", "log", "fleet", "frames", "keys", "protocol.messages", "protocol.wire"),
    "peers": ("errors", "counts", "log", "fleet", "names", "sockets", "protocol.health", "protocol.messages"),
    "service": (
        "errors",
        "counts",
        "models",
        "sockets",
        *(f"protocol.{part}" for part in ("messages", "tensor", "wire")),
    ),
    "front": ("errors", "models"),
    "origin": (
        *("errors", "counts", "manifest", "models", "front", "peers"),
        *(f"protocol.{part}" for part in ("classmix", "combine", "exchange", "messages", "routing", "tensor", "wire")),
    ),
    "discover": (),
    "node": (
        *("errors", "schema", "counts", "log", "memory", "bundle", "models", "place", "state", "client"),
        *("folders", "names", "sockets", "peers", "service", "front", "origin"),
        *("protocol.messages", "protocol.tensor"),
    ),
    "bench.probe": (
        *("errors", "schema", "memory", "bench.samples", "bench.board", "bundle", "models"),
        *("protocol.exchange", "protocol.routing"),
    ),
    "bench.load": (
        *("errors", "bench.samples", "bench.board", "manifest", "client"),
        *(f"protocol.{part}" for part in ("messages", "tensor", "wire")),
    ),
    "bench.record": ("errors", "schema", "bench.samples", "bench.board"),
    "bench.compare": ("bench.samples", "bench.record"),
    "bench.tables": ("program", "bench.samples", "bench.board", "bench.probe", "bench.record", "bench.compare"),
    "bench.measure": (
        *("__init__", "errors", "schema", "bench.board", "bundle", "fleet", "keys", "place", "models", "client"),
        *("bench.probe", "bench.load", "bench.record"),
    ),
    "bench.cli": (
        "errors",
        "schema",
        "program",
        "bench.record",
        "bench.compare",
        "bench.tables",
        "bench.measure",
        "fleet",
    ),
    "screens": ("program", "bundle", "fleet", "client"),
    "cli": (
        *(
            "errors",
            "schema",
            "program",
            "screens",
            "bench.cli",
            "log",
            "memory",
            "manifest",
            "bundle",
            "fleet",
            "models",
            "image",
            "keys",
            "state",
        ),
        *("client", "origin", "node", "discover"),
    ),
    "__main__": ("cli",),
}
# Package -> what it may import of its sisters.
SISTERS = {
    "nmoe_edge": (),
    "nmoe_train": tuple(f"nmoe_edge.{leaf}" for leaf in ("schema", "npz", "folders", "program")),
    "nmoe_export": (
        "nmoe_edge",
        *(f"nmoe_train.{module}" for module in ("charts", "errors", "evaluate", "report", "run")),
        *(
            f"nmoe_edge.{module}"
            for module in ("bundle", "errors", "fleet", "folders", "manifest", "models", "npz", "program", "schema")
        ),
        *(f"nmoe_edge.protocol.{module}" for module in ("combine", "routing", "tensor")),
    ),
}
# Package from outside -> the only modules of nmoe_edge that may import it.
ONLY_IN = {
    "onnxruntime": {"models"},
    "zeroconf": {"discover"},
    "ifaddr": {"discover"},
    "zmq": {"frames", "sockets", "client", "keys"},
    "click": {"cli", "bench.cli", "program"},
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
def test_every_room_of_the_edge_knows_only_those_below_it(name):
    found = {m.removeprefix("nmoe_edge.") for m in imports(modules("nmoe_edge")[name]) if m.startswith("nmoe_edge.")}
    assert found <= set(EDGE[name])


def test_every_room_of_the_edge_is_on_the_plan():
    assert set(modules("nmoe_edge")) == set(EDGE)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_halves_meet_only_where_the_plan_says(package):
    for name, path in modules(package).items():
        for found in imports(path):
            if found.split(".")[0] in set(PACKAGES) - {package}:
                assert found in SISTERS[package], f"{package}.{name} imports {found}"


@pytest.mark.parametrize(("outside", "inside"), ONLY_IN.items())
def test_a_foreign_package_has_one_door(outside, inside):
    edge = modules("nmoe_edge")
    users = {name for name, path in edge.items() if outside in {found.split(".")[0] for found in imports(path)}}
    assert users <= inside


def test_the_protocol_knows_no_socket_no_clock_and_no_disk():
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
def test_rooms_are_small(package):
    for name, path in modules(package).items():
        assert len(path.read_text().splitlines()) <= 400, f"is there a second room in {package}.{name}?"


def test_the_plan_in_words_names_every_room():
    words = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(words.splitlines()) <= 150
    for package in PACKAGES:
        for path in modules(package).values():
            if not path.stem.startswith("__"):
                assert path.name in words, f"{package}/{path.name} is missing in ARCHITECTURE.md"
