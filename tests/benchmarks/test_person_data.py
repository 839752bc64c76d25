"""Data sets on disk, good and broken: annotations, images, captions that are too long."""

import json
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.person_folders import SIZE, folder_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.person_retrieval.data import (
    LAYOUTS,
    DataError,
    Pairs,
    Split,
    check_images,
    images,
    read_dataset,
    rendered_splits,
    splits_of,
    too_long,
)
from benchmarks.person_retrieval.data.images import read_image
from benchmarks.person_retrieval.models import WordTokenizer

# --------------------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read(name: str, tmp_path: Path) -> None:
    root = folder_of(tmp_path, name)
    train, test = (check_images(read_dataset(name, root, split)) for split in ("train", "test"))
    assert train.name == f"{name} train"
    assert str(train) == "4 identities, 8 images, 16 captions"
    assert train.image_pids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert train.caption_images.tolist() == [image for image in range(8) for _ in range(2)]
    assert train.photograph(3).size == SIZE
    assert train.files is not None and train.files[3] == root / name / "imgs" / "cam" / "0001_1.png"
    assert str(test) == "2 identities, 4 images, 8 captions"
    assert read_dataset(name, root / name, "test").captions == test.captions  # the data set's own folder
    if name == "ICFG-PEDES":
        assert splits_of(name, root) == {"train", "test"}
        assert test.image_pids.tolist() == [128, 128, 135, 135]
        with pytest.raises(DataError, match=r"ICFG-PEDES\.json has no entries of the split 'val', it has train, test"):
            read_dataset(name, root, "val")
    else:
        assert splits_of(name, root) == {"train", "val", "test"}
        assert read_dataset(name, root, "val").image_pids.tolist() == [128, 128, 135, 135]
        assert test.image_pids.tolist() == [142, 142, 149, 149]


