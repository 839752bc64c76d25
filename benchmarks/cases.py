"""What is measured: shapes, random inputs, and the operations and bytes that no implementation can do without."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmfa_losses import IDHead, IRRHead

# The sizes that an operation has; the rest of a Case does not concern it.
SIZES = {
    "efa": "B L N D",
    "hard_similarity": "B L N D",  # patches against joint embeddings, pool="lse"
    "maxsim": "B L N D",  # text tokens against patches, pool="sum"
    "sparse_aggregate": "B L N D",
    "asdm": "B D",
    "irr": "B L N D V",
    "id": "B D V",
    "mask_tokens": "B L",
}


@dataclass(frozen=True)
class Case:
    """One operation at one shape: B pairs, L text tokens, N patches, D wide, V classes (words of IRR, people of ID).

    MaxSim may compare its B texts with another number of images, as retrieval compares queries with documents.
    """

    op: str
    B: int
    L: int = 77
    N: int = 192
    D: int = 512
    V: int = 49408
    mean_length: int | None = None  # of the captions, the rest of L is masked out; None: no mask
    images: int | None = None  # of MaxSim; None: B
    gradients: bool = True  # False: the forward alone, which keeps nothing for a backward

    @property
    def name(self) -> str:
        parts = [self.op, " ".join(f"{size} {getattr(self, size)}" for size in SIZES[self.op].split())]
        parts += [f"{self.images} images"] if self.images else []
        parts += [f"captions of {self.mean_length}"] if self.mean_length else []
        return ", ".join(parts + ["forward alone"] * (not self.gradients))

    def as_dict(self) -> dict[str, Any]:
        """Without what does not concern the operation, and without defaults of the last three."""
        sizes = {key: value for key, value in asdict(self).items() if key in ("op", *SIZES[self.op].split())}
        special = {key: getattr(self, key) for key in ("mean_length", "images") if getattr(self, key)}
        return sizes | special | ({} if self.gradients else {"gradients": False})

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Case":
        """The case of a measurement, which has `as_dict` among its fields."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})


RETRIEVAL = Case("maxsim", 32, L=32, N=300, D=128, images=1000)  # the shape at which other packages of MaxSim show it

# Of the logarithm of a caption's length. CUHK-PEDES: 23.5 words on average, 96 at most among 80440 captions, and the
# largest of 80440 normal draws lies 4.3 deviations above their mean.
LOG_SPREAD = 0.35


def lengths(case: Case, seed: int = 0) -> Tensor:
    """Kept text tokens of every caption [B]: all L, or log-normal around mean_length, as captions are."""
    if case.mean_length is None:
        return torch.full((case.B,), case.L)
    draw = torch.randn(case.B, generator=torch.Generator().manual_seed(seed))
    return (case.mean_length * (LOG_SPREAD * draw - LOG_SPREAD**2 / 2).exp()).round().long().clamp(1, case.L)


def kept(case: Case, device: str) -> Tensor:
    """Text mask [B, L]: padding at the end."""
    return (torch.arange(case.L) < lengths(case)[:, None]).to(device)


def masked_words(case: Case, seed: int = 0) -> Tensor:
    """[B, L]: the words that IRR predicts, 5 % of them and the first of every caption; none in the padding."""
    masked = torch.rand(case.B, case.L, generator=torch.Generator().manual_seed(seed)) < 0.05
    masked[:, 1] = True
    return masked & kept(case, "cpu")


