"""IRRA: its model, with the terms that FMFA adds in 2025-08 too, its loader, its training loop and its evaluation."""

from .backbone import BACKBONE

__all__ = ["IRRA", "IRRA_BASES", "IRRA_PROCESSOR", "IRRA_TRAIN"]

IRRA = (
    BACKBONE
    + """
from model import objectives


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module('c_fc', nn.Linear(width, 4 * width))
        self.mlp.add_module('gelu', QuickGELU())
        self.mlp.add_module('c_proj', nn.Linear(4 * width, width))
        self.ln_2 = LayerNorm(width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, x):
        return self.resblocks(x)


class IRRA(nn.Module):
    def __init__(self, args, num_classes):
        super().__init__()
        self.args = args
        self.current_task = args.loss_names.split('+')
        self.base_model = Backbone(args.patch_dim, args.vocab_size, args.embed_dim)
        self.embed_dim = args.embed_dim
        self.logit_scale = torch.ones([]) * (1 / args.temperature)
        if 'id' in self.current_task:
            self.classifier = nn.Linear(self.embed_dim, num_classes)
        if 'mlm' in self.current_task:
            self.cross_attn = nn.MultiheadAttention(self.embed_dim, self.embed_dim // 64, batch_first=True)
            self.cross_modal_transformer = Transformer(self.embed_dim, args.cmt_depth)
            self.ln_pre_t, self.ln_pre_i, self.ln_post = (LayerNorm(self.embed_dim) for _ in range(3))
            self.mlm_head = nn.Sequential()
            self.mlm_head.add_module('dense', nn.Linear(self.embed_dim, self.embed_dim))
            self.mlm_head.add_module('gelu', QuickGELU())
            self.mlm_head.add_module('ln', LayerNorm(self.embed_dim))
            self.mlm_head.add_module('fc', nn.Linear(self.embed_dim, args.vocab_size))

    def encode_image(self, image):
        return self.base_model.encode_image(image)[:, 0].float()

    def encode_text(self, text):
        return self.base_model.encode_text(text)[torch.arange(len(text)), text.argmax(dim=-1)].float()

    def forward(self, batch):
        ret = dict()
        images, caption_ids = batch['images'], batch['caption_ids']
        image_feats, text_feats = self.base_model(images, caption_ids)
        i_feats = image_feats[:, 0, :].float()
        t_feats = text_feats[torch.arange(text_feats.shape[0]), caption_ids.argmax(dim=-1)].float()
        logit_scale = self.logit_scale
        ret.update({'temperature': 1 / logit_scale})
        if 'itc' in self.current_task:
            ret.update({'itc_loss': objectives.compute_itc(i_feats, t_feats, logit_scale)})
        if 'sdm' in self.current_task:
            ret.update({'sdm_loss': objectives.compute_sdm(i_feats, t_feats, batch['pids'], logit_scale)})
        if 'cmpm' in self.current_task:
            ret.update({'cmpm_loss': objectives.compute_cmpm(i_feats, t_feats, batch['pids'])})
        if 'a-sdm' in self.current_task:
            pids = batch['pids']
            ret.update({'a-sdm_loss':objectives.compute_sdm(i_feats, t_feats, pids, logit_scale, use_weight=True)})
        if 'efa' in self.current_task:
            t2isim = torch.matmul(text_feats, image_feats[:, 1:, :].transpose(1, 2))
            weights = inline_sparsification(t2isim)
            agg_v = torch.matmul(weights, image_feats[:, 1:, :])
            t, i = text_feats, image_feats[:, 1:, :]
            ret.update({'efa_loss':objectives.compute_minmax_info_loss(t, i, agg_v)*self.args.minmax_loss_weight})
        if 'id' in self.current_task:
            weight_dtype = self.classifier.weight.dtype
            image_logits = self.classifier(i_feats.to(weight_dtype)).float()
            text_logits = self.classifier(t_feats.to(weight_dtype)).float()
            ret.update({'id_loss': objectives.compute_id(image_logits, text_logits, batch['pids'])})
        if 'mlm' in self.current_task:
            x = self.ln_pre_i(image_feats)
            q = self.ln_pre_t(self.base_model.encode_text(batch['mlm_ids']))
            x = self.cross_attn(q, x, x, need_weights=False)[0]
            scores = self.mlm_head(self.ln_post(self.cross_modal_transformer(x)))
            scores = scores.float().reshape(-1, self.args.vocab_size)
            ret.update({'mlm_loss': objectives.compute_mlm(scores, batch['mlm_labels'].reshape(-1))})
        return ret


def build_optimizer(args, model):
    groups = []
    for key, value in model.named_parameters():
        lr = args.lr * 5 if 'cross' in key else args.lr
        if 'bias' in key:
            lr = args.lr * 2
        if 'classifier' in key or 'mlm_head' in key:
            lr = args.lr * 5
        groups.append({'params': [value], 'lr': lr})
    return torch.optim.Adam(groups, lr=args.lr, eps=1e-3)
"""
)

