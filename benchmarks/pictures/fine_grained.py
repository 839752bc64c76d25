"""docs/fine_grained.md: the two similarities of EFA."""

from pathlib import Path

from fmfa_losses.functional import hard_similarity, sparse_aggregate
from fmfa_losses.plot.figure import LARGE, NORMAL, SMALL, VERMILION, figure_class

from ._people import people, save

__all__ = ["draw", "passing"]

PAIRS = 16


def draw(folder: Path) -> None:
    """S of 16 texts, and of 16 images, with the joint embeddings of the 16 pairs."""
    seen = people()
    image, text = seen.image_tokens[: 2 * PAIRS : 2], seen.text_tokens[: 4 * PAIRS : 4]
    keep = seen.token_ids[: 4 * PAIRS : 4] != 0
    joint = sparse_aggregate(image, text)
    similarities = {
        "texts": hard_similarity(text, joint, x_mask=keep, e_mask=keep),
        "images": hard_similarity(image, joint, e_mask=keep),
    }
    figure = figure_class()(figsize=(7.4, 3.7), layout="constrained")
    for axes, (name, similarity) in zip(figure.subplots(1, 2), similarities.items(), strict=True):
        best = similarity.argmax(dim=1).tolist()
        first = sum(j == i for i, j in enumerate(best))
        heat = axes.imshow(similarity.numpy(), cmap="viridis")
        axes.plot(
            similarity.argmax(dim=1).tolist(), range(PAIRS), "o", color=VERMILION, markersize=4, markeredgecolor="white"
        )
        axes.set_title(f"{name}: own pair first in {first} of {PAIRS}", fontsize=LARGE)
        axes.set_xlabel("joint embedding j", fontsize=NORMAL)
        axes.set_ylabel(f"{name[:-1]} i", fontsize=NORMAL)
        axes.set_xticks(range(0, PAIRS, 3))
        axes.set_yticks(range(0, PAIRS, 3))
        axes.tick_params(labelsize=SMALL)
        figure.colorbar(heat, ax=axes, shrink=0.8).ax.tick_params(labelsize=SMALL)
    save(figure, folder / "fine_grained_similarities.png")


def passing(sparsity: float) -> float:
    """The part of the patches that pass the threshold, over the words of one caption of each of 40 people."""
    seen = people()
    similarity = seen.text_tokens[::4] @ seen.image_tokens[::2].mT
    low, high = similarity.amin(dim=2, keepdim=True), similarity.amax(dim=2, keepdim=True)
    normalised = (similarity - low) / (high - low)
    return (normalised >= sparsity)[seen.token_ids[::4] != 0].float().mean().item()
