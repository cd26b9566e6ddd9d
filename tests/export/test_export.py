"""From a run to a fleet folder, and the command."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nmoe_edge.bundle.fleet import read_fleet_folder
from nmoe_edge.models import Models, run_selftest
from nmoe_edge.protocol.answering import answer_adapted
from nmoe_edge.protocol.exchange import Exchange
from nmoe_edge.protocol.familiar import Familiar
from nmoe_edge.protocol.routing import route
from nmoe_export import simulation
from nmoe_export.cli import main
from nmoe_export.errors import GraphError, SourceError
from nmoe_export.export import Options, export_fleet
from nmoe_export.graphs import export_graph
from nmoe_export.source import of_run
from nmoe_train.pipeline import train
from nmoe_train.recipes import configure
from nmoe_train.run import Inference, read_run, write_run
from nmoe_train.stages.calibration import Calibration


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """The golden run, exported once. Tests must not change it."""
    from conftest import TESTS

    folder = tmp_path_factory.mktemp("export") / "fleet"
    export_fleet(TESTS / "golden" / "v1" / "run", folder)
    return folder


def test_every_device_gets_a_bundle_that_passes_its_selftest(fleet):
    described, bundles = read_fleet_folder(fleet)
    assert [device.name for device in described.device] == ["device-00", "device-01", "device-02"]
    for bundle in bundles.values():
        assert run_selftest(Models(bundle), bundle).passed
        assert bundle.manifest.routing.local_first == 0.8
        assert bundle.manifest.routing.combination == "probabilities"
        assert set(bundle.manifest.accuracy) == {"held_out"}


def test_the_fleet_answers_as_the_networks_of_the_run_do(fleet, golden):
    """Three bundles and the exchange compute what the run's torch modules compute, routed by hand."""
    run = read_run(golden / "run")
    _, bundles = read_fleet_folder(fleet)
    models = [Models(bundle) for bundle in bundles.values()]
    images = run.calibration()["inputs"]
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(images.copy()))
        experts = torch.stack([run.expert(i)(latents).softmax(1) for i in range(3)])  # (experts, rows, outputs)
        best = run.gate(1)(latents).topk(2)
        expected = sum(best.values.softmax(1)[:, k, None] * experts[best.indices[:, k], range(12)] for k in range(2))

    latent = models[1].extractor(images)
    routes = route(models[1].gate(latent), 1, range(3), 2)
    exchange = Exchange(routes, 3, itertools.count(), deadline=1.0, combination="probabilities")
    for call in exchange.start(0.0):
        exchange.answered(call.request, call.expert, models[call.expert].expert(latent[list(call.rows)]), 0.5)
    assert np.allclose(exchange.result()[0], expected, atol=1e-5)


def test_the_manifest_has_the_inference_rules_of_the_run(golden, tmp_path):
    """All settings differ from their defaults; the accuracy is what torch measures."""
    run = read_run(golden / "run")
    chosen = Inference(top_k=2, combination="outputs", local_first=0.4, adapt=False)
    other = write_run(
        tmp_path / "run",
        replace(run.record, inference=chosen, answers_carry_prior=True),
        extractor=run.extractor().state_dict(),
        gates=[run.gate(i).state_dict() for i in range(3)],
        experts=[run.expert(i).state_dict() for i in range(3)],
        calibration=run.calibration(),
        metrics={},
    )
    export_fleet(other, tmp_path / "fleet")
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(run.calibration()["inputs"].copy()))
        outputs = torch.stack([run.expert(i)(latents) for i in range(3)], 1)  # (rows, experts, outputs)
        for i, bundle in enumerate(bundles.values()):
            routing = bundle.manifest.routing
            assert (routing.top_k, routing.combination, routing.local_first, routing.adapt) == (
                2,
                "outputs",
                0.4,
                False,
            )
            assert bundle.manifest.answers_carry_prior
            best = run.gate(i)(latents).topk(2)
            theirs = outputs.gather(1, best.indices[:, :, None].expand(-1, -1, 3))
            mixed = (best.values.softmax(1)[:, :, None] * theirs).sum(1)
            alone = outputs[:, i].softmax(1)
            answered = torch.where((alone.max(1).values > 0.4)[:, None], alone, mixed)
            right = (answered.argmax(1).numpy() == run.calibration()["labels"])[[0, 2, 4, 6, 8, 10]].mean()
            assert bundle.manifest.accuracy == {"held_out": pytest.approx(right)}


