"""Evaluates a model on its loaders, once per epoch."""

import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..ops.checks import check_flag, describe
from .average_precision import AveragePrecision, check_average_precision
from .fused import BRANCHES, FusedItems, FusedMetrics, fused_direction
from .metrics import Items, RankingMetrics, Report, RetrievalMetrics, check_ranks, feature_metrics, metrics_table

__all__ = ["Evaluator"]

Encode: TypeAlias = Callable[[Any, Any], Tensor]
# Direction -> metrics of each branch, the one that ranks last.
Measured: TypeAlias = dict[str, list[RankingMetrics]]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Evaluator:
    """Runs a model over an image and a text loader and ranks: the shape that TIPR training loops expect.

    Args:
        imageloader: batches of (pids [b], images).
        textloader: batches of (pids [b], captions).
        encode_image: (model, images) -> features [b, D]; default: `model.encode_image(images)`.
        encode_text: (model, captions) -> features [b, D]; default: `model.encode_text(captions)`.
        fused: rank by the mean of two cosines, of these features and of those of the next two, as RDE does (BGE+TSE).
        encode_image_tse: (model, images) -> features [b, E]; default: `model.encode_image_tse(images)`.
        encode_text_tse: (model, captions) -> features [b, E]; default: `model.encode_text_tse(captions)`.
        ranks: the k of CMC@k.
        average_precision: "step", or "trapezoidal" as SSAN, LGUR and PLIP report it.
        block_size: queries compared at a time.
        progress: a tqdm bar for each loader, where tqdm is installed.
    Example:
        >>> class Model(nn.Module):
        ...     encode_image = encode_text = staticmethod(nn.functional.normalize)
        >>> batches = [(torch.tensor([1, 2]), torch.eye(2)), (torch.tensor([3]), torch.tensor([[1.0, 1.0]]))]
        >>> Evaluator(batches, batches, progress=False).eval(Model())
        100.0
    """

    def __init__(
        self,
        imageloader: Iterable[Any],
        textloader: Iterable[Any],
        *,
        encode_image: Encode | None = None,
        encode_text: Encode | None = None,
        fused: bool = False,
        encode_image_tse: Encode | None = None,
        encode_text_tse: Encode | None = None,
        ranks: Sequence[int] = (1, 5, 10),
        average_precision: AveragePrecision = "step",
        block_size: int | None = None,
        progress: bool = True,
    ) -> None:
        self.imageloader = imageloader
        self.textloader = textloader
        self.encode_image = encode_image
        self.encode_text = encode_text
        self.fused = check_flag("fused", fused)
        self.encode_image_tse = encode_image_tse
        self.encode_text_tse = encode_text_tse
        if not self.fused and (encode_image_tse is not None or encode_text_tse is not None):
            raise ValueError(
                "fused must be True where encode_image_tse or encode_text_tse is given, got False; pass fused=True, or "
                "leave both out"
            )
        self.ranks: tuple[int, ...] = check_ranks(ranks)
        self.average_precision = check_average_precision(average_precision)
        self.block_size = block_size
        self.progress = progress
        self.logger: logging.Logger = logging.getLogger("fmfa_losses.retrieval")

    def eval(self, model: Any, i2t_metric: bool = False) -> float:
        """Rank-1 of text-to-image retrieval in percent, which picks the best epoch; logs the table.

        The table has the texts' searches, and with `i2t_metric` the images' too, as that of IRRA's evaluator. With
        `fused` the result is that of the mean, and there is a table for each branch.
        """
        check_flag("i2t_metric", i2t_metric)
        measured = self._measure(model, sorted({1, *self.ranks}), both=i2t_metric)
        tables = [
            metrics_table(dict(zip(measured, each, strict=True))) for each in zip(*measured.values(), strict=True)
        ]
        if self.fused:
            tables = [f"{name}\n{table}" for name, table in zip(BRANCHES, tables, strict=True)]
        self.logger.info("\n%s", "\n".join(tables))
        return measured["t2i"][-1].cmc[1]

    def metrics(self, model: Any, *, ranks: Sequence[int] | None = None) -> RetrievalMetrics:
        """Everything, both directions. The model's train and eval modes are as before afterwards."""
        measured = self._measure(model, ranks or self.ranks)
        return RetrievalMetrics(t2i=measured["t2i"][-1], i2t=measured["i2t"][-1])

    def fused_metrics(self, model: Any, *, ranks: Sequence[int] | None = None) -> FusedMetrics:
        """Metrics of both branches and of their mean, from one pass over the loaders; needs `fused`."""
        if not self.fused:
            raise ValueError("fused must be True for fused_metrics, got False; build Evaluator(..., fused=True)")
        measured = self._measure(model, ranks or self.ranks)
        return FusedMetrics(*(RetrievalMetrics(*ways) for ways in zip(measured["t2i"], measured["i2t"], strict=True)))

    def _measure(self, model: Any, ranks: Sequence[int], both: bool = True) -> Measured:
        report = Report.of(ranks, self.average_precision, self.block_size)
        texts = self._items(model, "text", self.textloader)
        images = self._items(model, "image", self.imageloader)
        measured = {"t2i": _direction(texts, images, report)}
        if both:
            measured["i2t"] = _direction(images, texts, report)
        return measured

    def _items(self, model: Any, kind: str, loader: Iterable[Any]) -> Items | FusedItems:
        features, pids = self._features(model, f"encode_{kind}", loader)
        return FusedItems(kind, features[0], features[1], pids) if self.fused else Items(kind, features[0], pids)

    def _encoders(self, model: Any, name: str) -> dict[str, Encode]:
        """By name: the function that was passed, or the method of the model."""
        encoders: dict[str, Encode] = {}
        for each in (name, f"{name}_tse") if self.fused else (name,):
            encode = getattr(self, each)
            if encode is None and not hasattr(model, each):
                raise TypeError(
                    f"model must have {each}(batch), got {type(model).__name__}; "
                    f"pass Evaluator(..., {each}=lambda model, batch: ...)"
                )
            encoders[each] = encode or _method(each)
        return encoders

    @torch.no_grad()
    def _features(self, model: Any, name: str, loader: Iterable[Any]) -> tuple[list[Tensor], Tensor]:
        """Features by each encoder, and pids, of one pass over the loader."""
        encoders = self._encoders(model, name)
        modes: dict[nn.Module, bool] = {}
        parameter = None
        if isinstance(model, nn.Module):
            modes = {module: module.training for module in model.modules()}
            parameter = next(model.parameters(), None)
            model.eval()
        features: dict[str, list[Tensor]] = {each: [] for each in encoders}
        pids = []
        try:
            for item in _progress(loader, name, self.progress):
                batch_pids, batch = _checked_batch(item, name)
                if parameter is not None and hasattr(batch, "to"):
                    batch = batch.to(parameter.device)
                for each, encode in encoders.items():
                    encoded = encode(model, batch)
                    _check_encoded(encoded, batch_pids, each)
                    features[each].append(encoded)
                pids.append(batch_pids)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not pids:
            raise ValueError(f"the loader for {name} must give at least one batch, got none; check its data set")
        return [torch.cat(blocks) for blocks in features.values()], torch.cat(pids)


