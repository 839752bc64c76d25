"""RDE: its model, what it selects tokens with, its training loop and its evaluation."""

from .backbone import BACKBONE

__all__ = ["RDE", "RDE_LAYERS", "RDE_PROCESSOR", "RDE_TRAIN"]

# What RDE selects tokens with, one sample after the other. It has layers that nothing calls, and writes into `atten`.
RDE_LAYERS = """
import torch
import torch.nn as nn


class MLP(nn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(input_dim, hidden_dim), nn.Linear(hidden_dim, output_dim)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden_dim), nn.BatchNorm1d(output_dim)])

    def forward(self, x):
        hidden = self.layers[0](x)
        return self.layers[1](torch.relu(self.bns[0](hidden.flatten(0, 1))).view_as(hidden))


class TexualEmbeddingLayer(nn.Module):
    def __init__(self, input_dim=512, embed_dim=1024, ratio=0.3):
        super().__init__()
        self.linear = nn.Linear(input_dim, embed_dim)
        self.mlp = MLP(input_dim, embed_dim // 2, embed_dim)
        self.ratio = ratio

    def forward(self, features, text, atten):
        best, lengths = [], []
        k = int((text.shape[1] - 2) * self.ratio)
        for row, ids, scores in zip(features, text, atten):
            end = int(ids.argmax())
            scores[:, [0, end]] = -1
            best.append(row[(scores[end] * (ids != 0)).sort(descending=True, stable=True).indices[:k]])
            lengths.append(min(k, int((ids != 0).sum()) - 2))
        x = torch.stack(best)
        x = (x / (x.norm(dim=-1, keepdim=True) + 1e-8)).to(self.linear.weight.dtype)
        x = self.mlp(x) + self.linear(x)
        return torch.stack([tokens[:length].amax(0) for tokens, length in zip(x, lengths)]).float()


class VisualEmbeddingLayer(nn.Module):
    def __init__(self, input_dim=512, embed_dim=1024, ratio=0.3):
        super().__init__()
        self.linear = nn.Linear(input_dim, embed_dim)
        self.fc = nn.Linear(input_dim, embed_dim)
        self.mlp = MLP(input_dim, embed_dim // 2, embed_dim)
        self.ratio = ratio

    def forward(self, base_features, atten):
        k = int((atten.shape[1] - 1) * self.ratio)
        atten[:, :, 0] = -1
        x = torch.stack([row[scores[0].topk(k).indices] for row, scores in zip(base_features, atten)])
        x = (x / (x.norm(dim=-1, keepdim=True) + 1e-8)).to(self.fc.weight.dtype)
        return (self.mlp(x) + self.fc(x)).amax(1).float()
"""