def test_no_such_thing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CUHK-PEDES/reid_raw\.json nor .*reid_raw\.json; pass --root"):
        read_dataset("CUHK-PEDES", tmp_path, "train")
    with pytest.raises(ValueError, match="dataset must be one of CUHK-PEDES, ICFG-PEDES, RSTPReid, got 'Market'"):
        splits_of("Market", tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'gallery'"):
        read_dataset("CUHK-PEDES", tmp_path, "gallery")


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """A good one, of identity `number`; every third is in test."""
    split = "test" if number % 3 == 2 else "train"
    return {"split": split, "id": number, "img_path": f"{number}.png", "captions": ["a man"]} | changes


def read(folder: Path, content: Any) -> Split:
    """The training split of an annotation file with this content: bytes, text, or what becomes JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / "data_captions.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dataset("RSTPReid", folder, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data_captions\.json must be JSON, got: Expecting value"),
        ('[{"split": "train",', r"data_captions\.json must be JSON, got: .*line 1 column"),
        ("[" * 100_000, "must be JSON, got: .*recursion"),
        (b'["\xff"]', r"data_captions\.json must be UTF-8, got invalid start byte at byte 2"),
        ({"train": []}, r'must be a list of entries, got {"train": \[\]}'),
        ([], "must be a list of entries, got an empty list"),
    ],
)
def test_what_is_no_list_of_entries_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "a man"}, 'captions must be a list of strings, got "a man"'),
        ({"captions": ["a man", None]}, r'captions must be a list of strings, got \["a man", null\]'),
        ({"captions": []}, "an image must have a caption that is not empty, 1.png has none"),
        ({"captions": ["", " \n"]}, "an image must have a caption that is not empty, 1.png has none"),
        ({"captions": ["a \ud800 man"]}, r"must be Unicode text, got half a surrogate pair in .*ud800"),
        ({"id": True}, "id must be an integer from 0, got true"),
        ({"id": "12"}, 'id must be an integer from 0, got "12"'),
        ({"id": 1.0}, r"id must be an integer from 0, got 1\.0"),
        ({"id": -1}, "id must be an integer from 0, got -1"),
        ({"id": 2**63}, "id must be an integer from 0, got 9223372036854775808"),
        ({"split": "training"}, 'split must be one of train, val, test, got "training"'),
        ({"split": ["train"]}, r'split must be one of train, val, test, got \["train"\]'),
        ({"img_path": 7}, "img_path must name a file below imgs/, got 7"),
        ({"img_path": "./"}, r'img_path must name a file below imgs/, got "\./"'),
        ({"img_path": "a/../../b.png"}, "img_path must be relative and stay below imgs/"),
        ({"img_path": "..\\b.png"}, "img_path must be relative and stay below imgs/"),
        ({"img_path": "/etc/b.png"}, "img_path must be relative and stay below imgs/"),
        ({"img_path": "C:/b.png"}, "img_path must be relative and stay below imgs/"),
        (
            {"img_path": ".//0.png", "split": "val"},
            r"an image must be in one split, 0\.png is in val and, in entry 0, in train",
        ),
        ({"img_path": "0.png", "captions": [""]}, r"an image must have a caption that is not empty, 0\.png has none"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)1 problems in .*data_captions\.json.*\n  entry 1: .*{message}"):
        read(tmp_path, [entry(0), entry(1, **changes), entry(2)])


def test_an_entry_that_is_none_and_all_that_is_wrong_are_named(tmp_path: Path) -> None:
    without = entry(1)
    del without["id"], without["captions"]
    with pytest.raises(DataError) as caught:
        read(tmp_path, [entry(0), without, 7, *(entry(i, id="x") for i in range(3, 8))])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 problems in ")
    assert lines[1] == "  entry 1: must have the fields captions, id, got only split, img_path"
    assert lines[2] == "  entry 2: must be an object, got 7"
    assert lines[3:] == [*(f'  entry {i}: id must be an integer from 0, got "x"' for i in (3, 4, 5)), "  and 2 more"]


def test_what_is_handled_is_counted(tmp_path: Path) -> None:
    """Empty captions, paths listed again, ids in two splits, a byte order mark, other fields."""
    entries = [
        entry(0, captions=["a man", "", "  "]),
        entry(1, processed_tokens=[["a"]]),
        entry(0, img_path="./0.png", captions=["a boy"]),
        entry(2, captions=["", "a cat"]),
        entry(7, img_path="0.png", captions=["a girl"]),
        entry(9, split="test"),
        entry(9, split="train", img_path="10.png"),
    ]
    split = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(entries).encode())
    assert split.captions == ["a man", "a man", "a boy", "a girl", "a man"]
    assert split.caption_images.tolist() == [0, 1, 0, 2, 3] and split.image_pids.tolist() == [0, 1, 2, 3]
    assert split.files == [tmp_path / "imgs" / path for path in ("0.png", "1.png", "0.png", "10.png")]
    assert split.notes == {
        "empty captions left out": 2,
        "repeated images merged": 1,
        "images with several identities": 1,
        "identities with the number of one in another split": 1,
    }
    assert str(split).startswith("4 identities, 4 images, 5 captions (empty captions left out: 2, repeated images")
    assert read_dataset("RSTPReid", tmp_path, "test").notes == {
        "empty captions left out": 1,
        "identities with the number of one in another split": 1,
    }


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(["split", "id", "img_path", "captions"]), value=anything)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_an_entry_is_read_or_named(tmp_path: Path, field: str, value: Any) -> None:
    try:
        assert read(tmp_path, [entry(0), entry(1, **{field: value})]).num_identities in (1, 2)
    except DataError as error:
        str(error).encode()  # can be printed


# -------------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, *, head: tuple[int, int] | None = None) -> bytes:
    """Black; `head` is the size that its header claims."""
    found = bytearray(zlib.compress(b"".join(b"\0" + bytes((width + 7) // 8) for _ in range(height))))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *(head or (width, height)), 1, 0, 0, 0, 0)), (b"IDAT", bytes(found))]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """imgs/ of two training identities with two images each."""
    return folder_of(tmp_path, "RSTPReid", train=2, val=0, test=1) / "RSTPReid" / "imgs" / "cam"


def training(folder: Path) -> Split:
    return read_dataset("RSTPReid", folder.parents[1], "train")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def become_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (Path.unlink, "there is no such file"),
    (become_folder, "it is no file"),
    (lambda file: file.write_bytes(b""), "it has 0 bytes"),
    (lambda file: file.write_bytes(b"no image"), "it is no image in a format that Pillow knows"),
    (cut, "truncated|Truncated"),
    (lambda file: file.write_bytes(png(4, 4, head=(12_000, 12_000))), "must have at most 128,000,000 pixels"),
    (lambda file: file.write_bytes(png(4, 4, head=(60_000, 60_000))), "must have at most 128,000,000 pixels"),
    (lambda file: file.write_bytes(png(4, 4, head=(10_000, 10_000))), "truncated"),  # 100 megapixels are allowed
    (lambda file: Image.new("F", SIZE).save(file, "TIFF"), "floating-point pixels"),
    (lambda file: Image.new("I", SIZE, 70_000).save(file, "TIFF"), "its integers have more than 16 bits"),
]


@pytest.mark.parametrize(("breaks", "reason"), BROKEN)
def test_an_image_that_cannot_be_read_is_named(folder: Path, breaks: Callable[[Path], Any], reason: str) -> None:
    breaks(folder / "0001_0.png")
    split = training(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # elsewhere it is no error
        with pytest.raises(DataError, match=rf"1 of 4 images of RSTPReid train .*\n.*0001_0\.png .*{reason}"):
            check_images(split, workers=2)
    with pytest.raises(DataError, match=rf"^image .*0001_0\.png cannot be read: .*{reason}"):
        split.photograph(2)


def test_all_broken_images_are_one_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "RSTPReid", train=4, val=0, test=1) / "RSTPReid" / "imgs" / "cam"
    for file in folder.glob("000[0-3]_?.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_images(training(folder))
    lines = str(caught.value).splitlines()
    assert "8 of 8 images of RSTPReid train" in lines[0] and lines[-1] == "  and 3 more"
    assert [Path(line.split()[1]).name for line in lines[1:-1]] == [f"000{i // 2}_{i % 2}.png" for i in range(5)]


def test_an_image_that_breaks_later_is_named_by_the_worker_that_reads_it(folder: Path) -> None:
    split = check_images(training(folder))
    (folder / "0001_1.png").write_bytes(b"")
    pairs = pickle.loads(pickle.dumps(Pairs(split, torch.zeros(8, 5, dtype=torch.long), size=(48, 16))))
    assert pairs[0]["pixels"].shape == (3, 48, 16)  # as in a worker that was not forked
    batches = iter(DataLoader(pairs, batch_size=8, num_workers=1))
    with pytest.raises(DataError, match=r"^image [^\n]*0001_1\.png cannot be read: it has 0 bytes$"):
        next(batches)
    assert not list(batches)  # a worker that is not read to its end ends five seconds late


def save_palette(file: Path) -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(file, transparency=b"\x00\x80")


def save_turned(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE, (10, 20, 30)).save(file, exif=exif)


DROPPED = "images whose transparency was dropped"
UNUSUAL: list[tuple[Callable[[Path], Any], tuple[int, int, int], set[str]]] = [
    (lambda file: Image.new("RGB", SIZE, (10, 20, 30)).save(file), (10, 20, 30), set()),
    (lambda file: Image.new("L", SIZE, 9).save(file), (9, 9, 9), {"greyscale images"}),
    (lambda file: Image.new("1", SIZE, 1).save(file), (255, 255, 255), {"greyscale images"}),
    (lambda file: Image.new("LA", SIZE, (9, 0)).save(file), (9, 9, 9), {"greyscale images", DROPPED}),
    (lambda file: Image.new("RGBA", SIZE, (10, 20, 30, 0)).save(file), (10, 20, 30), {DROPPED}),
    (save_palette, (10, 20, 30), {"palette images", DROPPED}),
    (
        lambda file: Image.fromarray(np.full(SIZE[::-1], 0x1234, dtype=np.uint16)).save(file),
        (0x12, 0x12, 0x12),
        {"greyscale images", "16-bit images"},
    ),
    (
        lambda file: Image.new("I", SIZE, 0x1234).save(file, "TIFF"),
        (0x12, 0x12, 0x12),
        {"greyscale images", "16-bit images"},
    ),
    (lambda file: Image.new("CMYK", SIZE, (0, 255, 255, 0)).save(file, "TIFF"), (255, 0, 0), {"CMYK images"}),
    (save_turned, (10, 20, 30), {"EXIF orientations ignored"}),
    (lambda file: Image.new("RGB", (1, 1), (10, 20, 30)).save(file), (10, 20, 30), {"images smaller than 16 px"}),
    (lambda file: Image.new("RGB", (15, 90), (10, 20, 30)).save(file), (10, 20, 30), {"images smaller than 16 px"}),
    (lambda file: Image.new("RGB", (16, 16), (10, 20, 30)).save(file), (10, 20, 30), set()),
]


@pytest.mark.parametrize(("save", "color", "notes"), UNUSUAL)
def test_every_kind_of_image_becomes_rgb_and_is_counted(
    folder: Path, save: Callable[[Path], Any], color: tuple[int, int, int], notes: set[str]
) -> None:
    file = folder / "0000_1.png"
    save(file)
    split = check_images(training(folder))
    assert split.notes == dict.fromkeys(notes, 1)
    photo = split.photograph(1)
    with Image.open(file) as stored:
        assert photo.size == stored.size and photo.mode == "RGB"
    assert photo.getpixel((0, 0)) == color
    pixels = Pairs(split, torch.zeros(8, 5, dtype=torch.long), size=(48, 16)).images()[1]
    assert pixels.dtype == torch.uint8 and (pixels == torch.tensor(color)[:, None, None]).all()


def test_huge_images_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "HUGE", 10**6)
    (folder / "0000_0.png").write_bytes(png(1000, 1000))
    (folder / "0000_1.png").write_bytes(png(1000, 1001))
    assert check_images(training(folder)).notes == {"greyscale images": 2, "images of more than 1 megapixels": 1}


def test_checks_add_to_what_reading_counted(folder: Path) -> None:
    for number in (0, 1):
        Image.new("L", SIZE).save(folder / f"0000_{number}.png")
    file = folder.parents[1] / "data_captions.json"
    entries = json.loads(file.read_text())
    entries[0]["captions"].append("")
    file.write_text(json.dumps(entries))
    seen: list[int] = []
    split = check_images(training(folder), progress=lambda images: (seen.append(len(images)), images)[1])
    assert split.notes == {"empty captions left out": 1, "greyscale images": 2} and seen == [4]
    assert check_images(split).notes == split.notes
    drawn = rendered_splits({"train": 1})["train"]
    assert check_images(drawn) is drawn


def encoded(kind: str) -> bytes:
    file = BytesIO()
    Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 20).convert("RGB").save(file, kind)
    return file.getvalue()


FILES = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")]


@given(whole=st.sampled_from(FILES), position=st.floats(0, 1), damage=st.binary(max_size=8), end=st.floats(0.5, 1))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_read_or_named(
    tmp_path: Path, whole: bytes, position: float, damage: bytes, end: float
) -> None:
    file, start = tmp_path / "damaged", int(position * len(whole))
    damaged = whole[:start] + damage + whole[start + len(damage) :]
    file.write_bytes(damaged[: int(end * len(whole))])
    try:
        assert read_image(file).mode == "RGB"
    except DataError as error:
        assert str(error).startswith(f"image {file} cannot be read: ")


def test_captions_that_the_tokenizer_cuts_are_counted() -> None:
    captions = ["a b c", "a b c d", "", "a b", "a b c a b c"]  # with SOT and EOT 5, 6, 2, 4, 8 tokens
    tokenizer = WordTokenizer(captions, context_length=5)
    assert too_long(tokenizer, captions) == too_long(tokenizer, captions, tokenizer(captions)) == 2
    assert too_long(tokenizer, captions[2:4], tokenizer(captions[2:4])) == 0
    assert tokenizer.context_length == 5

    class Fixed(WordTokenizer):
        def __call__(self, captions: Any) -> torch.Tensor:
            return super().__call__(captions)[:, :5]

    with pytest.raises(ValueError, match="must read its context_length when it is called, got 5 ids for 6"):
        too_long(Fixed(captions, context_length=5), captions)
