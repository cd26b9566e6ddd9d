"""What the tests of the export share."""

from __future__ import annotations

import hashlib

import pytest
import torch
from export.foreign import modules, pictures

from nmoe_export import assignment, export, graphs
from nmoe_export.source import of_modules


@pytest.fixture(scope="session")
def images():
    return pictures()


@pytest.fixture(scope="session")
def source(images):
    """What the fleet itself answers is right, so that float is right always."""
    extractor, gate, experts = modules()
    with torch.no_grad():
        h = extractor(torch.from_numpy(images))
        said = torch.stack([expert(h) for expert in experts], 1)
        labels = said[torch.arange(len(h)), gate(h).argmax(1)].argmax(1).numpy()
    return of_modules(extractor, gate, experts, images, labels=labels)


@pytest.fixture(autouse=True)
def int8_is_faster(monkeypatch):
    """Whether it is is the machine's business, which no test may depend on; what follows from it is not."""
    monkeypatch.setattr(assignment, "latencies", lambda *_: {"float": 2.0, "written": 1.0})


_EXPORTED = {}


@pytest.fixture(autouse=True)
def a_module_is_exported_once(monkeypatch):
    """torch takes most of a second for a graph, and tests export the same few modules again and again.

    The same weights, build, answers and example give the same graph: test_export.py has a test of that.
    """

    def exported(module, name, example):
        with torch.no_grad():
            said = module.eval()(example)
        parts = [example, said, *module.state_dict().values()]
        digest = hashlib.sha256(b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)).hexdigest()
        key = (type(module), str(module), tuple(example.shape), digest)
        if key not in _EXPORTED:
            _EXPORTED[key] = graphs.export_graph(module, name, example)
        return _EXPORTED[key]

    monkeypatch.setattr(export, "export_graph", exported)
