"""The findings and statistics of `check_batch`: one method per kind of mistake. What is not certain is not reported."""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fmfa import FMFALoss
from ..losses.asdm import ASDMLoss
from ..losses.cmpm import CMPMLoss
from ..losses.efa import EFALoss
from ..losses.itc import ITCLoss
from ..losses.sdm import SDMLoss
from ..losses.sigmoid import SigmoidLoss
from ..losses.tal import TALLoss, TRLLoss
from ..losses.triplet import TripletLoss

FEATURES = {"image_features": "B D", "text_features": "B D"}
TOKENS = {"image_tokens": "B N D", "text_tokens": "B L D", "masked_text_tokens": "B L D"}
MASKS_AND_IDS = {"image_mask": "B N", "text_mask": "B L", "token_ids": "B L", "masked_labels": "B L"}
LOG_SCALE, LARGEST_SCALE = 5.0, 1000.0  # 1 / tau lies between: 10 (SigLIP) to 100 (CLIP); log 100 is 4.6
NARROWEST_GRID = 4  # times as high as wide; 24 x 8 patches are 3
CLIP_LENGTH = 77
LABELS_IGNORED = (0, -100)
ENOUGH_LABELS = 8  # a chosen word stays as it is with probability 0.1: not all of so many
ENOUGH_PIDS = 8
SCALED = (ASDMLoss, SDMLoss, ITCLoss, SigmoidLoss)  # by logit_scale where one is given, else by temperature
ALWAYS_TEMPERED = (TALLoss, TRLLoss)
# Loss, option, its value that does not use pids, the one that does, and what the latter does.
USES_OF_PIDS = (
    (EFALoss, "negatives", "all", "different_identity", "leaves them out"),
    (TripletLoss, "negatives", "all", "different_identity", "leaves them out"),
    (SigmoidLoss, "positives", "paired", "identity", "makes them positives"),
)