# Of datasets/bases.py: `numpy()` gives the memory of the tensor itself, and the masking writes into it.
IRRA_BASES = """
import random

import torch


def tokenize(caption, tokenizer, text_length=77, truncate=True):
    return torch.tensor(tokenizer.encode(caption))


class ImageTextMLMDataset:
    def __init__(self, dataset, tokenizer, text_length=77, truncate=True):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.truncate = truncate

    def __getitem__(self, index):
        pid, image_id, img_path, caption = self.dataset[index]
        caption_tokens = tokenize(caption, tokenizer=self.tokenizer, text_length=self.text_length)

        mlm_tokens, mlm_labels = self._build_random_masked_tokens_and_labels(caption_tokens.cpu().numpy())

        ret = {
            'pids': pid,
            'caption_ids': caption_tokens,
            'mlm_ids': mlm_tokens,
            'mlm_labels': mlm_labels
        }

        return ret

    def _build_random_masked_tokens_and_labels(self, tokens):
        labels = []
        for i, token in enumerate(tokens):
            if 0 < token < 49405 and random.random() < 0.15:
                tokens[i] = 49405
                labels.append(token)
            else:
                labels.append(0)
        if all(l == 0 for l in labels):
            labels[1] = tokens[1]
            tokens[1] = 49405
        return torch.tensor(tokens), torch.tensor(labels)
"""

# Of processor/processor.py.
IRRA_PROCESSOR = """
import logging
from utils.meter import AverageMeter
from utils.metrics import Evaluator


def do_train(model, train_loader, evaluator, optimizer):
    logger = logging.getLogger("IRRA.train")

    meters = {
        "loss": AverageMeter(),
        "sdm_loss": AverageMeter(),
        "id_loss": AverageMeter(),
        "img_acc": AverageMeter(),
    }

    model.train()
    for n_iter, batch in enumerate(train_loader):
            ret = model(batch)
            total_loss = sum([v for k, v in ret.items() if "loss" in k])

            batch_size = batch['images'].shape[0]
            meters['loss'].update(total_loss.item(), batch_size)
            meters['sdm_loss'].update(ret.get('sdm_loss', 0), batch_size)
            meters['id_loss'].update(ret.get('id_loss', 0), batch_size)
            meters['img_acc'].update(ret.get('img_acc', 0), batch_size)

            optimizer.zero_grad()
            total_loss.backward()
            optimizer.step()

            info_str = f"Iteration[{n_iter + 1}/{len(train_loader)}]"
            for k, v in meters.items():
                if v.avg > 0:
                    info_str += f", {k}: {v.avg:.4f}"
            logger.info(info_str)
    return evaluator.eval(model.eval())


def do_inference(model, test_img_loader, test_txt_loader):

    logger = logging.getLogger("IRRA.test")
    logger.info("Enter inferencing")

    evaluator = Evaluator(test_img_loader, test_txt_loader)
    top1 = evaluator.eval(model.eval())
"""

# Of train.py, which ends in a script; here it is a function.
IRRA_TRAIN = """
from utils.logger import setup_logger
from utils.metrics import Evaluator


def main(args, val_img_loader, val_txt_loader):
    logger = setup_logger('IRRA', save_dir=args.output_dir, if_train=args.training, distributed_rank=0)
    evaluator = Evaluator(val_img_loader, val_txt_loader)
    return evaluator
"""