def test_calibration_and_statistics_of_a_run_become_part_of_its_bundles(golden, tmp_path):
    run = read_run(golden / "run")
    draw = np.random.default_rng(0)
    calibration = Calibration(np.array([0.5, 1, 2], np.float32), draw.normal(size=(3, 3)).astype(np.float32))
    whitening = draw.normal(size=(8, 2)).astype(np.float32)
    familiar = [Familiar(whitening, draw.normal(size=(2, 2)).astype(np.float32)) for _ in range(3)]
    inference = replace(run.record.inference, local_first=0.4, adapt=True, familiar=2.0)
    other = write_run(
        tmp_path / "run",
        replace(run.record, schema=2, inference=inference),
        extractor=run.extractor().state_dict(),
        gates=[run.gate(i).state_dict() for i in range(3)],
        experts=[run.expert(i).state_dict() for i in range(3)],
        calibration=run.calibration(),
        metrics={},
        corrections=calibration,
        familiar=familiar,
    )
    export_fleet(other, tmp_path / "fleet")
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    models = [Models(bundle) for bundle in bundles.values()]
    inputs, labels = run.calibration()["inputs"], run.calibration()["labels"]
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(inputs.copy()))
        raw = np.stack([run.expert(i)(latents).numpy() for i in range(3)], 1)
        scores = [run.gate(i)(latents).numpy() for i in range(3)]
    outputs = np.stack([model.expert(latents.numpy()) for model in models], 1)
    assert np.allclose(outputs, calibration.apply(raw), atol=1e-4)
    measured = of_run(other).measured_rows
    for i, bundle in enumerate(bundles.values()):
        assert bundle.manifest.routing.familiar == 2.0
        assert np.array_equal(bundle.familiar.centres, familiar[i].centres)
        distances = familiar[i].distances(latents.numpy()[measured])
        found = answer_adapted(scores[i][measured], outputs[measured], i, inference.answer_rules(), distances)
        right = (found.p.argmax(1) == labels[measured]).mean()
        assert bundle.manifest.accuracy == {"held_out": pytest.approx(right)}


def test_a_run_that_tests_familiar_latents_without_their_statistics_is_refused(golden):
    run = read_run(golden / "run")
    untrained = replace(
        run, record=replace(run.record, schema=2, inference=replace(run.record.inference, familiar=1.0))
    )
    with pytest.raises(SourceError, match="the run has no statistics of familiar latents; repeat its training"):
        of_run(untrained)


def test_the_selftest_has_clear_routes_only_and_the_clearest_route_to_every_expert(fleet, golden):
    run = read_run(golden / "run")
    _, bundles = read_fleet_folder(fleet)
    with torch.no_grad():
        latents = run.extractor()(torch.from_numpy(run.calibration()["inputs"].copy()))
        for i, bundle in enumerate(bundles.values()):
            best = run.gate(i)(latents).topk(2)
            margins = best.values[:, 0] - best.values[:, 1]
            clear = margins.argsort(descending=True)[: max(8, len(margins) // 2)]
            tested = run.gate(i)(torch.from_numpy(bundle.selftest.latents.copy())).topk(2)
            tested_margins = tested.values[:, 0] - tested.values[:, 1]
            assert tested_margins.min() >= margins[clear].min() - 1e-4
            favourites = best.indices[clear, 0]
            for expert in favourites.unique():
                clearest = margins[clear][favourites == expert].max()
                assert torch.isclose(tested_margins[tested.indices[:, 0] == expert].max(), clearest, atol=1e-4)


def test_the_selftest_reuses_what_the_chosen_graphs_computed(golden, tmp_path, monkeypatch):
    """A float export runs the extractor over all samples once, and each device's bundle takes rows of that."""
    calls = []
    true = simulation.latents_of

    def counted(source, extractor, inputs=None):
        calls.append(inputs)
        return true(source, extractor, inputs)

    monkeypatch.setattr(simulation, "latents_of", counted)
    export_fleet(golden / "run", tmp_path / "fleet")
    assert calls == [None]


def test_a_run_can_be_given_as_path_as_text_or_as_run(fleet, golden, tmp_path):
    expected = read_fleet_folder(fleet)[0]
    assert export_fleet(str(golden / "run"), str(tmp_path / "text")).fleet == expected
    assert export_fleet(read_run(golden / "run"), tmp_path / "run").fleet == expected
    assert not export_fleet(of_run(read_run(golden / "run")), tmp_path / "run").changed


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"precision": "int4"}, "precision is 'int4'; expected fp32, fp16 or int8"),
        ({"latent": "bfloat16"}, "latent is 'bfloat16'; expected float16"),
        ({"max_drop": float("nan")}, "max_drop is nan; expected 0 or more"),
        ({"max_drop": -1.0}, "max_drop is -1.0; expected 0 or more"),
    ],
)
def test_options_with_an_invalid_value_are_refused(wrong, text):
    with pytest.raises(SourceError, match=text):
        Options(**wrong)


