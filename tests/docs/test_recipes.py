"""docs/recipes, run: the diffs apply to models of the codebases' interfaces, the code blocks to real CLIP models."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import codebases
from helpers.compare import assert_close, assert_finite
from helpers.recipes import RECIPES, apply, blocks, load, run_recipe
from torch import nn

from fmfa_losses import IRRHead, mask_tokens
from fmfa_losses.compat.irra import rank
from fmfa_losses.noise import consensus_division
from fmfa_losses.retrieval import Evaluator

B, N, L, D, P, V, IDENTITIES = 6, 8, 10, 64, 12, 60, 5
MASK, START, END = V - 3, V - 2, V - 1


def arguments(**kwargs):
    defaults = {
        "loss_names": "sdm", "patch_dim": P, "vocab_size": V, "embed_dim": D, "temperature": 0.02, "cmt_depth": 2,
        "lr": 1e-3, "dataset_name": "RSTPReid", "minmax_loss_weight": 1.0, "tau": 0.02, "margin": 0.1,
        "select_ratio": 0.3, "efa_loss_weight": 1.0, "margin_t2e": 0.1, "margin_i2e": 0.1, "alpha_i2t": 10.0,
        "alpha_t2i": 10.0,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **kwargs})


def make_batch():
    captions = torch.zeros(B, L, dtype=torch.int64)
    for row, length in enumerate([10, 6, 8, 5, 7, 9]):
        captions[row, :length] = torch.tensor([START, *torch.randint(1, MASK, (length - 2,)), END])
    masked, labels = mask_tokens(captions, mask_id=MASK, special_ids=(0, START, END), probability=0.4)
    return {
        "images": torch.randn(B, 1 + N, P),
        "caption_ids": captions,
        "mlm_ids": masked,
        "mlm_labels": labels,
        "pids": torch.tensor([0, 1, 0, 2, 3, 4]),
        "label_hat": torch.tensor([1.0, 1, 0, 1, 1, 1]),
    }


def train_one_step(model, optimizer, batch):
    """The step of IRRA's processor; returns the dictionary of the model."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ret = model(batch)
    losses = {key: value for key, value in ret.items() if "loss" in key}
    total = sum(losses.values())
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    assert losses and all(value.dtype == torch.float32 and value.ndim == 0 for value in losses.values())
    assert_finite([total.detach(), *model.parameters()])
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"base_model.visual.weight", "base_model.text_projection.weight", "base_model.ln_final.weight"} <= moved
    return ret


def test_irra_keeps_its_losses(monkeypatch):
    module = load(monkeypatch, apply(blocks("irra", "diff")["irra-same"], codebases.IRRA))
    model = module.IRRA(arguments(loss_names="itc+sdm+cmpm+id+mlm"), IDENTITIES)
    module.convert_weights(model)
    ret = train_one_step(model, module.build_optimizer(model.args, model), make_batch())
    assert {key for key in ret if "loss" in key} == {"itc_loss", "sdm_loss", "cmpm_loss", "id_loss", "mlm_loss"}


@pytest.fixture
def irra_fmfa(monkeypatch):
    return load(monkeypatch, apply(blocks("irra", "diff")["irra-fmfa"], codebases.IRRA))


def test_irra_trains_with_fmfa(irra_fmfa):
    model = irra_fmfa.IRRA(arguments(loss_names="fmfa"), IDENTITIES)
    irra_fmfa.convert_weights(model)
    assert model.objective.irr.cross_attn.in_proj_weight.dtype == torch.float16
    assert model.objective.irr.ln_post.weight.dtype == torch.float32
    assert model.objective.efa.margin_image == 0.8 and model.objective.asdm.alpha == 1.0
    ret = train_one_step(model, irra_fmfa.build_optimizer(model.args, model), make_batch())
    assert {key for key in ret if "loss" in key} == {"id_loss", "irr_loss", "efa_loss", "asdm_loss"}
    assert all(0 <= ret[key] <= 1 for key in ("img_acc", "txt_acc", "mlm_acc"))