class BatchFindings:
    """One method a kind of mistake; each yields findings."""

    def __init__(
        self, given: dict[str, Tensor], loss: nn.Module | None, scale: float | None, *, tensor_scale: bool = False
    ) -> None:
        self.given, self.loss, self.scale, self.tensor_scale = given, loss, scale, tensor_scale
        self.losses = [("", loss)]
        if isinstance(loss, FMFALoss):
            self.losses = [("FMFALoss's ", getattr(loss, name)) for name in ("asdm", "efa") if loss.weights[name]]

    def findings(self) -> Iterator[str]:
        yield from self._of_scale()
        yield from self._of_temperature()
        not_finite = list(self._not_finite())
        yield from not_finite
        if not_finite:  # nothing else can be compared
            return
        layout = list(self._of_layout())
        yield from layout
        if layout:  # what follows needs the layout that the losses expect
            return
        yield from self._of_features()
        yield from self._of_tokens()
        yield from self._of_text_mask()
        yield from self._of_pids()
        yield from self._of_masked_words()

    def statistics(self) -> Iterator[tuple[str, str]]:
        if self.loss is not None:
            yield "loss", type(self.loss).__name__
        for name, tensor in self.given.items():
            text = str(list(tensor.shape))
            if name in FEATURES:
                norms = tensor.norm(dim=1)
                text += f", norms {norms.min():.3g} to {norms.max():.3g}"
            elif name.endswith("mask"):
                text += f", keeps {tensor.double().mean():.0%} of the tokens".replace("%", " %")
            elif name == "pids":
                text += f", {_identities(tensor)} identities, {_positives(tensor):.2f} positives a row"
            elif name == "masked_labels":
                text += f", {int(_labelled(tensor).sum())} tokens with a label"
            yield name, text
        if self.scale is not None:
            yield "logit_scale", f"{self.scale:.3g}"

    def _of_scale(self) -> Iterator[str]:
        scale = self.scale
        if scale is None or LOG_SCALE <= scale <= LARGEST_SCALE:
            return
        if not scale > 0:
            yield f"logit_scale {scale:.3g} must be > 0: it is 1 / tau, 50 at tau = 0.02"
        elif scale > LARGEST_SCALE:
            yield f"logit_scale {scale:.3g} is far above 1 / tau of any model: was exp() taken twice?"
        elif isinstance(self.loss, SigmoidLoss):  # learns its scale, from any start
            return
        elif scale < 1:
            yield f"logit_scale {scale:.3g}: if this is the temperature tau, pass 1 / tau, {1 / scale:.3g}"
        elif self.tensor_scale:
            yield (
                f"logit_scale {scale:.3g}: if this is CLIP's stored parameter, log(1 / tau), pass logit_scale.exp(), "
                f"{torch.tensor(scale).exp():.3g}"
            )

    def _of_temperature(self) -> Iterator[str]:
        for owner, loss in self.losses:
            if isinstance(loss, ALWAYS_TEMPERED) or (isinstance(loss, SCALED) and self.scale is None):
                tau = loss.temperature
                if tau > 1:
                    yield (
                        f"{owner}{type(loss).__name__}(temperature={tau:.3g}): if this is the scale 1 / tau, pass "
                        f"temperature={1 / tau:.3g}"
                    )

    def _not_finite(self) -> Iterator[str]:
        for name, tensor in self.given.items():
            count = int((~tensor.isfinite()).sum())
            if count:
                yield f"{name} holds {count} of {tensor.numel()} values that are NaN or infinite"

    def _of_layout(self) -> Iterator[str]:
        """Dimension 0 of every tensor is the batch; its size is that of features or pids where they are given."""
        given = self.given
        sizes = {name: len(given[name]) for name in ("pids", *FEATURES) if name in given}
        if len(set(sizes.values())) > 1:
            yield f"the batch must be the same in all: {', '.join(f'{name} has {n}' for name, n in sizes.items())}"
            return
        wide = {name: tensor for name, tensor in given.items() if name in TOKENS or name in MASKS_AND_IDS}
        sizes = sizes or {name: len(tensor) for name, tensor in wide.items() if name in MASKS_AND_IDS}
        if len(set(sizes.values())) == 1:
            B = next(iter(sizes.values()))
        else:
            first, second = ({tensor.shape[dim] for tensor in wide.values()} for dim in (0, 1))
            if len(wide) < 2 or len(first) == 1 or len(second) > 1:
                return
            B = second.pop()  # all agree in the second dimension alone
        for name, tensor in wide.items():
            shape = list(tensor.shape)
            if shape[1] == B and (len(tensor) != B or self._holds_second(name)):
                yield f"{name} {shape} has the batch of {B} second: pass {name}.transpose(0, 1)"
            elif len(tensor) != B:
                yield f"{name} {shape} does not fit a batch of {B}"

    def _holds_second(self, name: str) -> bool:
        """Whether tokens [B, B, D] contain the features when dimension 1 is taken for the batch, and only then."""
        tensor, feature = self.given[name], self.given.get(f"{name.split('_')[-2]}_features")
        if name not in TOKENS or feature is None:
            return False
        return not _holds(tensor, feature) and _holds(tensor.transpose(0, 1), feature)

    def _of_features(self) -> Iterator[str]:
        given = self.given
        for name in FEATURES:
            if name not in given:
                continue
            norms = given[name].norm(dim=1)
            if not bool(norms.all()):
                yield f"{name} has {int((norms == 0).sum())} rows of zeros: their cosine to everything is 0"
            elif len(norms) > 1 and bool(
                (F.normalize(given[name], dim=1) @ F.normalize(given[name][0], dim=0)).min() > 1 - 1e-6
            ):
                yield f"{name} are one vector for the whole batch, up to its length"
            if isinstance(self.loss, CMPMLoss) and bool(((norms - 1).abs() < 1e-2).all()):
                yield f"{name} are normalised: CMPM takes their length for 1 / tau; pass them as the model gives them"
        if len(FEATURES.keys() & given.keys()) == 2 and given["image_features"].shape == given["text_features"].shape:
            yield from self._of_order()

    def _of_order(self) -> Iterator[str]:
        """Pairs that find each other, both ways, and never their own partner."""
        image, text = (F.normalize(self.given[name], dim=1) for name in FEATURES)
        B = len(image)
        scores, everyone = text @ image.T, torch.arange(B)
        nearest = scores.argmax(1)
        mutual = (scores.argmax(0)[nearest] == everyone) & (nearest != everyone)
        if "pids" in self.given:
            mutual &= self.given["pids"][nearest] != self.given["pids"]
        if B >= ENOUGH_PIDS and int(mutual.sum()) >= 0.9 * B:
            yield (
                f"{int(mutual.sum())} of {B} texts and images are each other's nearest and stand in different rows: "
                "row i of text_features must belong to row i of image_features"
            )

    def _of_tokens(self) -> Iterator[str]:
        given = self.given
        image, text = given.get("image_tokens"), given.get("text_tokens")
        swapped = next(self._swapped(image, text), None)
        if swapped is not None:
            yield swapped
            return
        if image is None or image.shape[1] == 1:
            return
        N, mask = image.shape[1], given.get("image_mask")
        if mask is not None and not mask[:, 0].any():  # [CLS] is there and masked
            return
        if "image_features" in given and _holds(image[:, :1], given["image_features"]):
            yield "image_tokens[:, 0] is image_features: [CLS] is among the patches; pass image_tokens[:, 1:]"
        elif mask is None and N >= 16 and _is_grid(N - 1) and not _is_grid(N):
            yield (
                f"image_tokens has {N} = {N - 1} + 1 tokens, and a grid of patches has {N - 1} rather than {N}: [CLS] "
                "may be among them; pass image_tokens[:, 1:]"
            )

    def _swapped(self, image: Tensor | None, text: Tensor | None) -> Iterator[str]:
        given = self.given
        for name, tokens, other in (
            ("token_ids", image, text),
            ("text_mask", image, text),
            ("masked_labels", image, text),
            ("image_mask", text, image),
        ):
            if tokens is None or other is None or name not in given:
                continue
            length = given[name].shape[1]
            if tokens.shape[1] == length != other.shape[1]:
                what, held = ("image_tokens", "text_tokens") if tokens is image else ("text_tokens", "image_tokens")
                yield f"{name} has the {length} columns of {what}, not of {held}: swapped; image comes first"
        for what, tokens, feature in (("image", image, "text_features"), ("text", text, "image_features")):
            own = given.get(f"{what}_features")
            if tokens is None or feature not in given or (own is not None and _holds(tokens, own)):
                continue
            if _holds(tokens, given[feature]):
                yield f"{feature} are among {what}_tokens: image and text are swapped; image comes first"
        if image is not None and text is not None and image.shape[1] == CLIP_LENGTH < text.shape[1]:
            yield (
                f"image_tokens has {CLIP_LENGTH} tokens, the length of CLIP's captions, and text_tokens "
                f"{text.shape[1]}: swapped; image comes first"
            )

    def _of_text_mask(self) -> Iterator[str]:
        mask, ids = self.given.get("text_mask"), self.given.get("token_ids")
        labels = self.given.get("masked_labels")
        if mask is None:
            return
        if not mask.any():
            yield "text_mask keeps no token at all"
            return
        if labels is not None and labels.shape == mask.shape:
            labelled = _labelled(labels)
            dropped = int((labelled & ~mask).sum())
            if 2 * dropped > int(labelled.sum()):
                yield f"text_mask drops {dropped} of {int(labelled.sum())} tokens with a label: True means keep"
                return
        if ids is None or ids.shape != mask.shape:
            yield from _inverted(mask)
            return
        padding, content, pad = _padding(ids)
        if not padding.any():
            return
        kept, dropped = int((padding & mask).sum()), int((content & ~mask).sum())
        if 2 * dropped > int(content.sum()):
            yield (
                f"text_mask drops {dropped} of {int(content.sum())} words and keeps {kept} of {int(padding.sum())} "
                "padding tokens: True means keep; pass ~text_mask"
            )
        elif kept:
            yield (
                f"text_mask keeps {kept} of {int(padding.sum())} padding tokens: captions are padded with id {pad}, "
                "which may be that of the end too; keep up to its first one, or take the tokenizer's attention_mask"
            )

    def _of_pids(self) -> Iterator[str]:
        pids, image = self.given.get("pids"), self.given.get("image_features")
        if pids is None:
            return
        B, distinct = len(pids), _identities(pids)
        if B >= ENOUGH_PIDS and bool((pids.diff() == 1).all()):
            yield f"pids are {pids[0]} to {pids[-1]} in order: indices of samples? pass the person of each"
        elif image is not None and B > 2:
            unit = F.normalize(image, dim=1)
            same = (unit @ unit.T > 1 - 1e-6) & ~torch.eye(B, dtype=torch.bool)
            strange = (same & (pids[:, None] != pids)).nonzero().tolist()
            if strange and int(same.sum()) < B * (B - 1) // 2:
                i, j = strange[0]
                yield f"images {i} and {j} are the same, their pids are {pids[i]} and {pids[j]}: indices of samples?"
        if distinct < B:
            yield from self._of_unused_pids(f"{B - distinct} of {B} repeat")

    def _of_unused_pids(self, repeated: str) -> Iterator[str]:
        for owner, loss in self.losses:
            for cls, option, paired, by_identity, remedy in USES_OF_PIDS:
                if isinstance(loss, cls) and getattr(loss, option) == paired:
                    name = cls.__name__
                    right = f'efa={{"{option}": "{by_identity}"}}' if owner else f'{name}({option}="{by_identity}")'
                    yield (
                        f'{owner}{name}({option}="{paired}") does not use pids, {repeated}: pairs of one person are '
                        f"negatives of each other; {right} {remedy}"
                    )

    def _of_masked_words(self) -> Iterator[str]:
        given = self.given
        labels, ids = given.get("masked_labels"), given.get("token_ids")
        masked, text = given.get("masked_text_tokens"), given.get("text_tokens")
        if labels is None:
            return
        labelled = _labelled(labels)
        count = int(labelled.sum())
        if count == 0:
            yield "masked_labels has no label: the IRR term is 0; mask_tokens gives the labels"
            return
        words = given.get("text_mask")
        total = int(words.sum()) if words is not None and words.shape == labels.shape else labels.numel()
        if ids is not None and ids.shape == labels.shape and bool(_padding(ids)[0].any()):
            total = min(total, int((~_padding(ids)[0]).sum()))
        if 2 * count > total:
            yield f"masked_labels has a label at {count} of {total} tokens: all ids? mask_tokens chooses 15 %"
        if ids is not None and ids.shape == labels.shape:
            other = int((labelled & (ids != labels)).sum())
            if 10 * other > count:
                yield f"masked_labels differ from token_ids at {other} of {count} tokens: labels hold the original ids"
        if masked is None or text is None or masked.shape != text.shape or labels.shape != text.shape[:2]:
            return
        distance = (masked - text).norm(dim=-1) / text.norm(dim=-1).clamp(min=1e-30)
        unchanged = int((distance[labelled] < 1e-3).sum())
        if count >= ENOUGH_LABELS and unchanged == count:
            yield (
                f"masked_text_tokens are text_tokens at all {count} tokens with a label, which show the answer: encode "
                "the masked ids, the first result of mask_tokens"
            )


