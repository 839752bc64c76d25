"""What to write in place of a published call: the same value first, another one with the reason."""

from collections.abc import Callable
from typing import NamedTuple

from .findings import Suggestion
from .source.published import PUBLISHED

__all__ = ["Advice", "advice", "operand"]

SUM = "a scalar, the sum of both directions, each a mean over the batch"
VECTOR = "[B], of every pair the sum of both directions"
Arguments = dict[str, str]


class Advice(NamedTuple):
    """What a published function returns, which module of compat has it, and what to write."""

    returns: str
    module: str
    suggestions: tuple[Suggestion, ...]


def advice(name: str, call: str, arguments: Arguments) -> Advice:
    """For a call of `name`: the text of every argument, defaults too; `call` is what it passes, in brackets."""
    return RULES[name](call, arguments)


def operand(text: str) -> str:
    """Text that may stand beside an operator: in brackets unless it is a name, an attribute or a number."""
    return text if text.replace(".", "").replace("_", "").isalnum() else f"({text})"


def _same(write: str, why: str = "") -> Suggestion:
    return Suggestion(write, True, why)


def _other(write: str, why: str) -> Suggestion:
    return Suggestion(write, False, why)


def _compat(module: str, name: str, call: str, why: str = "") -> Suggestion:
    return _same(f"compat.{module}.{name}{call}", why)


def _eps(arguments: Arguments, first: str = "") -> str:
    options = [first] if first else []
    if arguments["epsilon"] != "1e-8":
        options.append(f"eps={arguments['epsilon']}")
    return ", ".join(options)


def _is_true(text: str) -> bool | None:
    return {"True": True, "False": False}.get(text)


# IRRA and FMFA

GAP = "its gap is one of probabilities and to the pair itself (Eq. 2), {here}"


def _sdm(call: str, a: Arguments) -> Advice:
    features = f"{a['image_fetures']}, {a['text_fetures']}, {a['pid']}"
    scale = f"logit_scale={a['logit_scale']}"
    weighted = _is_true(a["use_weight"])
    if weighted is not False:
        where = "" if weighted else f" Where {a['use_weight']} is false both are SDM: SDMLoss()."
        reason = GAP.format(here="here of cosines and to the identity's first pair; its alpha is 10, here 0.1")
        paper = _other(f"ASDMLoss()({features}, {scale})", f"the paper's A-SDM: {reason}.{where}")
        return Advice(SUM, "fmfa", (_compat("fmfa", "compute_sdm", call), paper))
    if a["image_id"] != "None":
        images = f"image_ids={a['image_id']}"
        rows = _other(
            f"SDMLoss({_eps(a, _factor(a))})({features}, {images}, {scale})",
            "here soft labels are divided by the sums of columns, there by those of rows",
        )
        plain = call.replace(", use_weight=False", "")
        return Advice(SUM, "irra", (_compat("irra", "compute_sdm", plain), rows))
    return Advice(SUM, "irra", (_same(f"SDMLoss({_eps(a)})({features}, {scale})"),))


def _factor(a: Arguments) -> str:
    return "" if a["factor"] == "0.3" else f"image_id_factor={a['factor']}"


def _a_sdm(call: str, a: Arguments) -> Advice:
    features = f"{a['image_fetures']}, {a['text_fetures']}, {a['pid']}"
    reason = GAP.format(here="here of cosines and to the first pair of the identity")
    if a["alpha_i2t"] != a["alpha_t2i"]:
        reason += f"; one alpha serves both directions, there {a['alpha_i2t']} and {a['alpha_t2i']}"
    paper = _other(
        f"ASDMLoss(alpha={a['alpha_t2i']})({features}, logit_scale={a['logit_scale']})", f"the paper's A-SDM: {reason}"
    )
    return Advice(SUM, "fmfa_2025_04", (_compat("fmfa_2025_04", "compute_a_sdm", call), paper))


def _itc(call: str, a: Arguments) -> Advice:
    write = f"ITCLoss()({a['image_features']}, {a['text_features']}, logit_scale={a['logit_scale']})"
    return Advice("a scalar, the mean of both directions", "irra", (_same(write),))