def test_learning_rates_by_parameter_name(irra_fmfa):
    """The heads' parameters get from the codebase's rule what the original heads got."""
    original = irra_fmfa.IRRA(arguments(loss_names="id+mlm"), IDENTITIES)
    ours = irra_fmfa.IRRA(arguments(loss_names="fmfa"), IDENTITIES)
    rates = []
    for model in (original, ours):
        names = [name for name, _ in model.named_parameters()]
        groups = irra_fmfa.build_optimizer(model.args, model).param_groups
        rates.append(dict(zip(names, (group["lr"] for group in groups), strict=True)))
    heads = {name: rate for name, rate in rates[0].items() if not name.startswith("base_model")}
    prefix = {name: "objective.identity." if name.startswith("classifier") else "objective.irr." for name in heads}
    assert {prefix[name] + name for name in heads} == {n for n in rates[1] if n.startswith("objective")}
    for name, rate in heads.items():
        assert rates[1][prefix[name] + name] == rate, name
    assert set(heads.values()) == {1e-3, 2e-3, 5e-3}


def test_checkpoint_of_irra_loads(irra_fmfa, tmp_path, capsys):
    """Wrapped, half and float mixed, under "model": and the loaded head computes what the original computed."""
    original = irra_fmfa.IRRA(arguments(loss_names="id+mlm"), IDENTITIES)
    model = irra_fmfa.IRRA(arguments(loss_names="fmfa"), IDENTITIES)
    saved = irra_fmfa.IRRA(arguments(loss_names="id+mlm"), IDENTITIES)
    saved.load_state_dict(original.state_dict())
    irra_fmfa.convert_weights(saved)
    state = {f"module.{name}": value for name, value in saved.state_dict().items()}
    path = tmp_path / "best.pth"
    torch.save({"model": state, "epoch": 60}, path)
    exec(blocks("irra", "python")["0"], {"torch": torch, "path": path, "model": model})
    assert capsys.readouterr().out.count("loaded") == 2
    original.load_state_dict(saved.state_dict())  # the same values, rounded to half

    batch = make_batch()
    image, text = original.base_model(batch["images"], batch["mlm_ids"])
    x = original.ln_pre_i(image)
    x = original.cross_attn(original.ln_pre_t(text), x, x, need_weights=False)[0]
    scores = original.mlm_head(original.ln_post(original.cross_modal_transformer(x)))
    expected = nn.functional.cross_entropy(scores.flatten(0, 1), batch["mlm_labels"].flatten(), ignore_index=0)
    got = model.objective.irr(image, text, batch["mlm_labels"])
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.objective.identity.classifier.weight, original.classifier.weight)


def test_irra_evaluates(irra_fmfa):
    model = irra_fmfa.IRRA(arguments(loss_names="fmfa"), IDENTITIES)
    irra_fmfa.convert_weights(model)
    batch = make_batch()
    halves = slice(0, 4), slice(4, 6)
    images, texts = ([(batch["pids"][half], batch[key][half]) for half in halves] for key in ("images", "caption_ids"))
    top1 = Evaluator(images, texts, progress=False).eval(model.eval())
    with torch.no_grad():
        text, image = (nn.functional.normalize(x) for x in (
            model.encode_text(batch["caption_ids"]), model.encode_image(batch["images"])))  # fmt: skip
    assert top1 == pytest.approx(rank(text @ image.T, batch["pids"], batch["pids"])[0][0].item())


def fmfa(monkeypatch, source, *diffs, **kwargs):
    """The module and the model of one version after the diffs, each of its recipe."""
    for recipe, diff in diffs:
        source = apply(blocks(recipe, "diff")[diff], source)
    module = load(monkeypatch, source)
    model = getattr(module, "FMFA", None) or module.IRRA
    model = model(arguments(**kwargs), IDENTITIES)
    module.convert_weights(model)
    return module, model


@pytest.mark.parametrize("diff", ["fmfa-same", "fmfa-paper"])
@pytest.mark.parametrize(("version", "key"), [("2025-08", "a-sdm_loss"), ("2025-04", "a_sdm_loss")])
def test_fmfa(monkeypatch, diff, version, key):
    """Both versions, with the same results and with the paper's."""
    source = {"2025-08": codebases.FMFA_2025_08, "2025-04": codebases.FMFA_2025_04}[version]
    label = diff if version == "2025-08" else f"{diff}-2025-04"
    names = "a-sdm+efa" + "+id+mlm" * (diff == "fmfa-same")
    module, model = fmfa(monkeypatch, source, ("fmfa", label), loss_names=names)
    ret = train_one_step(model, module.build_optimizer(model.args, model), make_batch())
    expected = {key, "efa_loss"} | ({"id_loss", "mlm_loss"} if diff == "fmfa-same" else set())
    assert {name for name in ret if "loss" in name} == expected
    assert ("temperature" in ret) == (version == "2025-04")
    with pytest.raises(AssertionError, match="0 places"):  # the diff of the other version does not fit by accident
        apply(blocks("fmfa", "diff")["fmfa-paper-2025-04" if version == "2025-08" else "fmfa-paper"], source)


