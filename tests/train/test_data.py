from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import os
import shutil
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from nmoe_train import data
from nmoe_train.data import MAX_CLASSES, Dataset, load
from nmoe_train.errors import DataError


def refused(text):
    """A DataError that is one line."""
    return pytest.raises(DataError, match=rf"\A(?!.*\n).*{text}")


def test_the_digits_can_be_shared_by_ten_clients():
    digits = load("digits")
    assert np.bincount(digits.y_train).tolist() == [120] * 10
    assert len(digits.y_train) + len(digits.y_test) == 1797
    assert digits.fingerprint() == load("digits").fingerprint()


@pytest.mark.parametrize("name", ["mnist", "", "npz:", "folder:", "npz", ":x", "digits:1", "mni\nst"])
def test_an_unknown_name_is_told_what_there_is(name):
    with refused("there are digits, .*npz:FILE, folder:DIR"):
        load(name)


@pytest.mark.parametrize("shape", [(50, 300, 8, 9), (3, 1, 1, 1), (2, 3, 1200, 1100)])
def test_statistics_are_those_of_the_pixels(shape):
    """An error of 1e-6 would round to another fourth digit in some of 300 channels."""
    x = (np.random.default_rng(0).random(shape) ** 2 * 255).astype(np.uint8)
    y = np.arange(len(x)) % 2
    mean, deviation = Dataset("any", x, y, x, y, ("a", "b")).statistics()
    assert mean == (x / 255).mean((0, 2, 3)).round(4).tolist()
    assert deviation == (x / 255).std((0, 2, 3)).round(4).tolist()


def test_a_channel_that_never_varies_does_not_divide_by_nothing():
    x = np.zeros((4, 3, 2, 2), np.uint8)
    x[:, 1], x[0, 2] = 255, 255
    statistics = Dataset("any", x, np.arange(4) % 2, x, np.arange(4) % 2, ("a", "b")).statistics()
    assert statistics == ([0.0, 1.0, 0.25], [0.001, 0.001, 0.433])


def npz(path, **changes):
    arrays = {
        "x_train": np.zeros((4, 8, 8, 3), np.uint8),
        "y_train": np.arange(4),
        "x_test": np.zeros((2, 8, 8, 3), np.uint8),
        "y_test": np.arange(2),
    }
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return f"npz:{path}"


