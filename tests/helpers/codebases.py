"""Small models with the interfaces of the codebases in docs/recipes, as text that the recipes' diffs apply to.

Same names, shapes and dtypes: half-precision linear and attention weights beside float32 LayerNorms, image tokens
[B, 1 + N, D], text tokens [B, L, D], a 0-dim CPU logit_scale, and a dictionary of losses.
"""

BACKBONE = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Backbone(nn.Module):
    '''Patches [B, 1 + N, P] and captions [B, L] to the joint space.'''

    def __init__(self, patch_dim, vocab_size, embed_dim):
        super().__init__()
        self.visual = nn.Linear(patch_dim, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.ln_final = LayerNorm(embed_dim)
        self.text_projection = nn.Linear(embed_dim, embed_dim)

    def encode_image(self, images):
        return self.visual(images.to(self.visual.weight.dtype))

    def encode_text(self, text):
        x = self.token_embedding(text)
        x = x + x.cumsum(1) / 10  # a token knows what stands before it
        return self.text_projection(self.ln_final(x).to(self.text_projection.weight.dtype))

    def forward(self, images, text):
        return self.encode_image(images), self.encode_text(text)


def convert_weights(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
"""

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
import torch
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
"""

TBPS_CLIP = (
    BACKBONE
    + """
from .loss import compute_simclr_loss


class CLIP(nn.Module):
    def __init__(self, config, eps=1e-2):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.patch_dim, config.vocab_size, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.simclr_mlp = nn.Linear(config.embed_dim, 16)
        self.eps = eps

    def encode_image(self, images):
        return self.backbone.encode_image(images)[:, 0]

    def forward(self, input, alpha):
        ret = dict()
        text_tokens, ids = input['caption_ids'], input['pids']
        image_seq_embeddings, text_seq_embeddings = self.backbone(input['images'], text_tokens)
        image_features, text_features = image_seq_embeddings[:, 0], text_seq_embeddings[:, 1]
        image_norm, text_norm = F.normalize(image_features), F.normalize(text_features)

        if self.config.experiment.ss:
            aug1_embed = self.simclr_mlp(self.encode_image(input['aug_ss_1']))
            aug2_embed = self.simclr_mlp(self.encode_image(input['aug_ss_2']))
            q_a = F.normalize(aug1_embed, dim=-1, p=2)
            q_b = F.normalize(aug2_embed, dim=-1, p=2)
            labels = torch.arange(len(ids))
            ss_loss = compute_simclr_loss(q_a, q_b, q_a, q_b, labels, self.config.experiment.simclr_temperature)
            ret['ss_loss'] = ss_loss * self.config.experiment.ss_ratio

        logit_scale = self.logit_scale.exp()
        idx = ids.view(-1, 1)
        same = (idx == idx.t()).float()
        sim_targets = same / same.sum(1, keepdim=True)
        nitc_loss = self.calc_contrastive(image_norm, text_norm,
                                          sim_targets, alpha, logit_scale)

        if self.config.experiment.mvs_image:
            image_1_features = self.encode_image(input['aug1'])
            image_1_features_norm = F.normalize(image_1_features)
            loss_img1_txt0 = self.calc_contrastive(image_1_features_norm, text_norm,
                                                   sim_targets, alpha, logit_scale)
            nitc_loss = (nitc_loss + loss_img1_txt0) / 2

        ret['nitc_loss'] = nitc_loss * self.config.experiment.nitc_ratio

        if self.config.experiment.citc:
            logits_image_per_image = logit_scale * image_norm @ image_norm.t()
            logits_text_per_text = logit_scale * text_norm @ text_norm.t()
            logits_text_per_image = logit_scale * image_norm @ text_norm.t()
            logits_image_per_text = logits_text_per_image.t()
            inmodal_cyclic_loss = (logits_image_per_image - logits_text_per_text).square().mean() / logit_scale**2
            crossmodal_cyclic_loss = (logits_text_per_image - logits_image_per_text).square().mean() / logit_scale**2
            weights = self.config.experiment
            citc_loss = weights.citc_lambda1 * inmodal_cyclic_loss + weights.citc_lambda2 * crossmodal_cyclic_loss
            ret['citc_loss'] = citc_loss * self.config.experiment.citc_ratio

        if self.config.experiment.ritc:
            logits_per_image_1 = logit_scale * image_norm @ text_norm.t()
            kl_img, kl_txt = (
                F.kl_div((sim_targets + self.eps).log(), x.log_softmax(dim=1), log_target=True, reduction='batchmean')
                for x in (logits_per_image_1, logits_per_image_1.t())
            )
            ritc_loss = 0.5 * (kl_img + kl_txt)
            ret['ritc_loss'] = ritc_loss * self.config.experiment.ritc_ratio
        return ret

    def calc_contrastive(self, image_features, text_features, sim_targets, alpha, logit_scale):
        losses, i2t = [], logit_scale * image_features @ text_features.t()
        for logits in (i2t, i2t.t()):
            targets = alpha * logits.detach().softmax(dim=1) + (1 - alpha) * sim_targets
            losses.append(-torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1).mean())
        return sum(losses) / 2
"""
)
