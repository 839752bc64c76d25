"""docs/heads.md: ID and IRR while they learn."""

from pathlib import Path

import torch

from fmfa_losses import IDHead, IRRHead, mask_tokens, plot

from ._people import people, save

__all__ = ["draw"]

STEPS = 40


def draw(folder: Path) -> None:
    """The two heads on frozen encoders: one pair of each of 40 people, every step with other words masked."""
    seen = people()
    image, text, pids = (x[::2] for x in seen.paired(80))
    ids = seen.token_ids[::4]
    patches = torch.cat([image.unsqueeze(1), seen.image_tokens[::2]], dim=1)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        identity = IDHead(image.shape[1], 40)
        words = IRRHead(image.shape[1], seen.tokenizer.vocab_size, depth=1, num_heads=3)
    optimizer = torch.optim.Adam([*identity.parameters(), *words.parameters()], lr=3e-3)
    history = []
    tokenizer = seen.tokenizer
    for _ in range(STEPS):
        masked, labels = mask_tokens(
            ids, mask_id=tokenizer.mask_id, special_ids=tokenizer.special_ids, generator=generator
        )
        with torch.no_grad():
            _, masked_tokens = seen.model.encode_text(masked)
        terms = {
            "ID: which person of 40": identity(image, text, pids).loss,
            "IRR: which word of 148": words(patches, masked_tokens, labels, text_mask=ids != 0).loss,
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()})
    save(plot.loss_curves(history, smoothing=0.8), folder / "heads_training.png")