def test_anybodys_npz_is_read_with_channels_first(tmp_path):
    dataset = load(npz(tmp_path / "mine.npz", classes=np.array(["a", "b", "c", "d"]), more=np.array([object()])))
    assert (dataset.name, dataset.shape) == ("mine", (3, 8, 8))
    assert dataset.labels == ("a", "b", "c", "d")
    assert load(
        npz(tmp_path / "grey.npz", x_train=np.zeros((4, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
    ).shape == (1, 8, 8)
    dataset = load(npz(tmp_path / "mine.npz", y_train=np.arange(4, dtype=np.uint64), classes=np.arange(10, 14)))
    assert (dataset.y_train.dtype, dataset.labels) == (np.int64, ("10", "11", "12", "13"))


def test_an_npz_is_found_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    npz(tmp_path / "mine.npz")
    assert load("npz:~/mine.npz").name == "mine"


FOUR = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_train": None}, "holds no x_train; it needs x_train, y_train, x_test, y_test"),
        ({"x_train": np.zeros((4, 8, 8, 3))}, "train images are float64"),
        ({"x_train": np.zeros((4, 8), np.uint8)}, "train images are uint8"),
        ({"x_train": np.zeros((), np.uint8)}, "train images are uint8"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.arange(0)}, "train images are uint8"),
        ({"x_train": np.zeros((4, 0, 8, 3), np.uint8)}, "train images are uint8"),
        ({"x_test": np.zeros((2, 8, 0), np.uint8)}, "test images are uint8"),
        ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, "train images are .* test images"),
        ({"y_train": np.arange(3)}, r"train labels are \(3,\), not one for each of 4 images"),
        ({"y_train": np.arange(4)[:, None]}, r"train labels are \(4, 1\)"),
        ({"y_test": np.array(1)}, r"test labels are \(\)"),
        ({"y_train": np.array([0, 1, 2, -1])}, "train labels are not one of 0..2"),
        ({"y_train": np.array(FOUR)}, "labels are whole numbers, but y_train is <U1"),
        ({"y_train": np.arange(4.0)}, "labels are whole numbers, but y_train is float64"),
        ({"y_test": np.array([True, False])}, "labels are whole numbers, but y_test is bool"),
        ({"y_train": np.array([object()] * 4)}, "cannot be read"),
        ({"y_train": np.array([0, 1, 3, 3])}, "class 2 has no training sample"),
        ({"y_test": np.array([0, 4])}, "class 4 has no training sample"),
        ({"y_train": np.zeros(4, int), "y_test": np.zeros(2, int)}, "number of classes is 1, not in 2..4096"),
        ({"y_train": np.array([0, 1, 2, 10**7])}, "a label is 10000000; .* K is at most 4096"),
        ({"y_train": np.array([0, 1, 2, 2**64 - 1], np.uint64)}, "a label is 18446744073709551615"),
        ({"classes": np.array("cat")}, r"classes is <U3 \(\), not a list of names"),
        ({"classes": np.array([FOUR])}, r"classes is <U1 \(1, 4\), not a list of names"),
        ({"classes": np.array([b"a", b"b", b"c", b"d"])}, r"classes is \|S1 \(4,\)"),
        ({"classes": np.arange(4.0)}, r"classes is float64 \(4,\)"),
        ({"classes": np.array(FOUR[:3])}, "a label is 3, but classes has only 3 names"),
        ({"classes": np.array([*FOUR, "e"])}, "class 4 has no training sample"),
        ({"classes": np.array(["a", "b", "c", "a"])}, "2 classes are called 'a'"),
        ({"classes": np.array(["a", "b\nc", "c", "d"])}, "class 1 is called .*cannot be printed"),
        ({"classes": np.array(["a", "b", "\x1b[2J", "d"])}, "class 2 is called .*cannot be printed"),
        ({"classes": np.array(["a", "b", "", "d"])}, "class 2 is called ''"),
        ({"classes": np.array([str(i) for i in range(MAX_CLASSES + 1)])}, "number of classes is 4097"),
    ],
)
def test_an_npz_of_other_shapes_dtypes_or_names_is_one_line(tmp_path, change, text):
    with refused(text):
        load(npz(tmp_path / "mine.npz", **change))


def test_a_file_that_is_missing_damaged_or_no_npz_is_one_line(tmp_path):
    with refused("nowhere.npz: cannot be read as an .npz: No such file"):
        load(f"npz:{tmp_path}/nowhere.npz")
    with refused("cannot be read as an .npz: Is a directory"):
        load(f"npz:{tmp_path}")
    with refused("cannot be read as an .npz: embedded null"):
        load(f"npz:{tmp_path}/a\0b")
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("no archive at all")
    for name in ("one.npy", "empty.npz", "text.npz"):
        with refused("no whole archive of arrays by name"):
            load(f"npz:{tmp_path}/{name}")
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    with refused("holds no x_train"):
        load(f"npz:{tmp_path}/nothing.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", "no array")
    with refused("labels are whole numbers"):
        load(f"npz:{tmp_path}/other.npz")