@pytest.mark.parametrize("version", ["FMFA_2025_08", "FMFA_2025_04"])
def test_fmfa_takes_the_four_objectives(monkeypatch, version):
    """The diff of irra.md fits both; in 2025-08 no head has a learning rate of its own, as fmfa.md says."""
    module, model = fmfa(monkeypatch, getattr(codebases, version), ("irra", "irra-fmfa"), loss_names="fmfa")
    optimizer = module.build_optimizer(model.args, model)
    ret = train_one_step(model, optimizer, make_batch())
    assert {key for key in ret if "loss" in key} == {"id_loss", "irr_loss", "efa_loss", "asdm_loss"}
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == ({1e-3} if version == "FMFA_2025_08" else {1e-3, 2e-3, 5e-3})


@pytest.mark.parametrize("tau", [0.02, 0.01])
@pytest.mark.parametrize("loss_type", ["TAL", "TRL", "InfoNCE", "SDM"])
def test_rde_keeps_its_losses(monkeypatch, loss_type, tau):
    module = load(monkeypatch, apply(blocks("rde", "diff")["rde-same"], codebases.RDE))
    model = module.RDE(arguments(loss_names=loss_type, tau=tau))
    module.convert_weights(model)
    batch = make_batch()
    ret = train_one_step(model, torch.optim.Adam(model.parameters(), eps=1e-3), batch)
    assert ret.keys() == {"bge_loss", "tse_loss"}
    assert {each.shape for each in model.compute_per_loss(batch)} == {(B,)}


def test_rde_takes_the_module(monkeypatch):
    model = load(monkeypatch, apply(blocks("rde", "diff")["rde-modules"], codebases.RDE)).RDE(
        arguments(loss_names="TAL")
    )
    batch = make_batch()
    ret = train_one_step(model, torch.optim.Adam(model.parameters(), eps=1e-3), batch)
    same = apply(blocks("rde", "diff")["rde-same"], codebases.RDE)
    other = load(monkeypatch, same).RDE(arguments(loss_names="TAL"))
    other.load_state_dict(model.state_dict())
    summed = other(batch)["bge_loss"]
    torch.testing.assert_close(model(batch)["bge_loss"], summed / batch["label_hat"].sum())
    assert ret.keys() == {"bge_loss", "tse_loss"}


def rde_models(monkeypatch):
    """With the losses of this library, and with its layers too; the second has the checkpoint of the first."""
    same = apply(blocks("rde", "diff")["rde-same"], codebases.RDE)
    models = []
    for source in (same, apply(blocks("rde", "diff")["rde-selection"], same)):
        module = load(monkeypatch, source)
        models.append(module.RDE(arguments(loss_names="TAL")))
    models[1].load_state_dict(models[0].state_dict())
    return module, *models


def test_rde_selects_the_same_tokens(monkeypatch):
    module, released, ours = rde_models(monkeypatch)
    assert {type(layer).__module__ for layer in (ours.visul_emb_layer, ours.texual_emb_layer)} == {
        "fmfa_losses.compat.rde"
    }
    batch = make_batch()
    for model in (released.eval(), ours.eval()):
        model(batch)["tse_loss"].backward()
    torch.testing.assert_close(ours.encode_image_tse(batch["images"]), released.encode_image_tse(batch["images"]))
    captions = batch["caption_ids"]
    torch.testing.assert_close(ours.encode_text_tse(captions), released.encode_text_tse(captions))
    torch.testing.assert_close(ours(batch), released(batch))
    gradients = {name: parameter.grad for name, parameter in released.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-5)
    assert not any(gradient is not None for gradient in gradients.values())  # of what nothing calls
    module.convert_weights(ours)
    train_one_step(ours, torch.optim.Adam(ours.parameters(), eps=1e-3), batch)


def test_rde_divides_its_pairs(monkeypatch):
    pytest.importorskip("sklearn")
    _, _, model = rde_models(monkeypatch)
    processor = load(monkeypatch, apply(blocks("rde", "diff")["rde-division"], codebases.RDE_PROCESSOR))

    class Pairs(list):
        dataset = range(3 * B)

    batches = Pairs({**make_batch(), "index": torch.arange(i * B, (i + 1) * B)} for i in range(3))
    before = [parameter.clone() for parameter in model.parameters()]
    processor.do_train(1, 2, model, batches, torch.optim.Adam(model.parameters(), eps=1e-3))
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    losses = processor.get_loss(model, batches)
    expected = consensus_division(*losses, seed=2).label_hat
    assert losses[0].shape == expected.shape == (3 * B,) and set(expected.tolist()) <= {0, 1}
    weights = torch.cat([batch["label_hat"] for batch in batches])
    assert weights.shape == (3 * B,) and weights.any()


