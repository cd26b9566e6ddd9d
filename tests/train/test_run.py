from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import nmoe_train.run as run_module
from nmoe_train.errors import NetError, RunError
from nmoe_train.nets import NetSpec, build
from nmoe_train.run import DataRecord, Inference, Networks, RunRecord, read_run, write_run
from nmoe_train.stages.calibration import Calibration
from nmoe_train.stages.familiarity import familiar_latents

NETWORKS = Networks(
    NetSpec("small", {"channels": 1, "size": 6, "dim": 8, "widths": [4, 4]}),
    NetSpec("linear", {"dim": 8, "outputs": 2}),
    NetSpec("mlp", {"dim": 8, "outputs": 3, "widths": [8]}),
)
RECORD = RunRecord(
    schema=1,
    config={"rounds": 3, "gate": {"laps": 2}},
    seed=7,
    data=DataRecord("bands", "ab" * 32, 4, "uint8", (1, 6, 6), "CHW"),
    networks=NETWORKS,
    latent_dim=8,
    experts=2,
    outputs=3,
    personal_gates=False,
    answers_carry_prior=True,
    inference=Inference(1, "outputs"),
    labels=("a", "b", "c"),
)
RUN_MD = Path(run_module.__file__).with_name("RUN.md").read_text()


def parts(record=RECORD):
    """Every argument of write_run except the record."""
    gates = record.experts if record.personal_gates else 1
    return {
        "extractor": build(record.networks.extractor).state_dict(),
        "gates": [build(record.networks.gate).state_dict() for _ in range(gates)],
        "experts": [build(record.networks.expert).state_dict() for _ in range(record.experts)],
        "calibration": {"inputs": np.zeros((4, 1, 6, 6), np.uint8), "labels": np.arange(4)},
        "metrics": {"accuracy": 0.5},
    }


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "run", RECORD, **parts())
    return tmp_path / "run"


@pytest.mark.parametrize("personal", [False, True])
def test_a_written_run_is_read_back_with_its_networks(tmp_path, personal):
    record = replace(RECORD, personal_gates=personal)
    given = parts(record)
    write_run(tmp_path / "run", record, **given)
    run = read_run(tmp_path / "run")
    assert replace(run.record, versions={}, files={}) == record
    assert run.metrics == {"accuracy": 0.5}
    assert np.array_equal(run.calibration()["labels"], np.arange(4))
    latents = torch.randn(5, 8)
    for device in range(2):
        expert = build(NETWORKS.expert)
        expert.load_state_dict(given["experts"][device])
        assert torch.equal(run.expert(device)(latents), expert(latents))
        gate = build(NETWORKS.gate)
        gate.load_state_dict(given["gates"][device if personal else 0])
        assert torch.equal(run.gate(device)(latents), gate(latents))
    images = torch.randint(0, 255, (2, 1, 6, 6), dtype=torch.uint8)
    extractor = build(NETWORKS.extractor)
    extractor.load_state_dict(given["extractor"])
    assert torch.equal(run.extractor()(images), extractor(images))
    assert not run.extractor().training


def test_a_run_records_the_versions_that_made_it(folder):
    assert sorted(read_run(folder).record.versions) == ["nmoe", "numpy", "python", "safetensors", "torch"]