def test_the_trunk_identifies_the_trained_extractor_and_not_its_file(fleet):
    _, bundles = read_fleet_folder(fleet)
    manifests = [bundle.manifest for bundle in bundles.values()]
    assert len({manifest.trunk for manifest in manifests}) == 1
    assert manifests[0].extractor_source != manifests[0].files["extractor.onnx"].sha256
    assert b"pytorch" not in bundles["device-00"].contents["extractor.onnx"]


def test_a_second_export_keeps_addresses_and_keys(golden, tmp_path):
    out = tmp_path / "fleet"
    first = export_fleet(golden / "run", out).fleet
    key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    moved = replace(first.device[1], address="tcp://192.0.2.7:9000", public_key=key)
    (out / "fleet.toml").write_text(replace(first, device=(first.device[0], moved, first.device[2])).render())
    again = export_fleet(golden / "run", out).fleet
    assert again.device[1] == moved
    (out / "keys").mkdir()
    (out / "keys" / "secret").touch()
    with pytest.raises(SourceError, match="holds 'keys/secret', which would be lost"):
        export_fleet(golden / "run", out, Options(latent="int8"))
    assert (out / "keys" / "secret").exists()


def test_a_new_device_with_the_address_of_an_existing_one_is_refused(fleet, golden, tmp_path):
    out = tmp_path / "fleet"
    shutil.copytree(fleet, out)
    described = read_fleet_folder(fleet)[0]
    moved = replace(described.device[1], address=described.device[2].address)
    (out / "fleet.toml").write_text(replace(described, device=(described.device[0], moved)).render())
    with pytest.raises(SourceError, match=r"fleet\.toml: two devices have the same address .*; change it there"):
        export_fleet(golden / "run", out, Options(latent="int8"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_that_cannot_exist_is_refused(golden, tmp_path, name):
    with pytest.raises(SourceError, match="cannot be written: "):
        export_fleet(golden / "run", tmp_path / name)


@pytest.mark.parametrize("broken", ["_float_graphs", "device_bundle", "page"])
def test_a_bug_of_the_export_keeps_its_own_error_and_leaves_nothing(golden, tmp_path, monkeypatch, broken):
    def bug(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(f"nmoe_export.export.{broken}", bug)
    with pytest.raises(ValueError, match="^a bug$"):
        export_fleet(golden / "run", tmp_path / "fleet")
    assert not list(tmp_path.iterdir())


def test_the_networks_of_an_unchanged_run_are_not_built(golden, tmp_path, monkeypatch):
    first = export_fleet(golden / "run", tmp_path / "fleet")
    monkeypatch.setattr("nmoe_export.export.of_run", None)
    again = export_fleet(golden / "run", tmp_path / "fleet")
    assert (again.changed, again.fleet) == (False, first.fleet)


def test_two_exports_are_the_same_bytes(fleet, golden, tmp_path):
    export_fleet(golden / "run", tmp_path / "again")
    for path in fleet.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(fleet)).read_bytes(), path


def test_graphs_contain_no_path_of_the_machine_that_made_them(fleet):
    for path in fleet.rglob("*.onnx"):
        assert b".py" not in path.read_bytes()


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Unwilling(nn.Module):
    def forward(self, x):
        raise ValueError("not today\nnor tomorrow")


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Branches(), r"torch cannot export Branches: Could not guard .*; values cannot decide .*: use torch\.where"),
        (Unknown(), "torch cannot export Unknown: No ONNX function found for .*bessel_j0"),
        (Unwilling(), "torch cannot export Unwilling: not today$"),
        (Noisy(), "onnxruntime and torch differ"),
    ],
)
def test_a_module_without_an_equivalent_graph_is_refused_by_name(module, text, capfd):
    with pytest.raises(GraphError, match=f"mine: {text}") as refused:
        export_graph(module, "mine", torch.ones(2, 3))
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def broken(golden, tmp_path):
    return shutil.copytree(golden / "run", tmp_path / "broken")