def test_rde_reads_noise_indices(tmp_path):
    pairs = [(i, i, f"{i}.jpg", f"caption {i}") for i in range(50)]
    done = run_recipe("rde", path=tmp_path / "RSTPReid_0.2.npy", pairs=pairs)
    noisy = [new != old for new, old in zip(done.noisy_pairs, pairs, strict=True)]
    assert sum(noisy) == int((done.index != torch.arange(50)).sum()) and 5 < sum(noisy) <= 10


def test_rde_evaluates(monkeypatch):
    _, _, model = rde_models(monkeypatch)
    batch = make_batch()
    halves = slice(0, 4), slice(4, 6)
    images, texts = ([(batch["pids"][half], batch[key][half]) for half in halves] for key in ("images", "caption_ids"))
    top1 = Evaluator(images, texts, fused=True, progress=False).eval(model.eval())
    scores = []
    with torch.no_grad():
        for branch in ("", "_tse"):
            text = getattr(model, f"encode_text{branch}")(batch["caption_ids"])
            image = getattr(model, f"encode_image{branch}")(batch["images"])
            scores.append(nn.functional.normalize(text) @ nn.functional.normalize(image).T)
    assert top1 == pytest.approx(rank(sum(scores) / 2, batch["pids"], batch["pids"])[0][0].item())


TBPS_EXPERIMENT = {
    "nitc_ratio": 1.0, "mvs_image": True, "ss": True, "ss_ratio": 0.4, "simclr_temperature": 0.1, "ritc": True,
    "ritc_ratio": 1.0, "citc": True, "citc_ratio": 0.1, "citc_lambda1": 0.25, "citc_lambda2": 0.5,
}  # fmt: skip


def simclr_as_written(q_a, q_b, k_a, k_b, labels, temperature):
    own = torch.zeros(len(q_a), len(k_a)).fill_diagonal_(-torch.inf)
    of_a = torch.cat([q_a @ k_b.T, q_a @ k_a.T + own], dim=1) / temperature
    of_b = torch.cat([q_b @ k_a.T, q_b @ k_b.T + own], dim=1) / temperature
    return sum(nn.functional.cross_entropy(x, labels) for x in (of_a, of_b)) / 2


def tbps_clip(monkeypatch, *diffs):
    source = codebases.TBPS_CLIP
    for diff in diffs:
        source = apply(blocks("tbps_clip", "diff")[diff], source)
    module = load(monkeypatch, source)
    module.CLIP.forward.__globals__["compute_simclr_loss"] = simclr_as_written
    torch.manual_seed(0)
    config = arguments(experiment=SimpleNamespace(**TBPS_EXPERIMENT), model=SimpleNamespace(use_gather=True))
    return module.CLIP(config)


def test_tbps_clip(monkeypatch):
    batch = make_batch()
    batch |= {name: batch["images"] + 0.3 * torch.randn(B, 1 + N, P) for name in ("aug1", "aug_ss_1", "aug_ss_2")}
    model = tbps_clip(monkeypatch, "tbps-fmfa")
    with torch.autocast("cpu", torch.bfloat16):
        ret = model(batch, 0.5)
        total = sum(value for key, value in ret.items() if "loss" in key)
    own = {"nitc_loss", "ritc_loss", "citc_loss", "ss_loss"}
    assert own | {"asdm_loss", "efa_loss"} == ret.keys()
    assert ret["asdm_loss"].dtype == ret["efa_loss"].dtype == torch.float32
    total.backward()
    assert_finite([parameter.grad for parameter in model.parameters()])

    labels = torch.where(batch["mlm_labels"] == 0, -100, batch["mlm_labels"])
    image_tokens, text_tokens = model.backbone(batch["images"], batch["caption_ids"])
    head = IRRHead(D, V, depth=1, ignore_index=-100)
    assert_finite([head(image_tokens.detach(), text_tokens.detach(), labels).loss.detach()])

    theirs, ours = tbps_clip(monkeypatch), tbps_clip(monkeypatch, "tbps-losses")
    for alpha in (0.0, 0.5):
        expected, got = theirs(batch, alpha), ours(batch, alpha)
        assert got.keys() == expected.keys() == own
        for name in own:
            torch.testing.assert_close(got[name], expected[name])
            gradients = (
                torch.autograd.grad(ret[name], list(model.parameters()), materialize_grads=True, retain_graph=True)
                for ret, model in ((got, ours), (expected, theirs))
            )
            assert_close(*gradients, 1e-5)


