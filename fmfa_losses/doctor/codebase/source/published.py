"""What published modules define, as their callers see it: names, parameters with defaults, and how many results.

Nothing is imported here but the standard library: the process that parses foreign files reads this file too.
"""

from typing import NamedTuple

__all__ = ["BODIES", "MODULES", "PUBLISHED", "USES", "Published"]


class Published(NamedTuple):
    """A published function: parameter names in order, the text of their defaults, and its number of results."""

    parameters: tuple[str, ...]
    defaults: dict[str, str]
    results: int = 1

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in self.parameters if name not in self.defaults)


def _published(signature: str, results: int = 1) -> Published:
    pairs = [part.strip().partition("=") for part in signature.split(",")]
    return Published(tuple(p[0] for p in pairs), {p[0]: p[2] for p in pairs if p[1]}, results)


_SDM = "image_fetures, text_fetures, pid, logit_scale"
_SOFT = "image_id=None, factor=0.3, epsilon=1e-8"
PUBLISHED = {
    "compute_sdm": _published(f"{_SDM}, {_SOFT}, use_weight=False"),
    "compute_a_sdm": _published(f"{_SDM}, alpha_i2t, alpha_t2i, {_SOFT}"),
    "compute_itc": _published("image_features, text_features, logit_scale"),
    "compute_cmpm": _published("image_embeddings, text_embeddings, labels, epsilon=1e-8"),
    "compute_id": _published("image_logits, text_logits, labels"),
    "compute_mlm": _published("scores, labels"),
    "compute_mcm_or_mlm": _published("scores, labels"),
    "compute_efa": _published("text_feat, image_feat, multimodal_feat, margin_t2e, margin_i2e"),
    "compute_minmax_info_loss": _published("A, B, C, margin=0.1"),
    "compute_TAL_per": _published("scores, pid, tau, margin"),
    "compute_TRL_per": _published("scores, pid, margin=0.2, tau=0.02"),
    "compute_sdm_per": _published("scores, pid, logit_scale, epsilon=1e-8"),
    "compute_InfoNCE_per": _published("scores, logit_scale"),
    "compute_per_loss": _published(
        "image_features, text_features, pid, tau=0.02, margin=0.2, loss_type='TAL', logit_scale=50", 2
    ),
    "compute_rbs": _published(
        "i_feats, t_feats, i_tse_f, t_tse_f, pid, label_hat=None, tau=0.02, margin=0.1, loss_type='TAL', "
        "logit_scale=50",
        2,
    ),
    "rank": _published("similarity, q_pids, g_pids, max_rank=10, get_mAP=True", 4),
}

_IRRA = {"compute_cmpm", "compute_id", "compute_itc", "compute_mlm", "compute_sdm", "rank"}
# The modules of fmfa_losses.compat, the most general first; `compute_sdm` takes `use_weight` in fmfa alone.
MODULES = {
    "irra": _IRRA | {"compute_mcm_or_mlm"},
    "fmfa": _IRRA | {"compute_minmax_info_loss", "compute_sdm(use_weight)"},
    "fmfa_2025_04": _IRRA | {"compute_a_sdm", "compute_efa"},
    "rde": {
        "compute_InfoNCE_per",
        "compute_TAL_per",
        "compute_TRL_per",
        "compute_per_loss",
        "compute_rbs",
        "compute_sdm_per",
    },
}

# `digest` of the published bodies that `equations.py` has no equation for; of `compute_sdm` FMFA's, with `use_weight`.
BODIES = {
    "rank": {"2303e1453fd553d6"},
    "compute_InfoNCE_per": {"9631d9d937c1c336"},
    "compute_TAL_per": {"c83179c96d3d081e"},
    "compute_TRL_per": {"2f74aacd2f5ff055"},
    "compute_a_sdm": {"ce042f358713b945"},
    "compute_efa": {"313c33093c682e8b"},
    "compute_infonce_loss_cosine": {"0ff9213325483379", "7dc0fba6195f75da"},
    "compute_minmax_info_loss": {"8129d18168189cef"},
    "compute_per_loss": {"9128688b398c2c93"},
    "compute_rbs": {"2b8b0964f44b5a5a"},
    "compute_sdm": {"518f3969cddb8707"},
    "compute_sdm_per": {"df52062391af42d8"},
}
_PER = ("compute_TAL_per", "compute_TRL_per", "compute_InfoNCE_per", "compute_sdm_per")
# What a published function calls, in the same file.
USES = {
    "compute_per_loss": _PER,
    "compute_rbs": ("compute_per_loss", *_PER),
    "compute_minmax_info_loss": ("compute_infonce_loss_cosine",),
    "compute_efa": ("compute_infonce_loss_cosine",),
}
