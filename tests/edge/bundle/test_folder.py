"""Reading, verifying and writing bundles; BUNDLE.md agrees with the code."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import nmoe_edge.bundle.folder as bundle_module
from nmoe_edge.bundle.fleet import Device
from nmoe_edge.bundle.folder import BundleCaps, read_bundle, write_bundle
from nmoe_edge.bundle.manifest import Manifest, parse_manifest, sha256, trunk_digest
from nmoe_edge.bundle.selftest import SelfTest
from nmoe_edge.common.npz import write_npz
from nmoe_edge.errors import BundleError
from nmoe_edge.protocol.familiar import Familiar

BUNDLE_MD = Path(bundle_module.__file__).with_name("BUNDLE.md").read_text()


@pytest.fixture
def folder(tiny_fleet, tmp_path):
    """A copy of a bundle that a test may damage."""
    return Path(shutil.copytree(tiny_fleet / "barn", tmp_path / "barn"))


def rewritten(folder, contents=(), **changes):
    """Change files or manifest keys of a bundle and recompute every digest, so that the digests match."""
    bundle = read_bundle(folder)
    for name, data in {**bundle.contents, **dict(contents)}.items():
        (folder / name).write_bytes(data)
    manifest = replace(bundle.manifest, **changes).seal({**bundle.contents, **dict(contents)})
    (folder / "manifest.json").write_bytes(manifest.render())
    return folder


def one_line(refused):
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_a_bundle_is_read_with_manifest_labels_and_selftest(folder):
    bundle = read_bundle(folder)
    assert (bundle.manifest.device, bundle.manifest.expert, bundle.manifest.experts) == ("barn", 1, 3)
    assert bundle.labels == ("top", "middle", "bottom")
    assert bundle.selftest.experts.tolist() == [[0], [1], [2]]
    assert bundle.manifest.trunk_bytes.hex() == bundle.manifest.trunk


def test_labels_are_optional(folder, tmp_path):
    bundle = read_bundle(folder)
    contents = {name: data for name, data in bundle.contents.items() if name != "labels.txt"}
    assert write_bundle(tmp_path / "plain", bundle.manifest, contents).labels is None


@pytest.mark.parametrize(
    "name", ["manifest.json", "extractor.onnx", "gate.onnx", "expert.onnx", "selftest.npz", "labels.txt"]
)
def test_a_flipped_bit_anywhere_is_refused_with_the_name_of_the_file(folder, name):
    whole = (folder / name).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        for bit in (0, 5):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            (folder / name).write_bytes(flipped)
            with pytest.raises(BundleError) as refused:
                read_bundle(folder)
            assert one_line(refused).startswith(str(folder / name))


@pytest.mark.parametrize("name", ["manifest.json", "expert.onnx"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_length_is_refused(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(BundleError, match=re.escape(str(folder / name))):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["manifest.json", "gate.onnx"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: No such file"):
        read_bundle(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BundleError, match="not a bundle: No such file"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["manifest.json", "expert.onnx"])
def test_a_link_is_refused_even_if_its_target_has_the_right_bytes(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(BundleError, match=f"{name}: a link"):
        read_bundle(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_is_refused_without_waiting(folder, make):
    (folder / "gate.onnx").unlink()
    make(folder / "gate.onnx")
    with pytest.raises(BundleError, match=r"gate\.onnx: (not a plain file|Is a directory)"):
        read_bundle(folder)


def test_a_file_that_the_manifest_does_not_list_is_refused(folder):
    (folder / "weights.bin").write_bytes(b"external data")
    with pytest.raises(BundleError, match=r"holds 'weights\.bin', which its manifest does not list"):
        read_bundle(folder)


def edited(folder, edit):
    """Change the manifest without recomputing its digest, as with a text editor."""
    plain = json.loads((folder / "manifest.json").read_bytes())
    edit(plain)
    (folder / "manifest.json").write_text(json.dumps(plain, indent=2) + "\n")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda m: m.update(schema=3), "schema 3 is unknown: this nmoe reads schemas 1 and 2"),
        (lambda m: m.update(schema=[1]), "schema [1] is unknown"),
        (lambda m: m.update(schema="1"), "schema '1' is unknown"),
        (lambda m: m.update(topk=1), "unknown key 'topk'"),
        (lambda m: m["routing"].update(topk=1), "unknown key 'routing.topk' (did you mean 'top_k'?)"),
        (lambda m: m.pop("experts"), "the key 'experts' is missing"),
        (lambda m: m.update(expert=3), "expert is 3, not in 0..2"),
        (lambda m: m.update(device="../attic"), "not a device name"),
        (lambda m: m["routing"].update(top_k=4), "top_k is 4, more than the 3 experts"),
        (lambda m: m["routing"].update(top_k=0), "top_k is 0"),
        (lambda m: m["routing"].update(local_first=2), "local_first is 2.0, not in 0..1"),
        (lambda m: m["routing"].update(familiar=-1), "familiar is -1.0; expected a finite number, 0 or more"),
        (lambda m: m["routing"].update(familiar=1e400), "not a finite number"),
        (lambda m: m["routing"].update(familiar="near"), "routing.familiar is text"),
        (lambda m: m["routing"].update(familiar=1), "routing.familiar and the file familiar.npz need each other"),
        (lambda m: m.update(schema=1, routing={**m["routing"], "familiar": 1}), "routing.familiar needs schema 2"),
        (lambda m: m["routing"].update(combination="mean"), "expected one of 'outputs', 'probabilities'"),
        (lambda m: m["input"].update(dtype="float64"), "expected one of 'uint8', 'float32', 'int64'"),
        (lambda m: m["input"].update(shape=[]), "must have 1 to 4 dimensions"),
        (lambda m: m["input"].update(shape=[1, 0, 6]), "empty dimension"),
        (lambda m: m["input"].update(shape=[36]), "layout CHW needs three dimensions"),
        (lambda m: m["input"].update(layout="none"), "resize must be exact where layout is none"),
        (lambda m: m["input"].update(range=[1, 1]), "range must be [lowest, highest]"),
        (lambda m: m["latent"].update(dim=0), "dim is 0"),
        (lambda m: m["precision"].update(gate="int4"), "expected one of 'fp32', 'fp16', 'int8'"),
        (lambda m: m.update(trunk="0" * 32), "trunk is 000"),
        (lambda m: m.update(extractor_source="0"), "extractor_source is not 64"),
        (lambda m: m["accuracy"].update(routed="good"), "accuracy.routed is text"),
        (lambda m: m["accuracy"].update(routed=7), "accuracy 'routed' is 7.0, not in 0..1"),
        (lambda m: m["accuracy"].update({"a\nb": 1}), "accuracy 'a\\nb' must have a name of a-z"),
        (lambda m: m["input"].update(range=[0, 10**400]), "input.range[1] is too large a number"),
        (lambda m: m.update({"x\ny" * 10**5: 1}), "unknown key"),
        (lambda m: m.update(target="evil\nverified: yes"), "expected one of 'any', 'x86', 'pi', 'jetson'"),
        (lambda m: m["files"].update({"../../etc/passwd": m["files"]["gate.onnx"]}), "unknown file '../../etc/passwd'"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["gate.onnx"]}), "unknown file '/etc/passwd'"),
        (lambda m: m["files"].update({"gate.onx": m["files"].pop("gate.onnx")}), "did you mean 'gate.onnx'?"),
        (lambda m: m["files"].pop("selftest.npz"), "files does not list selftest.npz"),
        (lambda m: m["files"]["gate.onnx"].update(sha256="zz"), "files.gate.onnx: sha256 is not 64"),
        (lambda m: m["files"]["gate.onnx"].update(bytes=-1), "files.gate.onnx: bytes is -1"),
        (lambda m: m.update(answers_carry_prior=True, routing={**m["routing"], "adapt": True}), "adapt needs answers"),
        (lambda m: m["routing"].update(top_k=2), "its digest differs: it was changed"),
    ],
)
def test_an_invalid_manifest_is_refused_with_the_reason(folder, edit, text):
    edited(folder, edit)
    with pytest.raises(BundleError) as refused:
        read_bundle(folder)
    assert text in one_line(refused)
    assert str(folder / "manifest.json") in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'{"schema": 1}',
        b'\xef\xbb\xbf{"schema": 1}',
        b'{"schema": 1, "schema": 1}',
        b'{"schema": 1e999}',
        b'{"schema": NaN}',
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(folder, data):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        read_bundle(folder)


@pytest.mark.parametrize("indent", [None, 1, 2])
def test_the_same_manifest_with_another_layout_is_refused(folder, indent):
    plain = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({"digest": plain.pop("digest"), **plain}, indent=indent) + "\n")
    with pytest.raises(BundleError, match="digest differs"):
        read_bundle(folder)


def test_a_manifest_from_before_a_key_with_a_default_still_loads(folder):
    data = (folder / "manifest.json").read_bytes()
    shorter = re.sub(rb',\s+"local_first": null,\s+"adapt": false,\s+"familiar": null', b"", data)
    assert shorter != data
    digest = read_bundle(folder).manifest.digest.encode()
    sealed = shorter.replace(digest, sha256(shorter.replace(digest, b"")).encode())
    (folder / "manifest.json").write_bytes(sealed)
    routing = read_bundle(folder).manifest.routing
    assert (routing.adapt, routing.familiar) == (False, None)


@pytest.mark.parametrize("caps", [BundleCaps(manifest_bytes=100), BundleCaps(bundle_bytes=100)])
def test_a_bundle_over_the_size_limits_is_refused(folder, caps):
    with pytest.raises(BundleError, match="more than the 100 (allowed|expected)"):
        read_bundle(folder, caps)


def test_a_graph_with_external_tensors_is_refused(folder):
    graph = (folder / "expert.onnx").read_bytes()
    outside = b"\x3a\x04\x2a\x02\x70\x01"  # graph { initializer { data_location: EXTERNAL } }
    ours = graph[: graph.index(b"\x3a")]
    with pytest.raises(BundleError, match=r"expert\.onnx: keeps tensors outside"):
        read_bundle(rewritten(folder, {"expert.onnx": ours + outside + b"\x42\x04\x0a\x00\x10\x12"}))


def test_a_graph_with_another_opset_than_the_manifest_is_refused(folder):
    with pytest.raises(BundleError, match="opset 18 and IR 8, not the manifest's 17 and 8"):
        read_bundle(rewritten(folder, opset=17))


def test_a_file_that_is_not_onnx_is_refused(folder):
    with pytest.raises(BundleError, match=r"gate\.onnx: not an ONNX model"):
        read_bundle(rewritten(folder, {"gate.onnx": b""}))


@pytest.mark.parametrize("labels", ["one\ntwo\n", "1\n2\n3\n4\n", "", "a\nb\n\x1b[2J\n"])
def test_labels_of_the_wrong_number_or_with_escape_codes_are_refused(folder, labels):
    why = r"labels\.txt: (\d labels for 3 outputs|a label contains unprintable characters)"
    with pytest.raises(BundleError, match=why):
        read_bundle(rewritten(folder, {"labels.txt": labels.encode()}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inputs": np.zeros((3, 1, 6, 5), np.uint8)}, r"inputs is uint8 \(3, 1, 6, 5\)"),
        ({"inputs": np.zeros((3, 1, 6, 6), np.float32)}, "inputs is float32"),
        ({"inputs": np.zeros((0, 1, 6, 6), np.uint8)}, "no inputs"),
        ({"inputs": np.array(1, np.uint8)}, "no inputs"),
        ({"latents": np.zeros((2, 4), np.float32)}, r"latents is float32 \(2, 4\)"),
        ({"latents": np.full((3, 4), np.nan, np.float32)}, "latents contains NaN"),
        ({"experts": np.array([[0], [1], [3]])}, r"not in 0\.\.2"),
        ({"experts": np.array([[0], [1], [-1]])}, r"not in 0\.\.2"),
        ({"output_tolerance": np.array(np.inf)}, "output_tolerance contains NaN or infinity"),
        ({"latent_tolerance": np.array(-1.0)}, "a tolerance is less than 0"),
        ({"more": np.zeros(1)}, "the arrays are experts"),
    ],
)
def test_a_selftest_that_does_not_match_the_manifest_is_refused(folder, change, text):
    test = read_bundle(folder).selftest
    arrays = {field.name: getattr(test, field.name) for field in fields(SelfTest)}
    with pytest.raises(BundleError, match=rf"selftest\.npz: .*{text}"):
        read_bundle(rewritten(folder, {"selftest.npz": write_npz({**arrays, **change})}))


def with_statistics(folder, change=None, familiar=2.5):
    """A bundle that tests whether latents are familiar; change: what differs in its familiar.npz."""
    arrays = {"whitening": np.eye(4, 2, dtype=np.float32), "centres": np.ones((3, 2), np.float32)}
    contents = {"familiar.npz": write_npz(arrays | (change or {}))}
    return rewritten(folder, contents, routing=replace(read_bundle(folder).manifest.routing, familiar=familiar))


def test_a_bundle_is_read_with_its_statistics(folder):
    assert read_bundle(folder).familiar is None
    bundle = read_bundle(with_statistics(folder))
    assert bundle.manifest.routing.familiar == 2.5
    assert bundle.familiar.distances(np.array([[1, 1, 5, 5], [3, 1, 0, 0]])).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"whitening": np.eye(3, 2, dtype=np.float32)}, "whitening has 3 rows; expected 4"),
        ({"whitening": np.eye(4, 3, dtype=np.float32)}, "expected 3 columns"),
        ({"whitening": np.eye(4, 2)}, "whitening is float64"),
        ({"whitening": np.full((4, 2), np.nan, np.float32)}, "whitening contains NaN"),
        ({"centres": np.full((3, 2), np.inf, np.float32)}, "centres contains NaN or infinity"),
        ({"centres": np.zeros((0, 2), np.float32)}, "expected float32 with two dimensions"),
        ({"centres": np.array(1, np.float32)}, "expected float32 with two dimensions"),
        ({"centres": np.zeros((5000, 2), np.float32)}, "5000 centres, more than 4096"),
        ({"whitening": np.zeros((4, 300), "f4"), "centres": np.zeros((1, 300), "f4")}, "more than 256"),
        ({"threshold": np.zeros(1)}, "the arrays are centres, threshold, whitening"),
    ],
)
def test_statistics_that_do_not_match_the_manifest_are_refused(folder, change, text):
    with pytest.raises(BundleError) as refused:
        read_bundle(with_statistics(folder, change))
    assert text in one_line(refused)
    assert str(refused.value).startswith(str(folder / "familiar.npz"))


def test_statistics_that_no_rule_uses_are_refused(folder):
    with pytest.raises(BundleError, match=r"routing\.familiar and the file familiar\.npz need each other"):
        read_bundle(with_statistics(folder, familiar=None))


def test_a_flipped_bit_in_the_statistics_is_refused(folder):
    with_statistics(folder)
    whole = bytearray((folder / "familiar.npz").read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / "familiar.npz").write_bytes(whole)
    with pytest.raises(BundleError, match=r"familiar\.npz: its sha256 differs"):
        read_bundle(folder)


def test_a_bundle_in_use_can_be_replaced(folder):
    old = read_bundle(folder)
    new = write_bundle(folder, replace(old.manifest, target="pi"), old.contents)
    assert read_bundle(folder).manifest.digest == new.manifest.digest != old.manifest.digest
    assert [path.name for path in folder.parent.iterdir()] == ["barn"]


def test_a_bundle_that_fails_verification_is_not_written(folder):
    old = read_bundle(folder)
    with pytest.raises(BundleError, match="labels"):
        write_bundle(folder, old.manifest, {**old.contents, "labels.txt": b"one\n"})
    assert read_bundle(folder).manifest.digest == old.manifest.digest
    assert [path.name for path in folder.parent.iterdir()] == ["barn"]


def test_a_folder_with_other_files_is_never_replaced(folder, tmp_path):
    bundle = read_bundle(folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for place in ("thesis", "thesis/chapter.txt"):
        with pytest.raises(BundleError, match="choose another place"):
            write_bundle(tmp_path / place, bundle.manifest, bundle.contents)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_folder_with_another_kind_of_manifest_json_is_never_replaced(folder, tmp_path):
    bundle = read_bundle(folder)
    app = tmp_path / "web app"
    (app / "icons").mkdir(parents=True)
    (app / "manifest.json").write_text("{}")
    (app / "icons" / "a.png").touch()
    with pytest.raises(BundleError, match=r"holds 'icons/a\.png', which would be lost"):
        write_bundle(app, bundle.manifest, bundle.contents)
    assert (app / "icons" / "a.png").exists()


def test_an_unknown_file_is_not_written(folder, tmp_path):
    bundle = read_bundle(folder)
    with pytest.raises(BundleError, match=r"unknown file 'gate\.onx'"):
        write_bundle(tmp_path / "new", bundle.manifest, {**bundle.contents, "gate.onx": b""})
    assert not (tmp_path / "new").exists()


def test_a_write_error_names_the_destination_and_not_the_temporary_folder(folder, tmp_path):
    bundle = read_bundle(folder)
    with pytest.raises(BundleError) as refused:
        write_bundle(tmp_path / "new", bundle.manifest, {**bundle.contents, "labels.txt": b"one\n"})
    assert str(refused.value).startswith(str(tmp_path / "new" / "labels.txt"))


def test_a_refused_bundle_leaves_no_file_open(folder):
    (folder / "gate.onnx").unlink()
    (folder / "gate.onnx").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(BundleError):
            read_bundle(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bundle_replaced_while_it_is_read_is_still_read_as_a_whole(folder):
    """One writer, one reader: every read gets a complete bundle, either the old or the new one."""
    old = read_bundle(folder)
    stop = threading.Event()

    def swap():
        targets = itertools.cycle(("pi", "x86"))
        while not stop.is_set():
            write_bundle(folder, replace(old.manifest, target=next(targets)), old.contents)

    writer = threading.Thread(target=swap)
    writer.start()
    try:
        seen = {read_bundle(folder).manifest.target for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= {"pi", "x86"}


def test_writing_the_same_bundle_twice_gives_the_same_bytes(folder, tmp_path):
    bundle = read_bundle(folder)
    for name in ("one", "two"):
        write_bundle(tmp_path / name, bundle.manifest, bundle.contents)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_trunk_digest_depends_on_the_extractor_and_three_sizes():
    source = sha256(b"extractor")
    trunk = trunk_digest(source, 64, 10, 5)
    assert len(bytes.fromhex(trunk)) == 16
    others = [(sha256(b"another"), 64, 10, 5), (source, 65, 10, 5), (source, 64, 11, 5), (source, 64, 10, 6)]
    assert len({trunk, *(trunk_digest(*other) for other in others)}) == 5


def test_the_document_names_every_key(folder):
    documented = set(re.findall(r"^\| `([\w.]+)` \|", BUNDLE_MD, re.M))
    plain = json.loads((folder / "manifest.json").read_bytes())
    nested = {f"{key}.{inner}" for key in ("input", "latent", "routing", "precision") for inner in plain[key]}
    flat = set(plain) - {"input", "latent", "routing", "precision"}
    arrays = {field.name for field in fields(SelfTest)}
    arrays |= {field.name for field in fields(Familiar) if field.init}
    device = {f"device.{field.name}" for field in fields(Device)}
    assert documented == flat | nested | arrays | device


def test_the_manifest_in_the_document_is_valid():
    (shown,) = re.findall(r"```json\n(.*?)```", BUNDLE_MD, re.S)
    assert isinstance(parse_manifest(shown.encode()), Manifest)