def check_step(done, model):
    assert set(done.out.terms) == {"id", "irr", "efa", "asdm"}
    assert_finite([done.out.loss.detach(), *done.out.terms.values(), *model.parameters(), *done.objective.parameters()])
    assert_finite([p.grad for p in done.objective.parameters()])
    for parameter in (*model.parameters(), *done.objective.parameters()):
        assert parameter.grad is not None or parameter.ndim == 0


def clip_captions(pad):
    captions = torch.full((4, 77), pad)
    for row, length in enumerate([77, 12, 30, 3]):
        captions[row, :length] = torch.tensor([49406, *torch.randint(1, 49000, (length - 2,)), 49407])
    return captions


def test_hugging_face_clip():
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        vision_config={**tower, "image_size": 224, "patch_size": 16},
        projection_dim=64,
    )
    model = transformers.CLIPModel(config)
    captions = clip_captions(49407)  # its tokenizer pads with the end token
    mask = (torch.arange(77) < torch.tensor([77, 12, 30, 3])[:, None]).long()
    batch = {
        "pixel_values": torch.randn(4, 3, 384, 128),
        "input_ids": captions,
        "attention_mask": mask,
        "pids": torch.tensor([0, 1, 1, 2]),
    }
    before = captions.clone()
    done = run_recipe("huggingface", model=model, batch=batch, num_identities=IDENTITIES)
    check_step(done, model)
    assert torch.equal(captions, before)

    image = done.encode_image(model, batch["pixel_values"])
    text = done.encode_text(model, captions, mask)
    assert image.shape == (4, 1 + 192, 64) and text.shape == (4, 77, 64)
    for token, pooled in (
        (image[:, 0], model.get_image_features(batch["pixel_values"], interpolate_pos_encoding=True)),
        (text[torch.arange(4), mask.sum(1) - 1], model.get_text_features(captions, attention_mask=mask)),
    ):  # transformers 5 wraps what 4 returned as it is
        torch.testing.assert_close(token, getattr(pooled, "pooler_output", pooled))


def test_open_clip():
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # not there, or its torchvision is built for another torch
        pytest.skip(f"open_clip does not load: {type(error).__name__}: {error}")
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": (384, 128), "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    )
    batch = {"images": torch.randn(4, 3, 384, 128), "texts": clip_captions(0), "pids": torch.tensor([0, 1, 1, 2])}
    done = run_recipe("open_clip", model=model, batch=batch, num_identities=IDENTITIES)
    check_step(done, model)
    out = done.encode(model, batch["images"], batch["texts"])
    assert out["image_tokens"].shape == (4, 192, 64) and out["text_tokens"].shape == (4, 77, 64)
    torch.testing.assert_close(out["image_features"], model.encode_image(batch["images"]))
    end = batch["texts"].argmax(1)
    torch.testing.assert_close(out["text_tokens"][torch.arange(4), end], model.encode_text(batch["texts"]))


def test_every_recipe_is_run():
    """A block that no test names would rot."""
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_recipes*.py"))
    for file in RECIPES.glob("*.md"):
        for label in blocks(file.stem, "diff"):
            assert re.search(rf'"{label.removesuffix("-2025-04")}"', text), f"{file.name}: {label}"
        if blocks(file.stem, "python"):
            assert f'"{file.stem}"' in text, file.name


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_says_what_it_is_for_and_has_names(page):
    title, _, use, *_ = page.read_text().split("\n")
    assert title.startswith("# Coming from ") and use.startswith("For ")
    assert re.search(r"^\|.* \| here \|$", page.read_text(), re.M)
    assert "irra.md#the-size-of-a-sdms-gradients" in page.read_text() or page.stem in ("irra", "pylate")


def test_the_patcher_finds_its_place_or_fails():
    assert apply(" a\n-b(...)\n+c\n", "a\nb(1,\n 2)\nd") == "a\nc\nd"
    with pytest.raises(AssertionError, match="0 places"):
        apply("-x\n+y\n", "z\n")
    with pytest.raises(AssertionError, match="2 places"):
        apply("-x\n+y\n", "x\nx\n")
