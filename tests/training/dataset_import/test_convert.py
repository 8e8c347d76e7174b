# SPDX-License-Identifier: MIT
"""Imports beyond the official ones: bad input, what a summary says, what is left behind."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_utils.errors import UserError
from training.dataset import open_dataset
from training.dataset_import import convert as convert_module
from training.dataset_import import writer as writer_module
from training.dataset_import.convert import import_images
from training.dataset_import.plan import ImportOptions


def rgb(seed: int = 0, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, format=format, **options)
    return stream.getvalue()


def run(source: Path, dest: Path | None = None, **options):
    """The report, and the files written as arrays (dataset.json decoded), by name."""
    dest = dest or source.with_name("out.zip")
    report = import_images(ImportOptions(source=str(source), dest=str(dest), **options))
    with zipfile.ZipFile(dest) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    files = {name: np.asarray(Image.open(io.BytesIO(c))) for name, c in contents.items() if "img" in name}
    return report, {**files, "dataset.json": json.loads(contents["dataset.json"])}


def only_image(files: dict[str, object]) -> np.ndarray:
    (image,) = (content for name, content in files.items() if name != "dataset.json")
    return image


def animation(format: str) -> bytes:
    first, *others = (Image.fromarray(rgb(seed)) for seed in range(3))
    return encode(first, format, save_all=True, append_images=others, lossless=True)


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # the camera was held upright

CHANGED = {  # file name: (content, what the report calls it, expected pixels)
    "animated.png": (animation("PNG"), "several frames or pages", rgb(0)),
    "animated.webp": (animation("WEBP"), "several frames or pages", rgb(0)),
    "palette.png": (
        encode(Image.fromarray(rgb(1)).quantize(4)),
        "palette to RGB",
        np.asarray(Image.fromarray(rgb(1)).quantize(4).convert("RGB")),
    ),
    "grey.png": (encode(rgb(2)[..., 0]), "grey to RGB", np.repeat(rgb(2)[..., :1], 3, axis=2)),
    "cmyk.jpg": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "CMYK to RGB", None),
    "sixteen.png": (
        encode(rgb(4)[..., 0].astype(np.uint16) * 257),
        "16 bits per pixel",
        np.repeat(rgb(4)[..., :1], 3, axis=2),
    ),
    "clear.png": (encode(Image.new("RGBA", (8, 8), (9, 9, 9, 0))), "transparency", np.full((8, 8, 3), 255)),
    "clear_grey.png": (encode(Image.new("LA", (8, 8), (9, 0))), "transparency", np.full((8, 8, 3), 255)),
    "keyed.png": (
        encode(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)),
        "transparency",
        np.full((8, 8, 3), 255),
    ),
    "rotated.png": (encode(rgb(5), exif=ROTATED), "turned upright", np.rot90(rgb(5), -1)),
}


@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("name", CHANGED)
def test_odd_image_is_changed_and_reported(write_dataset, name, suffix):
    content, kind, expected = CHANGED[name]
    source = write_dataset("src" + suffix, {"a.png": rgb(9), name: content})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, files = run(source)
    assert report.num_images == 2 and not report.dropped.total
    assert any(change.startswith(kind) for change in report.changed.counts)
    assert name in report.text()
    image = files["00000/img00000001.png"]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    if expected is not None:
        np.testing.assert_array_equal(image, expected)
    else:  # CMYK red, through JPEG
        assert (image[..., 0] > 200).all() and (image[..., 1:] < 60).all()


def test_sixteen_bits_are_rounded_to_the_nearest(write_dataset):
    values = np.array(
        [[0, 128, 129, 257], [385, 386, 65535, 65407], [65406, 1, 2, 3], [5, 6, 7, 8]], np.uint16
    )
    _, files = run(write_dataset("src", {"a.png": encode(values)}))
    np.testing.assert_array_equal(only_image(files), np.rint(values / 257))


BAD = {  # file name: (content, what the report says)
    "text.png": (b"not an image", "no image format that Pillow knows"),
    "empty.png": (b"", "no image format that Pillow knows"),
    "half.png": (encode(rgb(0, 64, 64))[:3000], "truncated"),
    "half.jpg": (encode(rgb(0, 64, 64), "JPEG")[:1500], "truncated"),
    "float.tif": (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floating-point pixels"),
    "long.tif": (encode(Image.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF"), "32-bit pixels"),
    "large.png": (encode(rgb(0, 16, 16)), r"not 8x8 pixels \(--resolution would resize them\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_dropped_and_leaves_a_gap(write_dataset, name):
    content, message = BAD[name]
    files = {"a.png": rgb(1), f"b{name}": content, "c.png": rgb(2), "d.png": rgb(3)}
    source = write_dataset("src", files, dict.fromkeys(files, 0))
    report, written = run(source)
    assert list(written) == [*(f"00000/img0000000{i}.png" for i in (0, 2, 3)), "dataset.json"]
    assert len(written["dataset.json"]["labels"]) == 3
    assert (report.num_images, report.num_seen, report.dropped.total) == (3, 4, 1)
    assert "Dropped 1 of 4 images" in report.text() and f"b{name}" in report.text()
    assert re.search(message, report.text())
    with pytest.raises(UserError, match=rf"^b{name}: .*{message}.*--strict"):
        run(source, source.with_name("strict.zip"), strict=True)
    assert {path.name for path in source.parent.iterdir()} == {"src", "out.zip"}


def test_everything_bad_at_once_is_counted(write_dataset):
    files = {f"ok{i}.png": rgb(i) for i in range(8)}
    source = write_dataset(
        "src", {**files, **{n: c for n, (c, _) in BAD.items()}, "x.txt": b"", ".x.png": b""}
    )
    report, _ = run(source)
    assert (report.num_images, report.dropped.total) == (8, len(BAD))
    assert report.dropped.counts.most_common(1) == [("not readable as an image", 4)]
    assert "2 not taken for images: 1 hidden, 1 .txt" in report.text()


def test_only_the_first_files_of_a_kind_are_named(write_dataset):
    files = {"a.png": rgb(), **{f"bad{i}.png": b"x" for i in range(9)}}
    text = run(write_dataset("src", files))[0].text()
    assert "bad4.png" in text and "bad5.png" not in text and "... and 4 more" in text


def test_nothing_left(write_dataset):
    source = write_dataset("src", {"a.png": encode(rgb(0, 64, 64))[:3000], "b.png": b"x"})
    with pytest.raises(
        UserError, match=r"no image is left; dropped: 2 not readable .*first: a\.png: .*truncated"
    ):
        run(source)
    assert [path.name for path in source.parent.iterdir()] == ["src"]


def test_name_twice_in_a_zip(tmp_path):
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        for name, seed in (("a.png", 1), ("a.png", 2), ("b.png", 3)):
            archive.writestr(name, encode(rgb(seed)))
    report, files = run(tmp_path / "a.zip")
    assert list(files)[:-1] == ["00000/img00000000.png", "00000/img00000002.png"]
    np.testing.assert_array_equal(files["00000/img00000000.png"], rgb(2))
    assert "archive holds twice" in report.text()


def test_a_set_is_grey_only_if_all_images_are(write_dataset):
    grey = {f"{i}.png": rgb(i)[..., 0] for i in range(3)}
    report, files = run(write_dataset("grey", grey), resolution=(8, 8))
    assert report.mode == "grey" and files["00000/img00000001.png"].shape == (8, 8)
    source = write_dataset("mixed", {**grey, "9.png": rgb()})
    report, files = run(source, source.with_name("mixed.zip"), resolution=(8, 8))
    assert report.mode == "RGB" and files["00000/img00000001.png"].shape == (8, 8, 3)
    assert report.changed.counts == {"grey to RGB": 3}


def test_official_switch(tmp_path):
    folder = tmp_path / "src" / "n01440764"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(encode(rgb(1)[..., 0], "JPEG"))
    (folder / "b.png").write_bytes(encode(rgb(2), exif=ROTATED))
    (tmp_path / "src" / "n01443537").mkdir()
    report, files = run(tmp_path / "src")
    assert report.num_images == 2 and files["dataset.json"]["class_names"] == ["n01440764", "n01443537"]
    np.testing.assert_array_equal(files["00000/img00000001.png"], np.rot90(rgb(2), -1))
    assert "1 classes from 'n01443537' on have no image" in report.text()
    report, files = run(tmp_path / "src", tmp_path / "official.zip", official=True)
    assert files["dataset.json"] == {"labels": [["00000/img00000001.png", 0]]}
    np.testing.assert_array_equal(only_image(files), rgb(2))
    assert "grey ImageNet image (--official)" in report.text()


# The destination, and what holds for a whole import.


def test_the_same_import_gives_the_same_bytes(write_dataset):
    source = write_dataset("src", {f"{i}.png": rgb(i, 20, 30) for i in range(40)})
    contents = []
    for num_threads in (1, 4):
        dest = source.with_name(f"{num_threads}.zip")
        run(source, dest, resolution=(16, 16), num_threads=num_threads)
        contents.append(dest.read_bytes())
    assert contents[0] == contents[1]


def test_zip_and_folder_have_one_content_hash(write_dataset, tmp_path):
    source = write_dataset(
        "src", {f"{i}.png": rgb(i) for i in range(5)}, {f"{i}.png": i % 2 for i in range(5)}
    )
    zipped, _ = run(source)
    folder = import_images(ImportOptions(source=str(source), dest=str(tmp_path / "folder")))
    again, _ = run(source, tmp_path / "other.zip", max_images=4)
    assert zipped.content_hash == folder.content_hash != again.content_hash
    for dest in ("out.zip", "folder"):
        assert open_dataset(tmp_path / dest).content_hash == zipped.content_hash
    assert zipped.num_bytes == sum(file.stat().st_size for file in (tmp_path / "folder").rglob("*.png"))


@pytest.mark.parametrize("dest", ["out.zip", "out", "deep/out.zip", "deep/out"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_import_leaves_nothing(write_dataset, monkeypatch, dest, error):
    source = write_dataset("src", {f"{i}.png": rgb(i) for i in range(30)})
    plain, count = convert_module.encode_png, iter(range(100))
    monkeypatch.setattr(
        convert_module, "encode_png", lambda pixels: plain(pixels) if next(count) < 20 else fail(error)
    )
    dest = source.parent / dest
    with pytest.raises(type(error)):
        import_images(ImportOptions(source=str(source), dest=str(dest), num_threads=2))
    assert not [path for path in source.parent.rglob("*") if path.is_file() and source not in path.parents]
    assert not dest.exists()


def fail(error: BaseException):
    raise error


def test_a_full_disk_is_one_line(write_dataset, monkeypatch):
    source = write_dataset("src", {"a.png": rgb()})
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: fail(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"--dest .*out\.zip: cannot be written \(No space left on device\)"):
        import_images(ImportOptions(source=str(source), dest=str(source.with_name("out.zip"))))
    assert [path.name for path in source.parent.iterdir()] == ["src"]


def test_space_is_checked_first(write_dataset, monkeypatch):
    source = write_dataset("src", {f"{i}.png": rgb(i) for i in range(9)})
    usage = writer_module.shutil.disk_usage(source)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(UserError, match=r"needs up to 5\.2 KiB, but .* has 4\.9 KiB free; .*--max-images"):
        run(source)


def test_existing_destinations(write_dataset, tmp_path):
    source = write_dataset("src", {"a.png": rgb()})
    (tmp_path / "out.zip").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"out\.zip exists; .*--overwrite"):
        run(source)
    assert (tmp_path / "out.zip").read_bytes() == b"precious"
    assert run(source, overwrite=True)[0].num_images == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.zip").mkdir()
    for name, message in (("full", "is not empty"), ("dir.zip", "is a folder"), ("full/x", "is a file")):
        with pytest.raises(UserError, match=message):
            import_images(ImportOptions(source=str(source), dest=str(tmp_path / name)))
    for name, message in (("src", "is not empty"), ("src/new", "inside the source")):
        with pytest.raises(UserError, match=message):
            import_images(ImportOptions(source=str(source), dest=str(tmp_path / name)))
    import_images(ImportOptions(source=str(source), dest=str(tmp_path / "empty")))
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["00000", "dataset.json"]


REFUSED_SIZES = {  # name: (height and width of the images, options, message)
    "not square": ([(8, 12)], {}, "12x8 pixels, but training needs squares.*--resolution"),
    "no power of two": ([(12, 12)], {}, "12x12 pixels, but training needs squares"),
    "no majority": ([(8, 8), (16, 16)], {}, "images of 2 sizes, at most 1 of 2 alike .*--resolution"),
    "crop without size": ([(8, 8)], {"transform": "center-crop"}, "--transform center-crop needs the size"),
    "odd resolution": ([(8, 8)], {"resolution": (12, 12)}, "12 is not a power of two of at least 4.*16"),
    "oblong resolution": ([(8, 8)], {"resolution": (16, 8)}, "16x8 is not square.*16x16.*center-crop-wide"),
    "tall band": (
        [(8, 8)],
        {"resolution": (8, 16), "transform": "center-crop-wide"},
        "center-crop-wide needs a height from 1 to the width 8",
    ),
    "no images wanted": ([(8, 8)], {"max_images": 0}, "--max-images 0 leaves nothing"),
}


@pytest.mark.parametrize("case", REFUSED_SIZES)
def test_what_cannot_work_is_refused_before_long_work(write_dataset, monkeypatch, case):
    sizes, options, message = REFUSED_SIZES[case]
    source = write_dataset("src", {f"{i}.png": rgb(i, *size) for i, size in enumerate(sizes)})
    monkeypatch.setattr(convert_module, "decode_image", lambda *_, **__: fail(AssertionError("work began")))
    with pytest.raises(UserError, match=message):
        run(source, **options)
    assert [path.name for path in source.parent.iterdir()] == ["src"]


def test_official_upscaling_and_order(write_dataset):
    names = ["b/img2.png", "a/img10.png", "b-2/x.png", "B/img3.png", "b.png", "a/img2.png"]
    report, files = run(
        write_dataset("src", {n: rgb(i, 4, 4) for i, n in enumerate(names)}), resolution=(8, 8)
    )
    ordered = ["B/img3.png", "a/img10.png", "a/img2.png", "b/img2.png", "b-2/x.png", "b.png"]
    for index, name in enumerate(ordered):  # folders before files that only share the beginning of their name
        image = Image.fromarray(rgb(names.index(name), 4, 4)).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(files[f"00000/img{index:08d}.png"], np.asarray(image))
    assert report.num_images == 6


def test_damaged_bytes_never_stop_an_import(write_dataset):
    generator = np.random.default_rng(0)
    files: dict[str, bytes] = {"a.png": encode(rgb(99))}
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        whole = encode(rgb(1), format)
        for i in range(20):
            content = bytearray(whole)
            for position in generator.integers(0, len(content), 4):
                content[position] = generator.integers(256)
            files[f"{format}{i}.{format.lower()}"] = bytes(content)
    report, written = run(write_dataset("src", files), resolution=(8, 8))
    assert report.num_seen == len(files) == report.num_images + report.dropped.total
    assert report.dropped.total > 20 and len(written) == report.num_images + 1