def test_a_name_that_cannot_be_printed_is_refused_before_a_training(tmp_path):
    with refused("which cannot be printed: rename it"):
        load(npz(tmp_path / "a\tb.npz"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_npz_is_refused_or_read_but_never_a_traceback(tmp_path, compression):
    whole = io.BytesIO()
    npz(tmp_path / "whole.npz", classes=np.array(FOUR))
    with zipfile.ZipFile(tmp_path / "whole.npz") as plain, zipfile.ZipFile(whole, "w", compression) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert_survives_damage(whole.getvalue(), tmp_path / "mine.npz", lambda path: load(f"npz:{path}"), 200)


@pytest.mark.parametrize("key", ["x_train", "y_test", "classes"])
def test_a_damaged_array_in_a_sound_npz_is_refused_or_read_but_never_a_traceback(tmp_path, key):
    np.save(whole := io.BytesIO(), {"x_train": np.zeros((4, 2, 2), np.uint8), "classes": FOUR}.get(key, np.arange(2)))

    def read(path):
        npz(tmp_path / "mine.npz", **{key: None})
        with zipfile.ZipFile(tmp_path / "mine.npz", "a") as archive:
            archive.write(path, f"{key}.npy")
        load(f"npz:{tmp_path}/mine.npz")

    assert_survives_damage(whole.getvalue(), tmp_path / "array", read, 200)


def assert_survives_damage(whole, path, read, times):
    """Cut, overwrite, insert: `read` does its work or raises DataError."""
    draw = np.random.default_rng(0)
    for _ in range(times):
        damaged = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(min(len(damaged), draw.choice([64, 128, 10**6]))))
            match draw.integers(4):
                case 0:
                    damaged = damaged[: at + 1]
                case 1:
                    damaged[at:at] = draw.bytes(3)
                case _:
                    damaged[at] = draw.choice([0, 255, *b"(['{,9-O"])
        path.write_bytes(damaged)
        with suppress(DataError):
            read(path)


def image(path, size=(6, 4), mode="RGB", **options):
    """A picture whose every pixel is another, saved as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    made = Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + 7 if mode == "I;16" else rgb)
    (made if mode == "I;16" else made.convert(mode)).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path):
    """Two classes, three and two training images, one test image of each."""
    for name in ("train/dog/b.png", "train/dog/a.PNG", "train/dog/c.bmp", "train/cat/a.png", "train/cat/z.bmp"):
        image(tmp_path / "pets" / name)
    image(tmp_path / "pets/test/cat/1.png")
    image(tmp_path / "pets/test/dog/1.webp", lossless=True)
    return tmp_path / "pets"


def test_a_folder_of_images_is_read_in_the_order_of_its_names(pets):
    (pets / "train/cat/a.png").unlink()
    image(pets / "train/cat/a.jpeg", quality=100, subsampling=0)
    (pets / "train/.hidden").mkdir()
    (pets / "train/dog/.DS_Store").touch()
    (pets / "README").write_text("beside them, anything may lie")
    dataset = load(f"folder:{pets}")
    assert (dataset.name, dataset.labels, dataset.shape) == ("pets", ("cat", "dog"), (3, 4, 6))
    assert dataset.y_train.tolist() == [0, 0, 1, 1, 1]
    assert dataset.y_test.tolist() == [0, 1]
    pixels = np.asarray(Image.open(pets / "train/dog/b.png")).transpose(2, 0, 1)
    for x in (*dataset.x_train[1:], *dataset.x_test):
        assert np.array_equal(x, pixels)
    assert (
        dataset.fingerprint() == load(f"folder:{pets}/").fingerprint() == load(f"folder:{pets}/../pets").fingerprint()
    )


def test_a_folder_may_be_links_and_where_one_stands(pets, tmp_path, monkeypatch):
    (tmp_path / "links/test").mkdir(parents=True)
    (tmp_path / "links/train").symlink_to(pets / "train")
    (tmp_path / "links/test/cat").symlink_to(pets / "test/cat")
    (tmp_path / "links/test/dog").mkdir()
    (tmp_path / "links/test/dog/1.webp").symlink_to(pets / "test/dog/1.webp")
    assert load(f"folder:{tmp_path}/links").fingerprint() == load(f"folder:{pets}").fingerprint()
    monkeypatch.chdir(pets)
    assert load("folder:.").name == "pets"


def test_images_are_grey_when_all_of_them_are(tmp_path):
    for number, mode in enumerate(("L", "1", "LA", "I;16")):
        image(tmp_path / f"train/{number}/1.png", mode=mode)
    image(tmp_path / "test/0/1.png", mode="L")
    grey = load(f"folder:{tmp_path}")
    assert grey.shape == (1, 4, 6)
    image(tmp_path / "test/0/2.png")
    colour = load(f"folder:{tmp_path}")
    assert colour.shape == (3, 4, 6)
    assert np.array_equal(colour.x_train, grey.x_train.repeat(3, 1))
    image(tmp_path / "test/0/2.png", mode="P", transparency=b"\0\1\2")
    assert load(f"folder:{tmp_path}").shape == (3, 4, 6)


def test_sixteen_bits_become_eight(tmp_path):
    for label in "ab":
        image(tmp_path / f"train/{label}/1.png", mode="I;16")
        image(tmp_path / f"test/{label}/1.png")
    dataset = load(f"folder:{tmp_path}")
    assert np.array_equal(dataset.x_train[0, 0], dataset.x_test[0, 0])


@pytest.mark.parametrize(("orientation", "turn"), [(1, lambda x: x), (3, lambda x: x[:, ::-1, ::-1]), (6, np.rot90)])
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for place in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        image(tmp_path / place, exif=exif)
    plain = np.asarray(Image.open(tmp_path / "train/a/1.png")).transpose(2, 0, 1)
    turned = turn(plain) if orientation != 6 else np.rot90(plain, -1, (1, 2))
    assert np.array_equal(load(f"folder:{tmp_path}").x_train[0], turned)


def strange_class(pets):
    image(pets / "test/emu/1.png")


def empty_class(pets):
    (pets / "train/emu").mkdir()


def class_of_hidden_files(pets):
    empty_class(pets)
    (pets / "train/emu/.keep").touch()


def other_size(pets):
    image(pets / "train/dog/b.png", size=(7, 5))


def turned_size(pets):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(pets / "test/cat/1.png", exif=exif)


def no_image(pets):
    (pets / "train/dog/b.png").write_text("no image")


def other_format(pets):
    """Whose decoder nobody asked for."""
    Image.new("RGB", (6, 4)).save(pets / "train/dog/b.png", format="TIFF")


def cut_off(pets):
    whole = (pets / "train/dog/c.bmp").read_bytes()
    (pets / "train/dog/c.bmp").write_bytes(whole[:-9])


def bomb(pets):
    Image.new("1", (20_000, 10_000)).save(pets / "train/dog/b.png")


def small_bomb(pets):
    Image.new("1", (10_000, 10_000)).save(pets / "train/dog/b.png")


def other_suffix(pets):
    (pets / "train/dog/notes.txt").touch()


def folder_of_folders(pets):
    (pets / "train/dog/young.png").mkdir()


def pipe(pets):
    os.mkfifo(pets / "train/dog/d.png")


def broken_link(pets):
    (pets / "train/dog/d.png").symlink_to("nowhere")


def loose_file(pets):
    image(pets / "train/a.png")


def no_test(pets):
    (pets / "test").rename(pets / "validation")


def empty_test(pets):
    no_test(pets)
    (pets / "test").mkdir()


def no_parts(pets):
    no_test(pets)
    (pets / "train").rename(pets / "training")


def odd_class(pets):
    (pets / "train/dog").rename(pets / "train/d\nog")


def odd_bytes(pets):
    os.rename(pets / "train/dog", os.fsencode(pets) + b"/train/\xff")  # noqa: PTH104


def one_class(pets):
    (pets / "train/dog").rename(pets / "train/.dog")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (strange_class, "test/emu: train/ has no such class: a data set is DIR/train/CLASS/"),
        (empty_class, "train/emu: is empty, so fill it or remove it"),
        (class_of_hidden_files, "train/emu: is empty"),
        (other_size, "train/dog/b.png: is 7 × 5, but .*train/cat/a.png 6 × 4: scale to one"),
        (turned_size, "test/cat/1.png: is 4 × 6, but"),
        (no_image, "train/dog/b.png: cannot be read as an image: cannot identify"),
        (other_format, "train/dog/b.png: cannot be read as an image: cannot identify"),
        (cut_off, "train/dog/c.bmp: cannot be read as an image: image file is truncated"),
        (bomb, r"train/dog/b.png: cannot be read as an image: Image size \(200000000 pixels\) exceeds"),
        (small_bomb, r"train/dog/b.png: cannot be read as an image: Image size \(100000000 pixels\) exceeds"),
        (other_suffix, "train/dog/notes.txt: no file that ends in .png, .jpg, .jpeg, .bmp, .webp: move it"),
        (folder_of_folders, "train/dog/young.png: no file that ends in"),
        (pipe, "train/dog/d.png: no file that ends in"),
        (broken_link, "train/dog/d.png: no file that ends in"),
        (loose_file, r"train/a.png: no folder that can be read \(Not a directory\): a data set is DIR/train/CLASS/"),
        (no_test, r"pets/test: no folder that can be read \(No such file or directory\): a data set is DIR/train"),
        (empty_test, "pets/test: is empty"),
        (no_parts, "pets: holds neither train/ nor test/, and each needs a folder for every class"),
        (odd_class, r"class 1 is called 'd\\nog', which cannot be printed"),
        (odd_bytes, r"class 1 is called '\\udcff', which cannot be printed"),
        (one_class, "number of classes is 1, not in 2..4096"),
    ],
)
def test_a_folder_that_is_no_data_set_is_one_line(pets, spoil, text):
    spoil(pets)
    with refused(text):
        load(f"folder:{pets}")


def test_a_place_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with refused(r"nowhere: no folder that can be read \(No such file or directory\): a data set is"):
        load(f"folder:{tmp_path}/nowhere")
    with refused("file: no folder that can be read"):
        load(f"folder:{tmp_path}/file")
    with refused("no folder that can be read"):
        load(f"folder:{tmp_path}/a\0b")
    with refused("no folder that can be read"):
        load(f"folder:{tmp_path}/{'x' * 300}")
    with refused("is empty"):
        (tmp_path / "empty").mkdir()
        load(f"folder:{tmp_path}/empty")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_a_damaged_image_is_refused_or_read_but_never_a_traceback(pets, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix == ".bmp" else {"exif": exif}
    path = image(pets / f"train/cat/0{suffix}", **options)
    assert_survives_damage(path.read_bytes(), path, lambda _: load(f"folder:{pets}"), 100)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A mirror of a Fashion-MNIST of twenty images, and an empty data/ to fetch it to."""
    from nmoe_train.vision import datasets

    utils = importlib.import_module("torchvision.datasets.utils")

    mirror, resources = tmp_path / "mirror", []
    mirror.mkdir()
    for part in ("train", "t10k"):
        images = np.array([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 2, 0, 0, 0, 3, *range(60)], np.uint8)
        labels = np.array([0, 0, 8, 1, 0, 0, 0, 10, *range(10)], np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(array.tobytes())
            resources.append((f"{part}-{name}-ubyte.gz", hashlib.md5(packed).hexdigest()))
            (mirror / resources[-1][0]).write_bytes(packed)
    # A response of file:// has no length, which torchvision's progress bar asks for.
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, place: shutil.copy(url.removeprefix("file://"), place))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"file://{mirror}/"])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(data, "ROOT", tmp_path / "here/data")
    return mirror


