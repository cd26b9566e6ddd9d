"""Fixtures for the tests of the export."""

from __future__ import annotations

import hashlib

import pytest
import torch
from export.foreign import modules, pictures

from nmoe_export import export, graphs, speed
from nmoe_export.source import of_modules


@pytest.fixture(scope="session")
def images():
    return pictures()


@pytest.fixture(scope="session")
def source(images):
    """The labels are what the float fleet answers, so float is always right."""
    extractor, gate, experts = modules()
    with torch.no_grad():
        h = extractor(torch.from_numpy(images))
        outputs = torch.stack([expert(h) for expert in experts], 1)
        labels = outputs[torch.arange(len(h)), gate(h).argmax(1)].argmax(1).numpy()
    return of_modules(extractor, gate, experts, images, labels=labels)


@pytest.fixture(autouse=True)
def int8_is_faster(monkeypatch):
    """Tests do not depend on how fast int8 is on this machine."""
    monkeypatch.setattr(speed, "latencies", lambda *_: {"float": 2.0, "written": 1.0})


_EXPORTED = {}


@pytest.fixture(autouse=True)
def each_module_is_exported_once(monkeypatch):
    """Reuse exported graphs: torch takes most of a second for one, and the tests export the same few modules.

    Equal weights, structure, answers and examples give equal graphs; a test in test_export.py checks that.
    """

    def exported(module, name, example):
        with torch.no_grad():
            answers = module.eval()(example)
        parts = [example, answers, *module.state_dict().values()]
        digest = hashlib.sha256(b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)).hexdigest()
        key = (type(module), str(module), tuple(example.shape), digest)
        if key not in _EXPORTED:
            _EXPORTED[key] = graphs.export_graph(module, name, example)
        return _EXPORTED[key]

    monkeypatch.setattr(export, "export_graph", exported)