def test_nothing_in_a_run_is_pickled(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in {".json", ".safetensors", ".npz"}
            assert not path.read_bytes().startswith(b"\x80")


@pytest.mark.parametrize(
    "name",
    ["extractor.safetensors", "gate.safetensors", "experts/01.safetensors", "calibration.npz", "metrics.json"],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_by_name(folder, name, damage):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(RunError, match=re.escape(str(folder / name))) as refused:
        read_run(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda r: r.update(schema=3), "schema 3 is unknown"),
        (lambda r: r.update(sede=1), r"unknown key 'sede' \(did you mean 'seed'\?\)"),
        (lambda r: r["inference"].update(topk=1), "unknown key 'inference.topk'"),
        (lambda r: r.pop("networks"), "'networks' is missing"),
        (lambda r: r.update(experts="2"), "experts is text; expected a whole number"),
        (lambda r: r.update(experts=0), "at least 1"),
        (lambda r: r.update(experts=10**12), "experts 1 to 1024"),
        (lambda r: r["inference"].update(local_first=7), "local_first is 7"),
        (
            lambda r: r.update(answers_carry_prior=True, inference={**r["inference"], "adapt": True}),
            "adapt needs answers_carry_prior",
        ),
        (lambda r: r["data"].update(samples=-5), "-5 samples"),
        (lambda r: r["data"].update(shape=[0]), "of shape"),
        (lambda r: r["data"].update(name="x\nverified"), "cannot be printed"),
        (lambda r: r.update(labels=["a", "b", "\x1b"]), "cannot be printed"),
        (lambda r: r["files"].update(more={"bytes": 1, "sha256": ""}), "files are not those of a run"),
        (lambda r: r["inference"].update(top_k=3), "top_k is 3, but there are 2 experts"),
        (lambda r: r.update(labels=["a"]), "1 labels for 3 outputs"),
        (lambda r: r["networks"].pop("gate"), "'networks.gate' is missing"),
    ],
)
def test_an_impossible_record_is_refused_with_the_reason(folder, edit, text):
    plain = json.loads((folder / "run.json").read_text())
    edit(plain)
    (folder / "run.json").write_text(json.dumps(plain))
    with pytest.raises(RunError, match=text):
        read_run(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{"])
def test_a_file_that_holds_no_record_is_refused(folder, text):
    (folder / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: "):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"run\.json: No such file"):
        read_run(tmp_path)


def test_weights_that_do_not_fit_give_a_one_line_error(folder):
    plain = json.loads((folder / "run.json").read_text())
    plain["networks"]["expert"]["arguments"]["widths"] = [9]
    (folder / "run.json").write_text(json.dumps(plain))
    with pytest.raises(RunError, match="does not fit the expert") as refused:
        read_run(folder).expert(1)
    assert "\n" not in str(refused.value)


def test_an_incomplete_run_is_not_written(tmp_path):
    with pytest.raises(RunError, match="1 experts"):
        write_run(tmp_path / "run", RECORD, **{**parts(), "experts": parts()["experts"][:1]})
    with pytest.raises(RunError, match="cannot be written"):
        write_run(tmp_path / "run", RECORD, **{**parts(), "metrics": {"loss": float("nan")}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "holds no inputs"),
        ({"inputs": np.zeros((2, 1, 6, 5), np.uint8)}, "holds no inputs"),
        ({"inputs": np.zeros((0, 1, 6, 6), np.uint8)}, "holds no inputs"),
        ({"inputs": np.zeros((2, 1, 6, 6), np.uint8), "labels": np.zeros(1, np.int64)}, "labels must hold one"),
    ],
)
def test_calibration_samples_that_do_not_fit_are_refused(tmp_path, change, text):
    run = write_run(tmp_path / "run", RECORD, **{**parts(), "calibration": change})
    with pytest.raises(RunError, match=text):
        run.calibration()


def test_a_named_pipe_is_refused_without_waiting_for_it(folder):
    (folder / "run.json").unlink()
    os.mkfifo(folder / "run.json")
    with pytest.raises(RunError, match="not a plain file"):
        read_run(folder)


def test_a_second_run_replaces_the_first_and_nothing_else(folder, tmp_path):
    write_run(folder, replace(RECORD, seed=8), **parts())
    assert read_run(folder).record.seed == 8
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(RunError, match="choose another place"):
        write_run(tmp_path / "thesis", RECORD, **parts())


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (NetSpec("smal", {}), "did you mean 'small'"),
        (NetSpec("vgg", {}), "package.module:factory"),
        (NetSpec("small", {"size": 3}), "cannot be built"),
        (NetSpec("nowhere.at_all:f", {}), "cannot be imported"),
        (NetSpec("json:nothing", {}), "cannot be imported"),
        (NetSpec(".nets:MLP", {}), "cannot be imported"),
        (NetSpec("mlp", {"dim": 2, "outputs": 2, "widths": [10**30]}), "cannot be built"),
        (NetSpec("builtins:dict", {"a": 1}), "returned dict, not a torch"),
    ],
)
def test_a_network_that_cannot_be_built_gives_a_one_line_error(spec, text):
    with pytest.raises(NetError, match=text) as refused:
        build(spec)
    assert "\n" not in str(refused.value)


def test_a_factory_from_another_package_is_imported():
    assert isinstance(build(NetSpec("torch.nn:Linear", {"in_features": 2, "out_features": 1})), torch.nn.Linear)


def test_the_extractor_takes_raw_images_and_uses_no_batch_statistics():
    net = build(NETWORKS.extractor)
    images = torch.randint(0, 255, (3, 1, 6, 6), dtype=torch.uint8)
    together, apart = net.train()(images), torch.cat([net(image[None]) for image in images])
    assert torch.allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_resnet18_takes_raw_images_of_both_sizes(norm):
    for size in (32, 96):
        net = build(NetSpec("resnet18", {"channels": 3, "size": size, "dim": 16, "norm": norm}))
        with torch.no_grad():
            latents = net(torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8))
        assert latents.shape == (2, 16)
        assert latents.isfinite().all()


def full_parts(record):
    """Every argument of write_run that schema 2 adds."""
    random = np.random.default_rng(0)
    familiar = [familiar_latents(random.normal(size=(9, 8)), np.arange(9) % 3) for _ in range(2)]
    bias = random.normal(size=(2, 3)).astype(np.float32)
    both = np.array([[0.5, 2.0], [7, 7]], np.float32).T  # a column of it does not lie in one piece
    return {**parts(record), "corrections": Calibration(both[:, 0], bias), "familiar": familiar}