def test_a_data_set_is_fetched_once_and_says_nothing_to_stdout(fashion, capsys):
    dataset = load("fashion-mnist")
    assert dataset.shape == (1, 2, 3)
    assert dataset.labels[1] == "Trouser"
    assert capsys.readouterr().out == ""
    assert [path.name for path in data.ROOT.iterdir()] == ["FashionMNIST"]
    for path in fashion.iterdir():
        path.unlink()
    assert load("fashion-mnist").fingerprint() == dataset.fingerprint()


def test_what_torchvision_prints_goes_to_stderr(fashion, capsys, monkeypatch):
    from nmoe_train.vision import datasets

    download = datasets.FashionMNIST.download

    def print_and_download(self):
        print("Downloading")
        download(self)

    monkeypatch.setattr(datasets.FashionMNIST, "download", print_and_download)
    load("fashion-mnist")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Downloading" in shown.err


def test_a_fetch_that_fails_leaves_nothing_and_the_next_one_works(fashion):
    last = fashion / "t10k-labels-idx1-ubyte.gz"
    whole = last.read_bytes()
    for spoiled in (whole[:-5], None):
        last.write_bytes(spoiled) if spoiled else last.unlink()
        with refused(r"fashion-mnist is not in .*data/ and cannot be fetched \(Error downloading t10k-labels.*Tried"):
            load("fashion-mnist")
        assert list(data.ROOT.iterdir()) == []
    last.write_bytes(whole)
    assert load("fashion-mnist").shape == (1, 2, 3)


