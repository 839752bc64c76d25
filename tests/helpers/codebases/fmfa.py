"""FMFA, both versions: what their models have beside IRRA's, their learning rates, and the loader of 2025-08."""

from .irra import IRRA

__all__ = ["FMFA_2025_04", "FMFA_2025_08", "FMFA_DATASETS", "FMFA_FINETUNE"]

# The patches of a token as both versions choose them, line by line.
SELECTION = """            t2isim = torch.matmul(text_feats, image_feats[:,1:,:].transpose(1,2))
            min_vals = t2isim.min(dim=2, keepdim=True)[0]
            max_vals = t2isim.max(dim=2, keepdim=True)[0]

            t2isim = (t2isim - min_vals) / (max_vals - min_vals)

            threshold = 1.0 / t2isim.size(2)
            t2isim = torch.where(t2isim > threshold, t2isim, torch.zeros_like(t2isim))
            row_sums = t2isim.sum(dim=2, keepdim=True)
            t2isim = t2isim / row_sums

            agg_v = torch.matmul(t2isim, image_feats[:,1:,:])
"""


def replaced(source: str, first: str, last: str, new: str) -> str:
    """`source` with `new` in place of the lines from the one with `first` to the one with `last`."""
    lines = source.split("\n")
    (start,) = (i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(start, len(lines)) if last in lines[i])
    return "\n".join([*lines[:start], *new.rstrip("\n").split("\n"), *lines[end + 1 :]])


_08 = replaced(
    IRRA,
    "'a-sdm' in self",
    "use_weight=True",
    "        if 'a-sdm' in self.current_task:\n"
    "            ret.update({'a-sdm_loss':objectives.compute_sdm("
    "i_feats, t_feats, batch['pids'], logit_scale, use_weight= True)})",
)
_08 = replaced(_08, "t2isim = torch.matmul", "agg_v = ", SELECTION)
_08 = replaced(
    _08,
    "            t, i = text_feats",
    "compute_minmax",
    "            ret.update({'efa_loss':objectives.compute_minmax_info_loss("
    "text_feats, image_feats[:,1:,:], agg_v)*self.args.minmax_loss_weight})",
)
_08 = replaced(_08, "'temperature':", "'temperature':", "")
# model/build_finetune.py, and solver/build.py, whose rules by name are commented out.
FMFA_2025_08 = replaced(
    _08,
    "lr = args.lr * 5 if 'cross'",
    "groups.append",
    "        lr = args.lr\n        groups.append({'params': [value], 'lr': lr})",
)

_04 = replaced(
    IRRA,
    "'a-sdm' in self",
    "use_weight=True",
    "        if 'a-sdm' in self.current_task:\n"
    "            ret.update({'a_sdm_loss':objectives.compute_a_sdm("
    "i_feats, t_feats, batch['pids'], logit_scale, self.args.alpha_i2t, self.args.alpha_t2i)})",
)
_04 = replaced(_04, "t2isim = torch.matmul", "agg_v = ", SELECTION)
_04 = replaced(
    _04,
    "            t, i = text_feats",
    "compute_minmax",
    "            ret.update({'efa_loss':objectives.compute_efa("
    "text_feats, image_feats[:,1:,:], agg_v, self.args.margin_t2e, self.args.margin_i2e)*self.args.efa_loss_weight})",
)
FMFA_2025_04 = _04.replace("class IRRA(", "class FMFA(")  # model/build.py

# Of datasets/build.py of 2025-08: a caption is a class.
FMFA_DATASETS = """
def build_dataloader(args, dataset):
    num_classes = len(dataset.train_id_container)
    if args.MLM:
            if args.pretrain:
                syn_dataset = dataset
                num_classes = len(syn_dataset.train)
    return num_classes


def build_zero_shot_loader(args, finetune=False):
    syn_dataset = args.dataset
    train_set = syn_dataset.train
    num_classes = len(syn_dataset.train)

    return train_set, num_classes
"""

# Of finetune.py of 2025-08, which ends in a script; here it is a function.
FMFA_FINETUNE = """
from utils.logger import setup_logger
from utils.metrics import Evaluator


def main(args, loaders):
    logger = setup_logger('IRRA', save_dir=args.output_dir, if_train=args.training, distributed_rank=0)
    val_img_loader0, val_txt_loader0, val_img_loader1, val_txt_loader1, val_img_loader2, val_txt_loader2 = loaders
    evaluator0 = Evaluator(val_img_loader0, val_txt_loader0)
    evaluator1 = Evaluator(val_img_loader1, val_txt_loader1)
    evaluator2 = Evaluator(val_img_loader2, val_txt_loader2)

    return evaluator0, evaluator1, evaluator2
"""