def _labelled(labels: Tensor) -> Tensor:
    return ~torch.isin(labels, torch.tensor(LABELS_IGNORED))


def _identities(pids: Tensor) -> int:
    return len(set(pids.tolist()))


def _positives(pids: Tensor) -> float:
    return float((pids[:, None] == pids).sum(1).double().mean())


def _holds(tokens: Tensor, features: Tensor) -> bool:
    """Whether nine in ten features [B, D] are one of their own tokens [B, T, D], as a pooled [CLS] or end token is."""
    if tokens.shape[-1] != features.shape[-1] or len(tokens) != len(features):
        return False
    cosine = torch.einsum("btd,bd->bt", F.normalize(tokens, dim=-1), F.normalize(features, dim=-1))
    return bool((cosine.amax(1) > 1 - 1e-4).double().mean() > 0.9)


def _is_grid(N: int) -> bool:
    """Whether N patches can be the rows x columns of a picture; a narrow strip is none."""
    columns = next(c for c in range(int(N**0.5), 0, -1) if N % c == 0)
    return N // columns <= NARROWEST_GRID * columns


def _inverted(mask: Tensor) -> Iterator[str]:
    """Without token ids: whether captions begin with dropped tokens and end with kept ones, an inverted mask."""
    rising = bool((mask[:, 1:] >= mask[:, :-1]).all())
    leading = (~mask).long().cumprod(1).sum(1)  # dropped tokens at the start
    if rising and bool((leading > 1).any()):
        yield (
            f"text_mask drops the first tokens of {int((leading > 0).sum())} of {len(mask)} captions and keeps the "
            "last: True means keep; pass ~text_mask, or token_ids where captions are padded in front"
        )


def _padding(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """(certainly padding, certainly words) [B, L] and the id that pads.

    Padding is one id, repeated at the end of captions, or else in front. Its first one there may be the end token.
    """
    for flipped in (False, True):
        row = ids.flip(1) if flipped else ids
        last = row[:, -1:]
        run = (row == last).long().flip(1).cumprod(1).flip(1).bool()  # the trailing run of one id
        repeated = run.sum(1) > 1
        common = Counter(last[repeated, 0].tolist()).most_common(1)
        if not common or (common[0][1] < 2 and len(ids) > 1):
            continue
        pad = common[0][0]
        run &= (last == pad) & repeated[:, None]
        padding = run & F.pad(run[:, :-1], (1, 0))  # without the first of the run
        if flipped:
            run, padding = run.flip(1), padding.flip(1)
        return padding, ~run, pad
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return nothing, ~nothing, 0
