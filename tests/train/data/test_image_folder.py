from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from train.refusals import assert_survives_damage, refused

from nmoe_train.data.datasets import load


def image(path, size=(6, 4), mode="RGB", **options):
    """Save an image of random pixels in the format of the path's suffix."""
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


def test_a_folder_of_images_is_loaded_in_alphabetical_order(pets):
    (pets / "train/cat/a.png").unlink()
    image(pets / "train/cat/a.jpeg", quality=100, subsampling=0)
    (pets / "train/.hidden").mkdir()
    (pets / "train/dog/.DS_Store").touch()
    (pets / "README").write_text("other entries next to train/ and test/ are ignored")
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


def test_folders_and_images_may_be_links_and_the_path_may_be_relative(pets, tmp_path, monkeypatch):
    (tmp_path / "links/test").mkdir(parents=True)
    (tmp_path / "links/train").symlink_to(pets / "train")
    (tmp_path / "links/test/cat").symlink_to(pets / "test/cat")
    (tmp_path / "links/test/dog").mkdir()
    (tmp_path / "links/test/dog/1.webp").symlink_to(pets / "test/dog/1.webp")
    assert load(f"folder:{tmp_path}/links").fingerprint() == load(f"folder:{pets}").fingerprint()
    monkeypatch.chdir(pets)
    assert load("folder:.").name == "pets"


def test_images_have_one_channel_if_all_are_grey_and_three_otherwise(tmp_path):
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


def test_sixteen_bit_pixels_are_reduced_to_eight_bits(tmp_path):
    for label in "ab":
        image(tmp_path / f"train/{label}/1.png", mode="I;16")
        image(tmp_path / f"test/{label}/1.png")
    dataset = load(f"folder:{tmp_path}")
    assert np.array_equal(dataset.x_train[0, 0], dataset.x_test[0, 0])


@pytest.mark.parametrize(("orientation", "turn"), [(1, lambda x: x), (3, lambda x: x[:, ::-1, ::-1]), (6, np.rot90)])
def test_the_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        image(tmp_path / path, exif=exif)
    plain = np.asarray(Image.open(tmp_path / "train/a/1.png")).transpose(2, 0, 1)
    turned = turn(plain) if orientation != 6 else np.rot90(plain, -1, (1, 2))
    assert np.array_equal(load(f"folder:{tmp_path}").x_train[0], turned)


def unknown_class(pets):
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
    """A TIFF: its decoder is not among the allowed ones."""
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
        (unknown_class, "test/emu: train/ has no folder for this class: a data set is DIR/train/CLASS/"),
        (empty_class, "train/emu: is empty; fill it or remove it"),
        (class_of_hidden_files, "train/emu: is empty"),
        (other_size, "train/dog/b.png: is 7 × 5, but .*train/cat/a.png is 6 × 4; scale all images to one size"),
        (turned_size, "test/cat/1.png: is 4 × 6, but"),
        (no_image, "train/dog/b.png: cannot be read as an image: cannot identify"),
        (other_format, "train/dog/b.png: cannot be read as an image: cannot identify"),
        (cut_off, "train/dog/c.bmp: cannot be read as an image: image file is truncated"),
        (bomb, r"train/dog/b.png: cannot be read as an image: Image size \(200000000 pixels\) exceeds"),
        (small_bomb, r"train/dog/b.png: cannot be read as an image: Image size \(100000000 pixels\) exceeds"),
        (other_suffix, r"train/dog/notes.txt: not an image file \(.png, .jpg, .jpeg, .bmp, .webp\); move it"),
        (folder_of_folders, "train/dog/young.png: not an image file"),
        (pipe, "train/dog/d.png: not an image file"),
        (broken_link, "train/dog/d.png: not an image file"),
        (loose_file, r"train/a.png: cannot be read as a folder \(Not a directory\): a data set is DIR/train/CLASS/"),
        (no_test, r"pets/test: cannot be read as a folder \(No such file or directory\): a data set is DIR/train"),
        (empty_test, "pets/test: is empty"),
        (no_parts, "pets: contains neither train/ nor test/; each needs one folder per class"),
        (odd_class, r"name of class 1, 'd\\nog', cannot be printed"),
        (odd_bytes, r"name of class 1, '\\udcff', cannot be printed"),
        (one_class, "number of classes is 1; it must be in 2..4096"),
    ],
)
def test_a_folder_with_a_wrong_layout_is_refused_in_one_line(pets, spoil, text):
    spoil(pets)
    with refused(text):
        load(f"folder:{pets}")


def test_a_path_that_is_not_a_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with refused(r"nowhere: cannot be read as a folder \(No such file or directory\): a data set is"):
        load(f"folder:{tmp_path}/nowhere")
    with refused("file: cannot be read as a folder"):
        load(f"folder:{tmp_path}/file")
    with refused("cannot be read as a folder"):
        load(f"folder:{tmp_path}/a\0b")
    with refused("cannot be read as a folder"):
        load(f"folder:{tmp_path}/{'x' * 300}")
    with refused("is empty"):
        (tmp_path / "empty").mkdir()
        load(f"folder:{tmp_path}/empty")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_a_damaged_image_is_loaded_or_raises_dataerror(pets, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix == ".bmp" else {"exif": exif}
    path = image(pets / f"train/cat/0{suffix}", **options)
    assert_survives_damage(path.read_bytes(), path, lambda _: load(f"folder:{pets}"), 100)