def _method(name: str) -> Encode:
    def encode(model: Any, batch: Any) -> Tensor:
        encoded: Tensor = getattr(model, name)(batch)
        return encoded

    return encode


def _direction(queries: Items | FusedItems, gallery: Items | FusedItems, report: Report) -> list[RankingMetrics]:
    """Of each branch."""
    if isinstance(queries, FusedItems):
        assert isinstance(gallery, FusedItems)
        return fused_direction(queries, gallery, report)
    assert isinstance(gallery, Items)
    return [feature_metrics(queries, gallery, report)]


def _checked_batch(item: Any, name: str) -> tuple[Tensor, Any]:
    """Pids [b] and the images or captions of one batch."""
    loader, what = ("image_loader", "images") if name == "encode_image" else ("text_loader", "captions")
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"{loader} must give batches (pids, {what}), got {describe(item)}; wrap it in a generator that yields them"
        )
    given, batch = item
    try:
        pids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # of captions that are strings, pictures that are no arrays
        pids = None
    if pids is None or pids.ndim == 0 or pids.numel() != len(pids) or pids.dtype not in INTEGERS:
        raise TypeError(
            f"{loader} must give batches (pids [b], {what}) with integer pids, got {describe(given)} first; put the "
            f"pids before the {what}"
        )
    return pids.reshape(-1), batch


def _check_encoded(encoded: object, pids: Tensor, name: str) -> None:
    if not isinstance(encoded, Tensor) or encoded.ndim != 2 or len(encoded) != len(pids):
        raise ValueError(
            f"{name} must return features [b, D], one row for each of the {len(pids)} pids of the batch, got "
            f"{describe(encoded)}; pool them, or pass Evaluator(..., {name}=lambda model, batch: ...)"
        )


def _progress(loader: Iterable[Any], name: str, show: bool) -> Iterable[Any]:
    if not show:
        return loader
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc=name.replace("_", " "), leave=False)
    return bar
