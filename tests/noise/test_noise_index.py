"""Noise-index files: what RDE's data sets read, an exact round trip, and what is refused."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.errors import explains

from fmfa_losses.noise import apply_noise_index, make_noise_index, read_noise_index, write_noise_index


class Pair(NamedTuple):
    pid: int
    image_id: int
    path: str
    caption: str


def pairs(length=6):
    return [(i // 2, i, f"{i}.jpg", f"caption {i}") for i in range(length)]


@pytest.mark.parametrize(("length", "rate"), [(1, 1.0), (10, 0.0), (7, 0.5), (1000, 0.2), (1000, 0.8)])
def test_an_index_moves_its_share_and_no_more(length, rate):
    index = make_noise_index(length, rate)
    assert index.dtype == torch.int64
    assert torch.equal(index.sort().values, torch.arange(length))
    moved = int((index != torch.arange(length)).sum())
    assert moved <= int(rate * length)
    assert moved > int(rate * length) - 10
    assert torch.equal(make_noise_index(length, rate), index)
    if length == 1000:
        assert not torch.equal(make_noise_index(length, rate, seed=1), index)


def test_a_seed_that_no_generator_takes():
    with explains(ValueError, "seed must be an integer from 0 to", str(2**70)):
        make_noise_index(7, 0.5, seed=2**70)


def test_the_global_random_state_stays():
    before = torch.get_rng_state()
    make_noise_index(50, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_files_of_the_released_code(tmp_path):
    """It writes np.arange with a shuffled part, by np.save, and reads it with np.load."""
    released = np.arange(40)
    chosen = np.random.default_rng(0).permutation(40)[:16]
    released[chosen] = np.random.default_rng(1).permutation(chosen)
    np.save(tmp_path / "RSTPReid_0.4.npy", released)
    index = read_noise_index(tmp_path / "RSTPReid_0.4.npy", length=40)
    assert index.tolist() == released.tolist()
    write_noise_index(str(tmp_path / "ours.npy"), index)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "RSTPReid_0.4.npy").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "ours.npy"), released)


@pytest.mark.parametrize("dtype", ["int32", ">i8", "uint8", "uint64"])
def test_integers_of_every_dtype(tmp_path, dtype):
    np.save(tmp_path / "index.npy", np.array([2, 0, 1], dtype=dtype))
    assert read_noise_index(tmp_path / "index.npy").tolist() == [2, 0, 1]
    if dtype[0] != ">":
        write_noise_index(tmp_path / "again.npy", torch.tensor([2, 0, 1], dtype=getattr(torch, dtype)))
        assert np.load(tmp_path / "again.npy").dtype == np.int64


def test_the_path_is_taken_as_it_is(tmp_path):
    """np.save would append .npy, and RDE would look in vain."""
    write_noise_index(tmp_path / "noise", torch.tensor([1, 0]))
    assert [file.name for file in tmp_path.iterdir()] == ["noise"]
    assert read_noise_index(tmp_path / "noise").tolist() == [1, 0]


def test_captions_move_and_nothing_else():
    given = pairs()
    before = list(given)
    index = torch.tensor([0, 4, 2, 1, 3, 5])
    moved = apply_noise_index(given, index)
    assert given == before
    assert [pair[:3] for pair in moved] == [pair[:3] for pair in given]
    assert [pair[3] for pair in moved] == [f"caption {i}" for i in index.tolist()]
    assert apply_noise_index(moved, index.argsort()) == given  # the inverse puts them back
    assert apply_noise_index(given, torch.arange(6)) == given


def test_samples_keep_their_type():
    index = torch.tensor([1, 0])
    assert apply_noise_index([["a", 0], ["b", 1]], index, caption=0) == [["b", 0], ["a", 1]]
    named = apply_noise_index([Pair(*pair) for pair in pairs(2)], index)
    assert all(type(pair) is Pair for pair in named) and named[0].caption == "caption 1"


def write(path, array):
    np.save(path, array, allow_pickle=True)
    return path


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capsys):
    path = write(tmp_path / "trap.npy", np.array([Trap()], dtype=object))
    with explains(ValueError, ("trap.npy", ".npy file of integers"), (), "write_noise_index"):
        read_noise_index(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("array", "length", "error", "parts"),
    [
        ([0, 1, 2], 4, ValueError, ("must have shape [4]", "[3]", "this data set")),
        ([[0, 1]], None, ValueError, ("must have shape [N]", "[1, 2]", ())),
        ([0.0, 1.0], None, TypeError, ("must hold integers", "float64", "write_noise_index")),
        ([True, False], None, TypeError, ("must hold integers", "bool", ())),
        ([0, 2, 2], None, ValueError, ("permutation of 0 ... 2", "2 where 1", "make_noise_index")),
        ([0, 1, 3], None, ValueError, ("permutation of 0 ... 2", "3 where 2", ())),
        ([-1, 0, 1], None, ValueError, ("permutation of 0 ... 2", "-1 where 0", ())),
        (np.array([0, 2**63], dtype="u8"), None, ValueError, ("below its length", str(2**63), ())),
    ],
)
def test_what_is_no_index_of_the_data_set(tmp_path, array, length, error, parts):
    invariant, *others = parts
    with explains(error, ("index.npy", invariant), *others):
        read_noise_index(write(tmp_path / "index.npy", np.array(array)), length)


@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x03\x04"])
def test_what_is_no_array(tmp_path, content):
    (tmp_path / "index.npy").write_bytes(content)
    with explains(ValueError, ("index.npy", ".npy file"), (), "write_noise_index"):
        read_noise_index(tmp_path / "index.npy")
    with pytest.raises(FileNotFoundError):
        read_noise_index(tmp_path / "none.npy")


def test_a_truncated_file(tmp_path):
    path = write(tmp_path / "index.npy", np.arange(100))
    path.write_bytes(path.read_bytes()[:-80])
    with explains(ValueError, ("index.npy", ".npy file"), (), "write_noise_index"):
        read_noise_index(path)


def test_other_bad_input(tmp_path):
    with explains(ValueError, ("index", "permutation"), "1 where 0"):
        write_noise_index(tmp_path / "index.npy", torch.tensor([1, 1]))
    assert not list(tmp_path.iterdir())  # nothing is written
    with explains(TypeError, ("index", "integer"), "list", ()):
        write_noise_index(tmp_path / "index.npy", [1, 0])
    with explains(ValueError, "must have shape [6]", "[2]", "this data set"):
        apply_noise_index(pairs(), torch.tensor([1, 0]))
    with explains(TypeError, "a caption at 4", "tuple", "caption="):
        apply_noise_index(pairs(2), torch.tensor([1, 0]), caption=4)
    with explains(TypeError, "tuples or lists", "dict", "samples such as"):
        apply_noise_index([{"caption": "a"}, {"caption": "b"}], torch.tensor([1, 0]))
    for length, rate in ((0, 0.5), (5, 1.5), (5, -0.1)):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            make_noise_index(length, rate)