def _cmpm(call: str, a: Arguments) -> Advice:
    features = f"({a['image_embeddings']}, {a['text_embeddings']}, {a['labels']})"
    released = _eps(a, 'normalize="released"')
    reason = "the paper divides a row's labels by their sum, here by their L2 norm, which differs for a repeated person"
    forms = _same(f"CMPMLoss({released}){features}"), _other(f"CMPMLoss({_eps(a)}){features}", reason)
    return Advice(SUM, "irra", forms)


def _id(call: str, a: Arguments) -> Advice:
    head = _same(
        f"self.identity(image_features, text_features, {a['labels']}).loss",
        "with self.identity = IDHead(embed_dim, num_identities) in __init__ in place of the classifier, whose weights "
        "load_irra_state_dict reads",
    )
    return Advice("a scalar, the mean of both cross-entropies", "irra",
                  (_same(f"id_loss({a['image_logits']}, {a['text_logits']}, {a['labels']})"), head))  # fmt: skip


def _mlm(call: str, a: Arguments) -> Advice:
    head = _same(
        "self.irr(image_tokens, masked_text_tokens, masked_labels).loss",
        "with self.irr = IRRHead(embed_dim, vocab_size) in __init__ in place of cross-former and head, whose weights "
        "load_irra_state_dict reads; it projects the masked tokens alone, and gives 0 where none is masked, here NaN",
    )
    same = _compat("irra", "compute_mlm", f"({a['scores']}, {a['labels']})")
    return Advice("a scalar, the mean over tokens whose label is not 0", "irra", (same, head))


RELEASED_EFA = (
    "the paper's EFA (Eq. 5-12): S is not normalised, the pair itself is no term of the sum, the pooling has its "
    "factor{more}; it aggregates itself, so drop the aggregation; text_mask=caption_ids != 0 leaves out padding"
)


def _minmax(call: str, a: Arguments) -> Advice:
    paper = _other(
        f"EFALoss(0.1, 0.1)({a['B']}, {a['A']})",
        RELEASED_EFA.format(more=", the margins are 0.1 and 0.1, here 0.1 and 0.9"),
    )
    return Advice(SUM, "fmfa", (_compat("fmfa", "compute_minmax_info_loss", call), paper))


def _efa(call: str, a: Arguments) -> Advice:
    paper = _other(
        f"EFALoss({a['margin_t2e']}, {a['margin_i2e']})({a['image_feat']}, {a['text_feat']})",
        RELEASED_EFA.format(more=" and temperature 1, here 0.1"),
    )
    return Advice(SUM, "fmfa_2025_04", (_compat("fmfa_2025_04", "compute_efa", call), paper))


# RDE

OVERFLOW = "without the overflow to NaN from a similarity of 88 tau on"


def _tal_per(call: str, a: Arguments) -> Advice:
    given = f"{a['scores']}, {a['pid']}, temperature={a['tau']}, margin={a['margin']}"
    return Advice(VECTOR, "rde", (_same(f'tal_loss_from_scores({given}, reduction="none")', OVERFLOW),))


def _trl_per(call: str, a: Arguments) -> Advice:
    given = f"{a['scores']}, {a['pid']}, temperature={a['tau']}, margin={a['margin']}"
    return Advice(
        VECTOR,
        "rde",
        (
            _same(f'trl_loss_from_scores({given}, negatives="released", reduction="none")', OVERFLOW),
            _other(
                f'trl_loss_from_scores({given}, reduction="none")',
                "the paper's negatives; here positives count among them, with similarity 0: another value where all "
                "negatives are below 0",
            ),
        ),
    )


def _sdm_per(call: str, a: Arguments) -> Advice:
    options = f", {_eps(a)}" if _eps(a) else ""
    given = f"{a['scores']}, {a['pid']}, logit_scale={a['logit_scale']}{options}"
    return Advice(VECTOR, "rde", (_same(f'sdm_loss_from_scores({given}, reduction="none")'),))


def _infonce_per(call: str, a: Arguments) -> Advice:
    write = f'itc_loss_from_scores({a["scores"]}, logit_scale={a["logit_scale"]}, reduction="none")'
    return Advice("[B], of every pair the mean of both directions", "rde", (_same(write),))