SCHEMA_2 = replace(RECORD, schema=2, inference=Inference(1, "outputs", 0.9, familiar=7.0))


def test_calibration_and_familiar_latents_are_read_back(tmp_path):
    given = full_parts(SCHEMA_2)
    run = write_run(tmp_path / "run", SCHEMA_2, **given)
    latents = torch.randn(5, 8)
    with torch.no_grad():
        for device, scale in enumerate((0.5, 2.0)):
            plain = run.expert(device)(latents)
            expected = scale * plain + torch.from_numpy(given["corrections"].bias[device])
            assert torch.allclose(run.calibrated_expert(device)(latents), expected, atol=1e-5)
            distances = given["familiar"][device].distances(latents.numpy())
            assert np.array_equal(run.familiar(device).distances(latents.numpy()), distances)
    assert run.calibrated_head(0) is None


def test_a_run_without_a_calibration_keeps_its_experts_as_they_are(tmp_path):
    run = write_run(tmp_path / "run", replace(RECORD, schema=2), **parts())
    latents = torch.randn(5, 8)
    assert torch.equal(run.calibrated_expert(0)(latents), run.expert(0)(latents))
    assert run.familiar(0) is None


def test_a_limit_needs_the_statistics_of_every_client(tmp_path):
    given = full_parts(SCHEMA_2)
    for familiar in ((), given["familiar"][:1]):
        with pytest.raises(RunError, match="files are not those of a run with 2 experts"):
            write_run(tmp_path / "run", SCHEMA_2, **{**given, "familiar": familiar})
    with pytest.raises(ValueError, match="familiar needs schema 2"):
        replace(SCHEMA_2, schema=1)
    with pytest.raises(ValueError, match="familiar is -1"):
        Inference(1, "outputs", familiar=-1)


def resealed(folder, name, arrays):
    """Replace a file of a run and its digest in run.json."""
    (folder / name).write_bytes(save(arrays))
    plain = json.loads((folder / "run.json").read_text())
    data = (folder / name).read_bytes()
    plain["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "run.json").write_text(json.dumps(plain))
    return read_run(folder)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"scale": np.ones(2, np.float32)}, "bias"),
        ({"scale": np.zeros(2, np.float32), "bias": np.zeros((2, 3), np.float32)}, "every scale must be over 0"),
        ({"scale": np.ones(3, np.float32), "bias": np.zeros((3, 3), np.float32)}, "experts and classes"),
    ],
    ids=["missing", "zero", "another count"],
)
def test_a_calibration_that_does_not_fit_gives_a_one_line_error(tmp_path, arrays, text):
    write_run(tmp_path / "run", SCHEMA_2, **full_parts(SCHEMA_2))
    run = resealed(tmp_path / "run", "calibration.safetensors", arrays)
    with pytest.raises(RunError, match=text) as refused:
        run.calibrated_expert(0)
    assert "\n" not in str(refused.value)
    assert "calibration.safetensors" in str(refused.value)


def test_familiar_latents_that_do_not_fit_give_a_one_line_error(tmp_path):
    write_run(tmp_path / "run", SCHEMA_2, **full_parts(SCHEMA_2))
    wrong = {"whitening": np.eye(5, dtype=np.float32), "centres": np.zeros((1, 5), np.float32)}
    run = resealed(tmp_path / "run", "familiar/01.safetensors", wrong)
    with pytest.raises(RunError, match="for latents of 5 numbers"):
        run.familiar(1)


def test_the_document_names_every_file(tmp_path):
    run = write_run(tmp_path / "run", SCHEMA_2, **full_parts(SCHEMA_2))
    for name in run.record.files:
        assert f"| {re.sub('[0-9]+', 'NN', name)} |" in RUN_MD, name


def test_the_document_names_every_key():
    table = RUN_MD[RUN_MD.index("## run.json") : RUN_MD.index("## metrics.json")]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert documented == [field.name for field in fields(RunRecord)]
    for part in (DataRecord, Inference, NetSpec):
        assert all(f"`{field.name}`" in table for field in fields(part))


def test_the_document_names_every_metric(golden, tmp_path):
    from nmoe_train.pipeline import train
    from nmoe_train.recipes import configure

    flags = {"extractor": {"rounds": 1, "method": "fedsc"}, "fedsc": {"epsilon": 8.0}, "gate": {"rounds": 1}}
    metrics = train(configure(flags={**flags, "data": {"clients": 2}}), tmp_path / "run").metrics
    table = RUN_MD[RUN_MD.index("## metrics.json") : RUN_MD.index("## baselines.json")]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    documented = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert sorted(documented) == sorted(metrics)
    for key in (*metrics["own"], *metrics["own"]["networked"], *metrics["privacy"]):
        assert f"`{key}`" in table, key


def test_a_fleet_of_bundles_is_not_a_run(tmp_path):
    (tmp_path / "fleet.toml").touch()
    with pytest.raises(RunError, match="a fleet of bundles, not a run"):
        read_run(tmp_path)
