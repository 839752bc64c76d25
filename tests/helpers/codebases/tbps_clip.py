"""TBPS-CLIP: its model. Every gather and every second pass is there; one process gathers nothing."""

from .backbone import BACKBONE

__all__ = ["TBPS_CLIP"]

TBPS_CLIP = (
    BACKBONE + """
from misc.utils import is_using_distributed
from .loss import compute_simclr_loss


class CLIP(nn.Module):
    def __init__(self, config, eps=1e-2):
        super().__init__()
        self.backbone = Backbone(config.patch_dim, config.vocab_size, config.embed_dim)
        self.use_gather = config.model.use_gather
        self.logit_scale = nn.Parameter(torch.ones([]) * torch.tensor(1 / 0.07).log())
        self.config = config
        self.eps = eps

        if config.experiment.ss:
            self.simclr_mlp = nn.Linear(config.embed_dim, 16)

    def encode_image(self, images, return_dense=False):
        dense = self.backbone.encode_image(images)
        return (dense[:, 0], dense) if return_dense else dense[:, 0]

    def encode_text(self, text, return_dense=False):
        dense = self.backbone.encode_text(text)
        return (dense[:, 1], dense) if return_dense else dense[:, 1]

    def forward(self, input, alpha):
        ret = dict()
        images, images_1 = input['images'], input['aug1']
        text_tokens, ids = input['caption_ids'], input['pids']

        image_features, image_seq_embeddings = self.encode_image(images, return_dense=True)
        text_features, text_seq_embeddings = self.encode_text(text_tokens, return_dense=True)
        image_features_norm = F.normalize(image_features)
        text_features_norm = F.normalize(text_features)
        image_features_norm_gathered = self.all_gather(image_features_norm)
        text_features_norm_gathered = self.all_gather(text_features_norm)

        # image ss
        if self.config.experiment.ss:
            aug1_embed = self.simclr_mlp(self.encode_image(input['aug_ss_1']))
            aug2_embed = self.simclr_mlp(self.encode_image(input['aug_ss_2']))
            q_a = F.normalize(aug1_embed, dim=-1, p=2)
            q_b = F.normalize(aug2_embed, dim=-1, p=2)
            labels = torch.arange(q_a.size(0), device=q_a.device)
            k_a = self.all_gather(q_a)
            k_b = self.all_gather(q_b)
            ss_loss = compute_simclr_loss(q_a, q_b, k_a, k_b, labels, self.config.experiment.simclr_temperature)
            ret['ss_loss'] = ss_loss * self.config.experiment.ss_ratio

        logit_scale = self.logit_scale.exp()
        logit_scale.data = torch.clamp(logit_scale.data, max=100)

        idx = ids.view(-1, 1)
        gathered_ids = self.all_gather(ids)
        pos_idx = torch.eq(idx, gathered_ids.view(1, -1)).float()
        sim_targets = pos_idx / pos_idx.sum(1, keepdim=True)

        with torch.no_grad():
            image_features_s_norm = F.normalize(self.encode_image(images).detach())
            text_features_s_norm = F.normalize(self.encode_text(text_tokens).detach())
        nitc_loss = self.calc_contrastive(image_features_norm, text_features_norm, image_features_s_norm,
                                          text_features_s_norm,
                                          image_features_norm_gathered, text_features_norm_gathered,
                                          sim_targets, alpha, logit_scale)

        if self.config.experiment.mvs_image:
            image_1_features = self.encode_image(images_1)
            image_1_features_norm = F.normalize(image_1_features)
            image_1_features_norm_gathered = self.all_gather(image_1_features_norm)
            with torch.no_grad():
                image_1_features_s_norm = F.normalize(self.encode_image(images_1).detach())
            loss_img1_txt0 = self.calc_contrastive(image_1_features_norm, text_features_norm, image_1_features_s_norm,
                                                   text_features_s_norm,
                                                   image_1_features_norm_gathered, text_features_norm_gathered,
                                                   sim_targets, alpha, logit_scale)
            nitc_loss = (nitc_loss + loss_img1_txt0) / 2

        ret['nitc_loss'] = nitc_loss * self.config.experiment.nitc_ratio

        if self.config.experiment.citc:
            logits_image_per_image = logit_scale * image_features_norm_gathered @ image_features_norm_gathered.t()
            logits_text_per_text = logit_scale * text_features_norm_gathered @ text_features_norm_gathered.t()
            inmodal_cyclic_loss = (logits_image_per_image - logits_text_per_text).square().mean() / (
                    logit_scale * logit_scale)
            logits_text_per_image = logit_scale * image_features_norm_gathered @ text_features_norm_gathered.t()
            logits_image_per_text = logit_scale * text_features_norm_gathered @ image_features_norm_gathered.t()
            crossmodal_cyclic_loss = (logits_text_per_image - logits_image_per_text).square().mean() / (
                    logit_scale * logit_scale)
            citc_loss = self.config.experiment.citc_lambda1 * inmodal_cyclic_loss + """
    """self.config.experiment.citc_lambda2 * crossmodal_cyclic_loss
            ret['citc_loss'] = citc_loss * self.config.experiment.citc_ratio

        if self.config.experiment.ritc:
            logits_per_image_1 = logit_scale * image_features_norm @ text_features_norm_gathered.t()
            logits_per_text_1 = logit_scale * text_features_norm @ image_features_norm_gathered.t()
            target_log = (sim_targets + self.eps).log()
            kl_img, kl_txt = (
                F.kl_div(target_log, x.log_softmax(dim=1), log_target=True, reduction='batchmean')
                for x in (logits_per_image_1, logits_per_text_1)
            )
            ritc_loss = 0.5 * (kl_img + kl_txt)
            ret['ritc_loss'] = ritc_loss * self.config.experiment.ritc_ratio
        return ret

    def calc_contrastive(self, image_features, text_features, image_features_s, text_features_s,
                         image_features_gathered, text_features_gathered, sim_targets, alpha, logit_scale):
        losses = []
        for query, key, query_s, key_s in (
            (image_features, text_features_gathered, image_features_s, text_features_s),
            (text_features, image_features_gathered, text_features_s, image_features_s),
        ):
            with torch.no_grad():
                soft = (logit_scale * query_s @ key_s.t()).softmax(dim=1)
                targets = alpha * soft + (1 - alpha) * sim_targets
            log_p = (logit_scale * query @ key.t()).log_softmax(dim=1)
            losses.append(-torch.sum(log_p * targets, dim=1).mean())
        return sum(losses) / 2

    def all_gather(self, input):
        if not self.use_gather or not is_using_distributed():
            return input
        raise AssertionError('one process gathers nothing')
"""
)