def _of_type(a: Arguments, reduction: str) -> str | None:
    """The loss of a literal loss_type: "TAL" before "TRL", "InfoNCE" and "SDM", as the code looks for them."""
    literal = a["loss_type"][1:-1] if a["loss_type"][:1] in "'\"" else None
    if literal is None:
        return None
    tau_margin = f"{a['tau']}, {a['margin']}"
    forms = {
        "TAL": f'TALLoss({tau_margin}, reduction="{reduction}")',
        "TRL": f'TRLLoss({tau_margin}, negatives="released", reduction="{reduction}")',
        "InfoNCE": f'ITCLoss(reduction="{reduction}")',
        "SDM": f'SDMLoss(reduction="{reduction}")',
    }
    return next((form for key, form in forms.items() if key in literal), None)


def _called(loss: str, image: str, text: str, a: Arguments, weight: str = "") -> str:
    pids = "" if loss.startswith("ITCLoss") else f", {a['pid']}"
    scale = f", logit_scale={a['logit_scale']}" if loss.startswith(("ITCLoss", "SDMLoss")) else ""
    return f"{loss}({image}, {text}{pids}{scale}{weight})"


def _types(a: Arguments, reduction: str) -> str:
    if a["loss_type"][:1] in "'\"":
        return ""
    loss = _of_type({**a, "loss_type": "'TAL'"}, reduction)
    return f"where {a['loss_type']} is 'TAL' it is {loss}, and so on for 'TRL', 'InfoNCE' and 'SDM'"


def _per_loss(call: str, a: Arguments) -> Advice:
    returns = "two [B]: the loss of every pair, the sum of both directions (InfoNCE: their mean), and its cosine"
    loss = _of_type(a, "none")
    forms = [_compat("rde", "compute_per_loss", call, _types(a, "none"))]
    if loss is not None:
        image, text = a["image_features"], a["text_features"]
        cosine = f"torch.nn.functional.cosine_similarity({image}, {text})"
        forms.append(_same(f"({_called(loss, image, text, a)}, {cosine})"))
    return Advice(returns, "rde", tuple(forms))


def _rbs(call: str, a: Arguments) -> Advice:
    returns = (
        "two scalars, of the global (BGE) and the selected (TSE) features: the weighted sum over the pairs of TAL and "
        "TRL, the weighted mean of InfoNCE and SDM"
    )
    summed = a["loss_type"][1:-1] in ("TAL", "TRL")
    loss = _of_type(a, "sum" if summed else "mean")
    forms = [_compat("rde", "compute_rbs", call, _types(a, "sum"))]
    weight = "" if a["label_hat"] == "None" else f", sample_weight={a['label_hat']}"

    def both(loss: str) -> str:
        one = _called(loss, a["i_feats"], a["t_feats"], a, weight)
        return f"({one}, {_called(loss, a['i_tse_f'], a['t_tse_f'], a, weight)})"

    if loss is not None:
        forms.append(_same(both(loss)))
        if summed:
            mean = loss.replace('reduction="sum"', 'reduction="mean"')
            forms.append(_other(both(mean), "the mean over the clean pairs, whose size does not grow with the batch"))
    return Advice(returns, "rde", tuple(forms))


RULES: dict[str, Callable[[str, Arguments], Advice]] = {
    "compute_sdm": _sdm,
    "compute_a_sdm": _a_sdm,
    "compute_itc": _itc,
    "compute_cmpm": _cmpm,
    "compute_id": _id,
    "compute_mlm": _mlm,
    "compute_mcm_or_mlm": _mlm,
    "compute_minmax_info_loss": _minmax,
    "compute_efa": _efa,
    "compute_TAL_per": _tal_per,
    "compute_TRL_per": _trl_per,
    "compute_sdm_per": _sdm_per,
    "compute_InfoNCE_per": _infonce_per,
    "compute_per_loss": _per_loss,
    "compute_rbs": _rbs,
}
assert RULES.keys() == PUBLISHED.keys() - {"rank"}
