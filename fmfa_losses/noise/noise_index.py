"""Noise-index files: which caption stands with which image in an experiment with noisy correspondence.

    index [N] int64, a permutation:   pair i gets image i, its pid and image id, and the caption of pair index[i]

A pair is noisy where index[i] != i. The captions of a share `rate` of the pairs are shuffled among these pairs, so a
few of them keep their own caption, and some get another caption of the same person; both count by the index alone.

A file is index.npy as NumPy writes it. RDE publishes some (2024-CVPR-RDE/noiseindex/CUHK-PEDES_0.2.npy and others) and
reads them in datasets/bases.py; those written here are read there. They belong to one order of the training pairs: that
in which RDE's data sets list them.

The code there seeds `random` and shuffles with NumPy, so a file that it makes anew is another one in every run.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_fraction, check_integer, describe, integer_ids

__all__ = ["apply_noise_index", "make_noise_index", "read_noise_index", "write_noise_index"]


def make_noise_index(length: int, rate: float, *, seed: int = 0) -> Tensor:
    """A noise index: the captions of int(rate N) pairs, drawn at random, shuffled among these pairs.

        index[chosen] = shuffled chosen,   index[i] = i elsewhere

    Args:
        length: N, pairs of the training set.
        rate: in [0, 1].
        seed: the same seed gives the same index; 0 to 2^63 - 1.
    Returns:
        [N] int64 on the CPU, a permutation of 0 ... N - 1.
    Raises:
        TypeError, ValueError: a length < 1, a rate outside [0, 1] or a seed out of its range.
    Example:
        >>> index = make_noise_index(10, 0.5)
        >>> index.sort().values.equal(torch.arange(10)), (index != torch.arange(10)).sum() <= 5
        (True, tensor(True))

    Reference: RDE, arXiv 2308.09911, section 4.1 (synthetic noise of 20, 50 and 80 %).
    """
    length, rate = check_integer("length", length, 1), check_fraction("rate", rate)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0, 2**63 - 1))
    chosen = torch.randperm(length, generator=generator)[: int(rate * length)]
    index = torch.arange(length)
    index[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    return index


def write_noise_index(path: str | os.PathLike[str], index: Tensor) -> None:
    """Writes a noise index as RDE's data sets read it (--noisy_file); an existing file is replaced.

        file = NumPy array [N] int64

    Args:
        path: of the file, taken as it is; RDE's names end with `.npy`.
        index: [N], a permutation of 0 ... N - 1, any integer dtype.
    Raises:
        ImportError: NumPy is missing.
        TypeError, ValueError: no integers [N], or no permutation.
    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "RSTPReid_0.2.npy")
        >>> write_noise_index(path, torch.tensor([2, 1, 0]))
        >>> read_noise_index(path)
        tensor([2, 1, 0])

    Reference: 2024-CVPR-RDE/datasets/bases.py, inject_noisy_correspondence.
    """
    numpy, checked = _numpy(), _checked("index", index)
    with open(path, "wb") as file:
        numpy.save(file, checked.numpy(), allow_pickle=False)


def read_noise_index(path: str | os.PathLike[str], length: int | None = None) -> Tensor:
    """Reads a noise index, one of RDE's or of `write_noise_index`; nothing is unpickled.

        index [N]:   pair i has the caption of pair index[i]

    Args:
        path: of a `.npy` file.
        length: N, pairs of the training set, which the file must have; None: any.
    Returns:
        [N] int64 on the CPU, a permutation of 0 ... N - 1.
    Raises:
        ImportError: NumPy is missing.
        OSError: there is no such file.
        TypeError, ValueError: no `.npy` file of integers [N], another length, or no permutation.
    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "RSTPReid_0.2.npy")
        >>> write_noise_index(path, torch.tensor([2, 1, 0]))
        >>> read_noise_index(path, length=3)
        tensor([2, 1, 0])

    Reference: 2024-CVPR-RDE/datasets/bases.py, inject_noisy_correspondence.
    """
    name, numpy = os.fspath(path), _numpy()
    length = None if length is None else check_integer("length", length, 1)
    with open(path, "rb") as file:
        try:
            array = numpy.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{name} must be a .npy file of integers, got one that NumPy does not read ({error}); write it with "
                "write_noise_index"
            ) from error
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must hold integers, got {array.dtype} {list(array.shape)}; write it with write_noise_index"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
        raise ValueError(f"{name} must hold indices below its length, got {int(array.max())}; look for another file")
    return _checked(name, torch.from_numpy(array.astype("int64")), length)


def apply_noise_index(samples: Sequence[Any], index: Tensor, *, caption: int = -1) -> list[Any]:
    """The training pairs with their captions moved; what is given stays as it is.

        pair i = all of samples[i], with the caption of samples[index[i]]

    Args:
        samples: N tuples or lists such as (pid, image_id, image_path, caption), as RDE and IRRA list them.
        index: [N], a permutation of 0 ... N - 1.
        caption: where the caption is in a sample.
    Returns:
        A new list of N new samples, tuples or lists as they came. Pair i is noisy where index[i] != i.
    Raises:
        TypeError, ValueError: an index that is no permutation of the samples, or samples without such an entry.
    Example:
        >>> pairs = [(0, 0, "a.jpg", "a woman in red"), (1, 1, "b.jpg", "a man with a bag")]
        >>> apply_noise_index(pairs, torch.tensor([1, 0]))
        [(0, 0, 'a.jpg', 'a man with a bag'), (1, 1, 'b.jpg', 'a woman in red')]

    Reference: 2024-CVPR-RDE/datasets/bases.py, inject_noisy_correspondence.
    """
    order, caption = _checked("index", index, len(samples)).tolist(), check_integer("caption", caption)
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or not -len(sample) <= caption < len(sample):
            raise TypeError(
                f"samples must be tuples or lists with a caption at {caption}, got {describe(sample)}; pass caption= "
                "and samples such as (pid, image_id, image_path, caption)"
            )
    return [_with(samples[i], caption, samples[other][caption]) for i, other in enumerate(order)]


def _with(sample: Any, place: int, value: Any) -> Any:
    entries = list(sample)
    entries[place] = value
    if isinstance(sample, list):
        return entries
    make = getattr(type(sample), "_make", tuple)  # of a named tuple
    return make(entries)


def _checked(name: str, index: Tensor, length: int | None = None) -> Tensor:
    """int64 on the CPU."""
    index = integer_ids(name, index, "N").to("cpu", torch.int64)
    if index.ndim != 1 or (length is not None and len(index) != length):
        size = "N" if length is None else length
        raise ValueError(
            f"{name} must have shape [{size}], one entry for each training pair, got {describe(index)}; take the file "
            "of this data set"
        )
    found = index.sort().values
    wrong = (found != torch.arange(len(index))).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name} must be a permutation of 0 ... {len(index) - 1}, got {int(found[wrong[0, 0]])} where "
            f"{int(wrong[0, 0])} comes next; make one with make_noise_index"
        )
    return index


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError('noise-index files need NumPy; pip install "fmfa-losses[noise]"') from error
    return numpy
