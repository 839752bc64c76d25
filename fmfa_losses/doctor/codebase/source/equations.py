"""Equations that have an exact counterpart here, as plain PyTorch; `canonical.py` has the rules by which they are read.

A parameter stands for anything that is the same wherever it occurs. `unit_`: the features have length 1 already;
`_gather`: those of all processes are compared, and the inverse of the scale is the parameter.
"""

__all__ = ["EQUATIONS"]

EQUATIONS = """
def sdm(image, text, pids, scale, eps):
    z = scale * F.normalize(text, dim=1) @ F.normalize(image, dim=1).t()
    y = pids.view(-1, 1) == pids.view(-1, 1).t()
    q = y / y.sum(1)
    t2i = F.softmax(z, dim=1) * (F.log_softmax(z, dim=1) - torch.log(q + eps))
    i2t = F.softmax(z.t(), dim=1) * (F.log_softmax(z.t(), dim=1) - torch.log(q + eps))
    return t2i.sum(dim=1).mean() + i2t.sum(dim=1).mean()

def cmpm(image, text, pids, eps):
    a = image @ F.normalize(text, dim=1).t()
    b = text @ F.normalize(image, dim=1).t()
    y = pids.view(-1, 1) == pids.view(-1, 1).t()
    q = y / y.norm(dim=1)
    i2t = F.softmax(a, dim=1) * (F.log_softmax(a, dim=1) - torch.log(q + eps))
    t2i = F.softmax(b, dim=1) * (F.log_softmax(b, dim=1) - torch.log(q + eps))
    return i2t.sum(dim=1).mean() + t2i.sum(dim=1).mean()

def itc(image, text, scale):
    z = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).t()
    labels = torch.arange(image.size(0))
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.t(), labels)) / 2

def itc_gather(image, text, inverse):
    z = all_gather(F.normalize(image, dim=1)) @ all_gather(F.normalize(text, dim=1)).t() / inverse
    labels = torch.arange(image.size(0))
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.t(), labels)) / 2

def nitc_gather(image, text, pids, inverse):
    z = all_gather(F.normalize(image, dim=1)) @ all_gather(F.normalize(text, dim=1)).t() / inverse
    y = all_gather(pids.view(-1, 1)) == all_gather(pids.view(-1, 1)).t()
    q = y / y.sum(1)
    i2t = (F.log_softmax(z, dim=1) * q).sum(dim=1).mean()
    t2i = (F.log_softmax(z.t(), dim=1) * q).sum(dim=1).mean()
    return -(i2t + t2i) / 2

def unit_nitc_soft(image, text, image_s, text_s, image_all, text_all, image_s_all, text_s_all, q, ratio, scale):
    with torch.no_grad():
        soft_i2t = scale * image_s @ text_s_all.t()
        soft_t2i = scale * text_s @ image_s_all.t()
        target_i2t = ratio * F.softmax(soft_i2t, dim=1) + (1 - ratio) * q
        target_t2i = ratio * F.softmax(soft_t2i, dim=1) + (1 - ratio) * q
    i2t = (F.log_softmax(scale * image @ text_all.t(), dim=1) * target_i2t).sum(dim=1).mean()
    t2i = (F.log_softmax(scale * text @ image_all.t(), dim=1) * target_t2i).sum(dim=1).mean()
    return -(i2t + t2i) / 2

def unit_simclr(a, b, a_all, b_all, labels, tau):
    own = torch.where(F.one_hot(labels, a_all.size(0)) == 0, 0, float('-inf'))
    one = torch.cat([a @ b_all.t() / tau, a @ a_all.t() / tau + own], 1)
    other = torch.cat([b @ a_all.t() / tau, b @ b_all.t() / tau + own], 1)
    return 0.5 * (F.cross_entropy(one, labels) + F.cross_entropy(other, labels))

def identity(image_logits, text_logits, pids):
    return (F.cross_entropy(image_logits, pids) + F.cross_entropy(text_logits, pids)) / 2

def words(scores, labels):
    return nn.CrossEntropyLoss(ignore_index=0)(scores, labels)
"""