def inputs(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of the providers by name. Random; every second id repeats.

    Floating-point tensors collect gradients, unless the case is a forward alone.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def features(*shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=dtype, device=device, generator=generator)
        return values.requires_grad_(case.gradients)

    B, L, N, D = case.B, case.L, case.N, case.D
    if case.op == "mask_tokens":
        ids = torch.randint(1, 49405, (B, L), device=device, generator=generator)
        return {"token_ids": ids}
    if case.op == "asdm":
        pids = torch.randint(max(1, B // 2), (B,), device=device, generator=generator)
        return {"image_features": features(B, D), "text_features": features(B, D), "pids": pids}
    if case.op == "id":
        pids = torch.randint(case.V, (B,), device=device, generator=generator)
        torch.manual_seed(seed)  # the initial weights
        head = IDHead(D, case.V).to(device)
        return {"head": head, "image_features": features(B, D), "text_features": features(B, D), "pids": pids}
    if case.op == "irr":
        torch.manual_seed(seed)  # the initial weights
        head = IRRHead(D, case.V).to(device)
        words = torch.randint(1, case.V, (B, L), device=device, generator=generator)
        masked = masked_words(case, seed).to(device)
        tokens = {"image_tokens": features(B, N, D), "text_tokens": features(B, L, D)}
        keep = {} if case.mean_length is None else {"text_mask": kept(case, device)}
        return {"head": head, **tokens, "labels": torch.where(masked, words, 0), **keep}
    tokens = {"image_tokens": features(case.images or B, N, D), "text_tokens": features(B, L, D)}
    if case.mean_length is not None:
        tokens["text_mask"] = kept(case, device)
    if case.op == "hard_similarity":
        # The joint embeddings stand in for themselves: what is measured does not depend on where they come from.
        tokens["joint"] = tokens.pop("text_tokens")
    return tokens


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """What collects a gradient: floating-point inputs and the parameters of a head."""
    found: list[Tensor] = []
    for value in arguments.values():
        found += value.parameters() if isinstance(value, torch.nn.Module) else [value]
    return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.requires_grad]


class Work(NamedTuple):
    """Floating-point operations of the products, and bytes with every input read and every output written once."""

    flops: float
    bytes: float


def head_work(case: Case, itemsize: int) -> tuple[Work, Work]:
    """The same of a head: products with weights, and the attention of IRR. A backward is two products for each one.

    The end of IRR's last block and its vocabulary are needed at the R masked words alone.
    """
    B, N, D, V = case.B, case.N, case.D, case.V
    if case.op == "id":
        products, weights, tokens = 2 * 2 * B * D * V, D * V, 2 * B * D
    else:
        captions, depth = lengths(case), 4  # that of IRRHead
        T, squares = int(captions.sum()), int(captions.square().sum())
        masked = masked_words(case).sum(dim=1)
        R, met = int(masked.sum()), int((masked * captions).sum())
        cross = 4 * T * D * D + 4 * B * N * D * D + 4 * T * N * D
        blocks = (depth - 1) * (24 * T * D * D + 4 * squares * D)
        last = 4 * T * D * D + 20 * R * D * D + 4 * met * D
        products = cross + blocks + last + 2 * R * D * D + 2 * R * D * V
        weights, tokens = (4 + 12 * depth + 1) * D * D + D * V, (B * N + T) * D
    passes = (weights + tokens) * itemsize
    return Work(products, passes), Work(2 * products, 2 * passes)


def work(case: Case, itemsize: int) -> dict[str, Work] | None:
    """The least work of a forward and of a backward pass; None where nothing is multiplied (token masking).

    T is the number of kept text tokens. The backward of the hard similarity touches winners alone. Nothing quadratic
    is kept for the backward but the winners, so aggregation and A-SDM compute their similarities a second time.
    """
    B, N, D, T, images = case.B, case.N, case.D, int(lengths(case).sum()), case.images or case.B
    tokens = (images * N + T) * D * itemsize
    aggregate = Work(4 * T * N * D, tokens), Work(10 * T * N * D, 2 * tokens)
    text_to_joint = Work(2 * T * T * D, 0), Work(4 * B * T * D, 0)
    image_to_joint = Work(2 * B * N * T * D, tokens), Work(4 * B * B * N * D, 2 * tokens)
    if case.op == "sparse_aggregate":
        passes = aggregate
    elif case.op == "hard_similarity":
        passes = image_to_joint
    elif case.op == "maxsim":
        passes = Work(2 * T * images * N * D, tokens), Work(4 * images * T * D, 2 * tokens)
    elif case.op == "efa":
        parts = (aggregate, text_to_joint, image_to_joint)
        forward, backward = (sum(part[i].flops for part in parts) for i in (0, 1))
        passes = Work(forward, tokens), Work(backward, 2 * tokens)
    elif case.op == "asdm":
        features = 2 * B * D * itemsize
        passes = Work(2 * B * B * D, features), Work(6 * B * B * D, 2 * features)
    elif case.op in ("irr", "id"):
        passes = head_work(case, itemsize)
    else:
        return None
    forward, backward = passes
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}