def test_an_interrupted_fetch_leaves_nothing(fashion, monkeypatch):
    from nmoe_train.vision import datasets

    def interrupted(self):
        (data.ROOT / next(data.ROOT.iterdir()) / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.FashionMNIST, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("fashion-mnist")
    assert list(data.ROOT.iterdir()) == []


def test_files_that_were_cut_off_are_fetched_again(fashion):
    fingerprint = load("fashion-mnist").fingerprint()
    for damage in (b"", b"\0", b"\0\0\x08\x03\0\0"):
        (data.ROOT / "FashionMNIST/raw/train-images-idx3-ubyte").write_bytes(damage)
        assert load("fashion-mnist").fingerprint() == fingerprint


def test_archives_that_somebody_brought_need_no_network(fashion):
    (data.ROOT / "FashionMNIST").mkdir(parents=True)
    fashion.rename(data.ROOT / "FashionMNIST/raw")
    assert load("fashion-mnist").shape == (1, 2, 3)


def test_a_place_that_cannot_be_is_one_line(fashion):
    data.ROOT.parent.write_text("a file where a folder should be")
    for name in ("fashion-mnist", "cifar10"):
        with refused(rf"{name} is not in .*data/ and cannot be fetched \(.*Not a directory.*\); bring it, or use npz"):
            load(name)
