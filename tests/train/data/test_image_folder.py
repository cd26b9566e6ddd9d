from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from train.refusals import assert_survives_damage, refused

from nmoe_train.data.datasets import load


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