def test_a_broken_run_is_refused_and_nothing_is_written(broken, tmp_path):
    (broken / "experts" / "01.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"experts/01\.safetensors"):
        export_fleet(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(broken, tmp_path):
    plain = json.loads((broken / "run.json").read_text())
    plain["networks"]["gate"]["arguments"]["outputs"] = 4
    (broken / "run.json").write_text(json.dumps(plain))
    with pytest.raises(SourceError, match="does not fit the gate"):
        export_fleet(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [broken]


@pytest.fixture
def nmoe_export(run_main):
    return lambda *arguments: run_main(main, *arguments)


def test_help_shows_an_example(nmoe_export):
    assert "Examples: nmoe-export" in nmoe_export("--help").output


def test_without_an_argument_the_newest_run_is_exported(nmoe_export, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no run in runs/" in nmoe_export().error
    shutil.copytree(golden / "run", tmp_path / "runs" / "mine")
    done = nmoe_export()
    assert done.exit_code == 0, done.error
    assert "bundles/mine: 3 bundles" in done.output
    assert read_fleet_folder(tmp_path / "bundles" / "mine")


def test_an_output_folder_that_cannot_be_made_is_refused_before_the_export(nmoe_export, golden, tmp_path):
    (tmp_path / "thesis.txt").touch()
    done = nmoe_export(golden / "run", "--out", tmp_path / "thesis.txt" / "fleet")
    assert (done.exit_code, done.error.count("\n")) == (1, 1)
    assert "thesis.txt is not a folder; choose another place" in done.error


def test_a_folder_with_other_files_is_not_overwritten(nmoe_export, golden, tmp_path):
    (tmp_path / "thesis.txt").touch()
    done = nmoe_export(golden / "run", "--out", tmp_path)
    assert done.exit_code == 1
    assert "choose another place" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_run_is_refused_in_one_line(nmoe_export, tmp_path):
    done = nmoe_export(tmp_path / "nowhere")
    assert (done.exit_code, done.output) == (1, "")
    error = f"{tmp_path / 'nowhere'}: no such run; expected a folder that nmoe-train wrote"
    assert done.error == f"nmoe-export: {error}\n"


def test_without_the_export_extra_the_pip_command_is_printed(nmoe_export, golden, monkeypatch):
    for module in ("nmoe_export.graphs", "nmoe_export.export"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    shown = nmoe_export(golden / "run")
    assert (shown.exit_code, shown.output) == (1, "")
    assert shown.error == "nmoe-export: onnx is not installed; pip install 'nmoe[export]'\n"


@pytest.mark.parametrize(
    "gate",
    [
        {"method": "rangate", "shares": [0.7, 0.3]},
        {"method": "statgate", "statistics": "moments"},
        {"method": "statgate", "statistics": "means"},
        {"method": "fedgate", "widths": [16]},
        {"method": "fedgate", "own": "weights"},
    ],
    ids=str,
)
def test_every_kind_of_gate_becomes_a_bundle(tmp_path, gate):
    """The run is a real, short training, so the exporter finds what training writes."""
    flags = {"data": {"clients": 2}, "extractor": {"rounds": 1}, "gate": {"rounds": 2, **gate}}
    run = train(configure(flags=flags), tmp_path / "run")
    export_fleet(tmp_path / "run", tmp_path / "fleet")
    _, bundles = read_fleet_folder(tmp_path / "fleet")
    images = run.calibration()["inputs"]
    for device, bundle in enumerate(bundles.values()):
        models = Models(bundle)
        assert run_selftest(models, bundle).passed
        with torch.no_grad():
            scores = run.gate(device)(run.extractor()(torch.from_numpy(images.copy()))).numpy()
        agree = models.gate(models.extractor(images)).argmax(1) == scores.argmax(1)
        assert agree.mean() > 0.99


EXPORT = [sys.executable, "-c", "from nmoe_export.cli import main; main()"]


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(golden, tmp_path):
    """A limit of one kilobyte for each file stands in for a full disk."""

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [*EXPORT, golden / "run", "--out", tmp_path / "fleet"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("File too large")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_an_export_leaves_nothing(golden, tmp_path):
    command = [*EXPORT, golden / "run", "--out", tmp_path / "fleet"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr.readline() == "extractor exported\n"
        os.kill(running.pid, signal.SIGINT)
        running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 1
    assert not list(tmp_path.iterdir())