RDE = (
    BACKBONE
    + """
from model import objectives

from .CrossEmbeddingLayer_tse import TexualEmbeddingLayer, VisualEmbeddingLayer


def attention_of(tokens, causal):
    scores = tokens.detach().float() @ tokens.detach().float().transpose(1, 2)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float('-inf'))
    return scores.softmax(-1)


class RDE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.base_model = Backbone(args.patch_dim, args.vocab_size, args.embed_dim)
        self.logit_scale = torch.ones([]) * (1 / args.temperature)
        self.visul_emb_layer = VisualEmbeddingLayer(args.embed_dim, ratio=args.select_ratio)
        self.texual_emb_layer = TexualEmbeddingLayer(args.embed_dim, ratio=args.select_ratio)
        loss_type = args.loss_names
        self.loss_type = loss_type

    def encode_image(self, image):
        return self.base_model.encode_image(image)[:, 0].float()

    def encode_text(self, text):
        return self.base_model.encode_text(text)[torch.arange(len(text)), text.argmax(dim=-1)].float()

    def encode_image_tse(self, image):
        x = self.base_model.encode_image(image)
        i_tse_f = self.visul_emb_layer(x, attention_of(x, False))
        return i_tse_f.float()

    def encode_text_tse(self, text):
        x = self.base_model.encode_text(text)
        t_tse_f = self.texual_emb_layer(x, text, attention_of(x, True))
        return t_tse_f.float()

    def features(self, batch):
        images, caption_ids = batch['images'], batch['caption_ids']
        image_feats, text_feats = self.base_model(images, caption_ids)
        atten_i, atten_t = attention_of(image_feats, False), attention_of(text_feats, True)
        i_feats = image_feats[:, 0, :].float()
        t_feats = text_feats[torch.arange(text_feats.shape[0]), caption_ids.argmax(dim=-1)].float()
        i_tse_f = self.visul_emb_layer(image_feats, atten_i)
        t_tse_f = self.texual_emb_layer(text_feats, caption_ids, atten_t)
        return i_feats, t_feats, i_tse_f, t_tse_f

    def compute_per_loss(self, batch):
        i_feats, t_feats, i_tse_f, t_tse_f = self.features(batch)
        losses = []
        for image, text in ((i_feats, t_feats), (i_tse_f, t_tse_f)):
            losses += objectives.compute_per_loss(image, text, batch['pids'], \\
                                                  tau=self.args.tau, margin=self.args.margin, \\
                                                  loss_type=self.loss_type, logit_scale=self.logit_scale)
        lossA, simsA, lossB, simsB = losses
        return lossA.detach().cpu(), lossB.detach().cpu(), simsA, simsB

    def forward(self, batch):
        ret = dict()
        i_feats, t_feats, i_tse_f, t_tse_f = self.features(batch)
        label_hat = batch['label_hat']
        loss1, loss2 = objectives.compute_rbs(i_feats, t_feats, i_tse_f, t_tse_f, batch['pids'], \\
                                              label_hat=label_hat, margin=self.args.margin, tau=self.args.tau, \\
                                              loss_type=self.loss_type, logit_scale=self.logit_scale)
        ret.update({'bge_loss': loss1})
        ret.update({'tse_loss': loss2})
        return ret
"""
)

# Of processor/processor.py: what the recipe removes begins and ends as there.
RDE_PROCESSOR = """
import logging

import torch
from utils.metrics import Evaluator
from sklearn.mixture import GaussianMixture


def get_loss(model, data_loader):
    model.eval()
    lossA, lossB = torch.zeros(2, len(data_loader.dataset))
    for batch in data_loader:
        with torch.no_grad():
            lossA[batch['index']], lossB[batch['index']], _, _ = model.compute_per_loss(batch)

    losses_A = (lossA-lossA.min())/(lossA.max()-lossA.min())
    gmm_A = GaussianMixture(n_components=2)

    return torch.Tensor(pred_A), torch.Tensor(pred_B)


def do_train(start_epoch, num_epoch, model, train_loader, optimizer):
    for epoch in range(start_epoch, num_epoch + 1):
        model.train()

        pred_A, pred_B = get_loss(model, train_loader)

        label_hat = pred_A + pred_B
        label_hat[consensus_division<=1] = 0

        for batch in train_loader:
            batch['label_hat'] = label_hat[batch['index']]
            total_loss = sum(value for key, value in model(batch).items() if 'loss' in key)
            optimizer.zero_grad()
            total_loss.backward()
            optimizer.step()


def do_inference(model, test_img_loader, test_txt_loader):

    logger = logging.getLogger("RDE.test")
    logger.info("Enter inferencing")

    evaluator = Evaluator(test_img_loader, test_txt_loader)
    top1 = evaluator.eval(model.eval())
"""

# Of train.py, which ends in a script; here it is a function.
RDE_TRAIN = """
from utils.logger import setup_logger
from utils.metrics import Evaluator


def main(args, val_img_loader, val_txt_loader):
    logger = setup_logger('RDE', save_dir=args.output_dir, if_train=args.training, distributed_rank=0)
    evaluator = Evaluator(val_img_loader, val_txt_loader)
    return evaluator
"""
