"""CLIP's weights from every kind of file: the same features as the model that wrote them, and no code run."""

import hashlib
import json
import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import openai_clip
from helpers.openai_clip import VOCAB_SIZE, OpenAICLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.person_retrieval.models.clip import CLIP
from benchmarks.person_retrieval.models.weights import load_clip

transformers = pytest.importorskip("transformers")

NATIVE, STRIP = (64, 64), (96, 32)  # pixels; 4 x 4 and 6 x 2 patches
CAPTIONS = ["A red coat, red shoes", "the man's hat is RED"]


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)  # older versions of transformers make their causal mask in it
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def openai() -> OpenAICLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return OpenAICLIP().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    openai_clip.write_openai_vocabulary(tmp_path)
    return tmp_path


def state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `convert_weights` of CLIP's codebases does: matrices in half precision, norms and embeddings not."""
    kept = ("ln_", "embedding", "logit_scale")
    return {k: v if any(part in k for part in kept) else v.half() for k, v in tensors.items()}


def heads() -> dict[str, Tensor]:
    """Of IRRA: parts that are no CLIP, some with names much like its own."""
    head = nn.Module()
    head.classifier = nn.Linear(32, 5)
    head.cross_attn = nn.MultiheadAttention(32, 1)
    head.cross_modal_transformer = openai_clip.Transformer(64, causal=False, depth=1)
    head.ln_pre_t, head.ln_pre_i, head.ln_post = (nn.LayerNorm(32) for _ in range(3))
    head.mlm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, VOCAB_SIZE))
    return state(head)


def traced(model: OpenAICLIP, file: Path, *, half: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions say that TorchScript is old
        inputs = torch.randn(1, 3, *NATIVE), torch.zeros(1, 77, dtype=torch.long)
        script = torch.jit.trace(model, inputs, check_trace=False)
        (script.half() if half else script).save(str(file))
        if half:
            script.float()  # it shares the model's parameters
    return file


def saved(content: Any, file: Path, **options: Any) -> Path:
    torch.save(content, file, **options)
    return file


def irra(model: OpenAICLIP, prefix: str = "", extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """A checkpoint as its Checkpointer writes it: no logit scale, half precision, optimizer and scheduler beside."""
    towers = {k: v for k, v in state(model, "base_model.").items() if not k.endswith("logit_scale")}
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    tensors = halved({prefix + k: v for k, v in {**towers, **heads(), **(extra or {})}.items()})
    return {"model": tensors, "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 3}, "epoch": 3}


def hugging_face(folder: Path, **vision: Any) -> Any:
    """A CLIPModel with random parameters, saved with its tokenizer's vocabulary."""
    openai_clip.write_hugging_face_vocabulary(folder)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": VOCAB_SIZE, "eos_token_id": VOCAB_SIZE - 1, "bos_token_id": VOCAB_SIZE - 2},
        vision_config={**shape, "image_size": 64, "patch_size": 16, **vision},
        projection_dim=32,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


# kind -> how the file is written, what its report calls it, whether matrices are in half precision
FILES: dict[str, tuple[Callable[[OpenAICLIP, Path], Path], str, bool]] = {
    "OpenAI's TorchScript": (lambda m, p: traced(m, p / "a"), "TorchScript archive with OpenAI's", False),
    "a state dict": (lambda m, p: saved(state(m), p / "a.zip"), "state dict with OpenAI's", False),
    "a state dict, half": (lambda m, p: saved(halved(state(m)), p / "a"), "state dict with OpenAI's", True),
    "not a zip": (
        lambda m, p: saved(state(m), p / "a", _use_new_zipfile_serialization=False),
        "state dict with OpenAI's",
        False,
    ),
    "open_clip": (
        lambda m, p: saved({"epoch": 1, "name": "run", "state_dict": state(m, "module.")}, p / "a.pt"),
        "under 'state_dict.module.'",
        False,
    ),
    "safetensors of open_clip": (
        lambda m, p: save_file(state(m), p / "a.bin") or p / "a.bin",
        "safetensors with OpenAI's",
        False,
    ),
    "IRRA": (lambda m, p: saved(irra(m), p / "best.pth"), "'model.base_model.', as IRRA and its successors", True),
    "IRRA on several GPUs": (
        lambda m, p: saved(irra(m, "module."), p / "best.pth"),
        "'model.module.base_model.'",
        True,
    ),
    "RDE": (
        lambda m, p: saved(irra(m, extra={"visul_emb_layer.fc.weight": torch.ones(2, 2)}), p / "best.pth"),
        "as RDE saves it",
        True,
    ),
    "prefixes in another order": (
        lambda m, p: saved({"state_dict": {"net": state(m, "base_model.module.")}}, p / "a"),
        "'state_dict.net.base_model.module.'",
        False,
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_features_are_those_of_the_model_that_wrote_the_file(kind: str, openai: OpenAICLIP, folder: Path) -> None:
    write, source, half = FILES[kind]
    file = write(openai, folder)
    generator = torch.get_rng_state()
    model, tokenizer, report = load_clip(file, [], image_size=NATIVE)
    assert torch.equal(generator, torch.get_rng_state())
    assert source in report.source and report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    reference = OpenAICLIP().double()
    reference.load_state_dict(halved(state(openai)) if half else state(openai))
    model.double()
    pixels, ids = torch.randint(0, 256, (2, 3, *NATIVE), dtype=torch.uint8), tokenizer(CAPTIONS)
    patches = reference.encode_image((pixels / 255.0 - model.mean) / model.std)
    words = reference.encode_text(ids)
    with float64():
        image, tokens = model.encode_image(pixels)
        caption, token_features = model.encode_text(ids)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close((image, tokens), (patches[:, 0], patches[:, 1:]), **close)
    torch.testing.assert_close((caption, token_features), (words[range(2), ids.argmax(dim=1)], words), **close)


def test_half_precision_in_torchscript(openai: OpenAICLIP, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        twin = OpenAICLIP()
    twin.load_state_dict(openai.state_dict())
    loaded = load_clip(traced(twin, folder / "a.pt", half=True), [], image_size=NATIVE)
    assert loaded.report.dtypes == ("float16",)
    assert torch.equal(loaded.model.clip.visual_projection.weight, openai.visual.proj.T.half().float())


@pytest.mark.parametrize("options", [{"safe_serialization": True}, {"activation": "gelu"}, "bin", "one file"])
def test_a_folder_of_hugging_face(options: dict[str, Any] | str, tmp_path: Path) -> None:
    """Heads that no tensor tells of, and the activation, are the configuration's."""
    theirs = hugging_face(tmp_path, hidden_act="gelu" if options == {"activation": "gelu"} else "quick_gelu")
    file = tmp_path / "model.safetensors"
    if options == "bin":
        file.unlink()
        file = saved(state(theirs), tmp_path / "pytorch_model.bin")
    model, tokenizer, report = load_clip(file if options == "one file" else tmp_path, [], image_size=NATIVE)
    assert report.file == str(file) and not report.resized and not report.unexpected and not report.skipped
    assert sum(report.loaded.values()) == len(theirs.state_dict())
    assert report.activation == f"{theirs.config.vision_config.hidden_act} (config.json)"
    pixels, ids = torch.randint(0, 256, (2, 3, *NATIVE), dtype=torch.uint8), tokenizer(CAPTIONS)
    normalized = (pixels.double() / 255 - model.mean) / model.std
    theirs.double()
    model.double()
    with float64():
        image = theirs.get_image_features(pixel_values=normalized)
        text = theirs.get_text_features(input_ids=ids)
        pairs = [(model.encode_image(pixels)[0], image), (model.encode_text(ids)[0], text)]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, getattr(expected, "pooler_output", expected), rtol=1e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match="activation 'gelu' was asked for" if options != {"activation": "gelu"} else "quick"
    ):
        load_clip(
            tmp_path, [], image_size=NATIVE, activation="gelu" if options != {"activation": "gelu"} else "quick_gelu"
        )


def test_the_report_names_everything(openai: OpenAICLIP, folder: Path) -> None:
    extra = {"base_model.visual.adapter.weight": torch.ones(2), "base_model.transformer.attn_mask": torch.ones(2)}
    file = saved(irra(openai, extra=extra), folder / "best.pth")
    report = load_clip(file, [], image_size=STRIP).report
    assert report.loaded == {"text_model": 36, "vision_model": 39, "visual_projection": 1, "text_projection": 1}
    assert report.missing == ("logit_scale",)
    assert report.unexpected == ("model.base_model.visual.adapter.weight",)
    assert report.resized == {"model.base_model.visual.positional_embedding": ((4, 4), (6, 2))}
    assert report.skipped["classifier"] == 2 and report.skipped["cross_modal_transformer"] == 12
    assert report.skipped["ln_post"] == 2 and report.skipped["mlm_head"] == 4 and report.skipped["optimizer"] == 3
    assert report.skipped["attn_mask"] == 1 and sum(report.skipped.values()) == 32
    assert set(report.dtypes) == {"float16", "float32"}
    written = json.loads(json.dumps(report.as_dict()))
    assert written["sha256"] == report.sha256 and written["skipped"] == report.skipped
    text = str(report)
    for said in ("classifier 2", "from 4 x 4 to 6 x 2", "logit_scale", "WARNING: 1 tensors", "quick_gelu (assumed"):
        assert said in text
    assert text.count("\n") < 10


def test_without_a_configuration_the_activation_is_said_or_asked_for(openai: OpenAICLIP, folder: Path) -> None:
    file = saved(state(openai), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"quick_gelu": False}}
    assert load_clip(file, [], image_size=NATIVE).report.activation.startswith("quick_gelu (assumed")
    asked = load_clip(file, [], image_size=NATIVE, activation="gelu")
    assert asked.report.activation == "gelu (as asked for)" and asked.model.clip.config.text_config.hidden_act == "gelu"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(folder, [], image_size=NATIVE).report.activation == "gelu (open_clip_config.json)"
    with pytest.raises(ValueError, match="activation must be one of quick_gelu, gelu"):
        load_clip(file, [], activation="relu")


# ----------------------------------------------------------------------------------------------- position embeddings


def plain_resize(positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Bilinear between centres, one patch at a time."""
    patches, out = positions[1:].reshape(*old, -1), [positions[0]]
    for row in range(new[0]):
        for column in range(new[1]):
            y, x = ((n + 0.5) * o / w - 0.5 for n, o, w in zip((row, column), old, new, strict=True))
            y, x = max(y, 0.0), max(x, 0.0)
            i, j = min(int(y), old[0] - 1), min(int(x), old[1] - 1)
            below, right = min(i + 1, old[0] - 1), min(j + 1, old[1] - 1)
            top = (1 - (x - j)) * patches[i, j] + (x - j) * patches[i, right]
            bottom = (1 - (x - j)) * patches[below, j] + (x - j) * patches[below, right]
            out.append((1 - (y - i)) * top + (y - i) * bottom)
    return np.stack(out)


@pytest.mark.parametrize(("grid", "size"), [((4, 4), STRIP), ((4, 4), (192, 64)), ((9, 3), STRIP), ((6, 2), (96, 32))])
def test_positions_are_resized_once(grid: tuple[int, int], size: tuple[int, int], folder: Path) -> None:
    theirs = OpenAICLIP(grid=grid)
    model, _, report = load_clip(saved(state(theirs), folder / "a"), [], image_size=size)
    new = (size[0] // 16, size[1] // 16)
    ours = model.clip.vision_model.embeddings.position_embedding.weight
    expected = plain_resize(theirs.visual.positional_embedding.detach().double().numpy(), grid, new)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert list(report.resized.values()) == ([] if grid == new else [(grid, new)])
    assert (
        model.grid == new
        and model.encode_image(torch.zeros(1, 3, *size, dtype=torch.uint8))[1].shape[1] == new[0] * new[1]
    )


def test_a_grid_that_cannot_be_known(folder: Path) -> None:
    file = saved(state(OpenAICLIP(grid=(5, 2))), folder / "a")
    assert load_clip(file, [], image_size=(80, 32)).model.grid == (5, 2)  # as many as needed
    with pytest.raises(ValueError, match="10 patches, no square, not 6 x 2 and not 3:1"):
        load_clip(file, [], image_size=STRIP)
    with pytest.raises(ValueError, match="multiple of the patch size 16"):
        load_clip(file, [], image_size=(90, 32))
    model = load_clip(file, [], image_size=(80, 32)).model
    with pytest.raises(ValueError, match="needs 13 position embeddings, the model has 11"):
        CLIP(model.clip, eot_id=1, image_size=STRIP)


# -------------------------------------------------------------------------------------------------- what is refused


def without(model: OpenAICLIP, *parts: str) -> dict[str, Tensor]:
    return {k: v for k, v in state(model).items() if not any(part in k for part in parts)}


def changed(model: OpenAICLIP, name: str, value: Tensor) -> dict[str, Tensor]:
    return {**state(model), name: value}


INCOMPLETE: dict[str, tuple[Callable[[OpenAICLIP], Any], str]] = {
    "no text": (
        lambda m: {k: v for k, v in state(m).items() if k.startswith("visual.")},
        "token_embedding.weight is miss",
    ),
    "no image": (lambda m: without(m, "visual."), "visual.conv1.weight is missing"),
    "a norm": (
        lambda m: without(m, "ln_final"),
        r"lacks 2 of the towers' tensors: ln_final.weight, ln_final.bias; exp",
    ),
    "a block": (lambda m: without(m, "visual.transformer.resblocks.0.ln", "visual.ln_pre"), "lacks 6 .*resblocks.0.ln"),
    "nothing of CLIP": (lambda m: nn.Linear(2, 2).state_dict(), "holds no CLIP, its 2 tensors are weight, bias; exp"),
    "no tensor": (lambda m: {"model": [1, 2]}, "holds no tensor with a name"),
    "two": (lambda m: {"model": state(m), "ema": state(m)}, "2 are found, under 'model.', 'ema.'; save the one"),
    "ResNet": (lambda m: changed(m, "visual.layer1.0.conv1.weight", torch.ones(1)), "image tower is a ResNet"),
    "shape": (
        lambda m: changed(m, "ln_final.weight", torch.ones(3)),
        r"ln_final.weight must have shape \(64,\) here, got",
    ),
    "integers": (lambda m: changed(m, "ln_final.bias", torch.ones(64, dtype=torch.int8)), "floating-point .* got int8"),
    "NaN": (
        lambda m: changed(m, "ln_final.bias", torch.full((64,), torch.nan)),
        "ln_final.bias must hold finite numbers",
    ),
    "context": (lambda m: state(OpenAICLIP(context_length=32)), "captions have 77 tokens, .* for 32; weights with 77"),
    "vocabulary": (lambda m: state(OpenAICLIP(vocab_size=600)), "has 600 tokens, and its tokenizer, .* has 528"),
    "more than tensors": (
        lambda m: m,
        r"holds more than tensors, it asks for helpers\.openai_clip\.OpenAICLIP, and nothing",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_part_that_is_missing_or_foreign_is_named(what: str, openai: OpenAICLIP, folder: Path) -> None:
    write, message = INCOMPLETE[what]
    file = saved(write(openai), folder / "weights.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(file, [], image_size=NATIVE)
    assert str(file) in str(caught.value)


def cut(file: Path, share: float) -> Path:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    return file


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


BROKEN: dict[str, tuple[Callable[[OpenAICLIP, Path], Path], str]] = {
    "empty": (lambda m, p: written(p / "w", b""), "w is empty; expected a TorchScript archive"),
    "text": (lambda m, p: written(p / "w", b"<!DOCTYPE html>"), r"holds no weights, it begins with b'<!DOCTYPE html>'"),
    "a cut zip": (lambda m, p: cut(saved(state(m), p / "w"), 0.7), "w is cut short: it begins as a zip"),
    "a cut pickle": (
        lambda m, p: cut(saved(state(m), p / "w", _use_new_zipfile_serialization=False), 0.5),
        "w is cut short or damaged",
    ),
    "cut safetensors": (lambda m, p: cut(save_file(state(m), p / "w") or p / "w", 0.5), "safetensors file cut short"),
    "nothing": (lambda m, p: p / "w", "must be a file or a folder, there is no"),
    "no configuration": (lambda m, p: saved(state(m), p / "model.safetensors").parent, "must hold config.json"),
    "no weights": (lambda m, p: written(p / "config.json", b"{}").parent, "must hold one of model.safetensors"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(what: str, openai: OpenAICLIP, folder: Path) -> None:
    write, message = BROKEN[what]
    path = write(openai, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_clip(path, [])
    assert str(path) in str(caught.value)


def test_a_foreign_configuration(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    for content, message in (
        ('{"model_type": "bert"}', "must be of model_type 'clip', got 'bert'"),
        ("{", "must be JSON"),
        (
            '{"model_type": "clip", "text_config": {"hidden_size": "wide"}}',
            r"config\.json must describe|has 49408 tokens",
        ),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_clip(tmp_path, [])


# ----------------------------------------------------------------------------------------------------- no code is run


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


class Runs:
    """Asks whoever unpickles it to call a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def test_the_code_of_a_torchscript_archive_is_not_looked_at(openai: OpenAICLIP, folder: Path) -> None:
    file = traced(openai, folder / "a.pt")
    bad = rewritten(file, folder / "b.pt", lambda name, data: b"import os; os._exit(3)" if "/code/" in name else data)
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(bad))
    first, second = (load_clip(path, [], image_size=NATIVE).model.state_dict() for path in (file, bad))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("torchscript", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, torch.load, getattr, pickle.loads])
def test_a_pickle_that_would_run_something_is_refused(
    function: Callable[..., Any], torchscript: bool, openai: OpenAICLIP, folder: Path
) -> None:
    marker = folder / "ran"
    payload = pickle.dumps(Runs(function, f"touch {marker}"), protocol=2)
    file = traced(openai, folder / "a.pt") if torchscript else saved(state(openai), folder / "a.pt")
    bad = rewritten(file, folder / "b.pt", lambda name, data: payload if name.endswith("/data.pkl") else data)
    message = r"asks for [\w.]+, (which is neither a module nor a tensor|and nothing was run)"
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(bad, [])
    assert str(bad) in str(caught.value) and not marker.exists()


PICKLES = {
    "a module that is no dictionary": (
        b"\x80\x02c__torch__\nM\n)\x81K\x01b.",
        "must be saved as a dictionary, got int",
    ),
    "an attribute of a module's class": (b"\x80\x02c__torch__\nM\n}b.", "damaged"),
    "a storage that is none": (b"\x80\x02X\x01\x00\x00\x00aQ.", "refused"),
    "nothing at all": (b"", "damaged"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_strange_pickle_in_torchscript(what: str, openai: OpenAICLIP, folder: Path) -> None:
    payload, message = PICKLES[what]
    file = traced(openai, folder / "a.pt")
    bad = rewritten(file, folder / "b.pt", lambda name, data: payload if name.endswith("/data.pkl") else data)
    with pytest.raises(ValueError, match=message):
        load_clip(bad, [])


def test_any_damage_to_torchscript_is_an_error_that_names_the_file(openai: OpenAICLIP, folder: Path) -> None:
    """Of its pickle, and of the lengths of its storages."""
    file = traced(openai, folder / "a.pt")
    chosen = random.Random(5)

    def damaged(name: str, data: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return data
        place = chosen.randrange(2, len(data) - 1)
        return data[:place] + bytes([chosen.randrange(256)]) + data[place + 1 :]

    refused = 0
    for _ in range(24):
        bad = rewritten(file, folder / "b.pt", damaged)
        try:
            load_clip(bad, [], image_size=NATIVE)
        except ValueError as error:
            refused += str(bad) in str(error)
    assert refused > 3
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1  # of a number
    with pytest.raises(ValueError, match=rf"d\.pt: the TorchScript archive is damaged .*{largest.filename}"):
        load_clip(written(folder / "d.pt", bytes(content)), [], image_size=NATIVE)
    short = rewritten(file, folder / "c.pt", lambda name, data: data[:-4] if "/data/" in name else data)
    with pytest.raises(ValueError, match=r"storage \w+ must have \d+ bytes, got"):
        load_clip(short, [])


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_ids_are_those_of_the_rule(folder: Path, openai: OpenAICLIP) -> None:
    model, tokenizer, _ = load_clip(saved(state(openai), folder / "a"), [], image_size=NATIVE)
    entries = openai_clip.pieces()
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (VOCAB_SIZE, VOCAB_SIZE - 3)
    assert (tokenizer.sot_id, tokenizer.eot_id) == (VOCAB_SIZE - 2, VOCAB_SIZE - 1)
    assert 512 + 48894 + 2 == 49408 and 49408 - 3 == 49405  # with all of OpenAI's merges
    (row,) = tokenizer(["Red  coats, HAT's 42"])
    expected = ["red</w>", "co", "a", "t", "s</w>", ",</w>", "hat</w>", "'s</w>", "4</w>", "2</w>"]
    assert row[: len(expected) + 2].tolist() == [
        tokenizer.sot_id, *(entries.index(piece) for piece in expected), tokenizer.eot_id,
    ]  # fmt: skip
    assert row.shape == (77,) and not row[len(expected) + 2 :].any()
    assert tokenizer.words(row) == ["red", "co", "a", "t", "s", ",", "hat", "'s", "4", "2"]
    marked = tokenizer(["at!! hat"])  # a "!" within a word is id 0, as padding is
    assert marked[0, 2] == 0 and tokenizer.words(marked[0]) == ["at", "!", "!", "hat"]
    assert model.text_mask(marked).sum() == 6
    # The last merge makes no piece any more: its id is the mask's.
    assert entries[tokenizer.mask_id] == "jek</w>"
    assert tokenizer.words(tokenizer(["jek"])[0]) == ["je", "k"]
    row[1] = tokenizer.mask_id
    assert tokenizer.words(row)[0] == "[mask]"
    # A caption cannot end itself, or be taken for a mask.
    ids = tokenizer.encode("<|endoftext|> <|startoftext|> <|mask|>")
    assert not {tokenizer.eot_id, tokenizer.sot_id, tokenizer.mask_id} & set(ids)
    long = tokenizer(["hat " * 100])[0]
    assert len(long) == 77 and long[-1] == tokenizer.eot_id
    assert tokenizer.encode("man’s &amp;amp; “red”") == tokenizer.encode('man\'s & "red"')
    assert tokenizer.encode("é") == tokenizer.encode("e\u0301")


TEXTS = [
    *CAPTIONS, "", " ", "shoes!!! (red) hats; 3rd coat's", "naïve café 北京", "we're\tin\n\nit", "a-b_c 12.5 x²",
]  # fmt: skip


def test_ids_are_the_same_from_every_source(tmp_path: Path, openai: OpenAICLIP) -> None:
    """And those of transformers, but for the last merge."""
    gz, folder, new = (tmp_path / name for name in ("gz", "folder", "new"))
    gz.mkdir(), new.mkdir()
    openai_clip.write_openai_vocabulary(gz)
    openai_clip.write_hugging_face_vocabulary(folder)
    theirs = transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    theirs.save_pretrained(new)
    for name in ("vocab.json", "merges.txt"):
        (new / name).unlink(missing_ok=True)
    assert (new / "tokenizer.json").is_file()
    file = saved(state(openai), tmp_path / "a.pt")
    found = [load_clip(file, [], image_size=NATIVE, tokenizer=place).tokenizer for place in (gz, folder, new)]
    assert [tokenizer.mask_id for tokenizer in found] == [VOCAB_SIZE - 3] * 3
    for text in TEXTS:
        first, *others = (tokenizer.encode(text) for tokenizer in found)
        assert others == [first, first]
        assert first == theirs(text, add_special_tokens=False)["input_ids"], text


def test_where_the_tokenizer_is_looked_for(tmp_path: Path, openai: OpenAICLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "clip" else None)
    weights, elsewhere, packages = (tmp_path / name for name in ("weights", "elsewhere", "packages"))
    for place in (weights, elsewhere, packages / "clip"):
        place.mkdir(parents=True)
    file = saved(state(openai), weights / "a.pt")
    monkeypatch.setattr("sys.path", [str(packages)])
    with pytest.raises(FileNotFoundError, match=r"vocab\.json .* open_clip nor clip is installed, .* as tokenizer"):
        load_clip(file, [], image_size=NATIVE)
    (packages / "clip" / "__init__.py").write_text("raise RuntimeError('imported')")
    installed = openai_clip.write_openai_vocabulary(packages / "clip")
    assert load_clip(file, [], image_size=NATIVE).report.tokenizer == str(installed)
    beside = openai_clip.write_openai_vocabulary(weights)
    assert load_clip(file, [], image_size=NATIVE).report.tokenizer == str(beside)
    given = openai_clip.write_openai_vocabulary(elsewhere)
    assert load_clip(file, [], image_size=NATIVE, tokenizer=given).report.tokenizer == str(given)
    with pytest.raises(FileNotFoundError, match=r"found none at .*nowhere"):
        load_clip(file, [], image_size=NATIVE, tokenizer=tmp_path / "nowhere")


def test_damaged_vocabularies_are_named(tmp_path: Path, openai: OpenAICLIP) -> None:
    file = saved(state(openai), tmp_path / "a.pt")
    folder = openai_clip.write_hugging_face_vocabulary(tmp_path / "words")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    missing = {piece: index for piece, index in vocabulary.items() if piece != "a"}
    swapped = {**vocabulary, "<|startoftext|>": VOCAB_SIZE - 1, "<|endoftext|>": VOCAB_SIZE - 2}
    renamed = {("?" * 3 if piece == "a" else piece): index for piece, index in vocabulary.items()}
    for content, message in (
        (missing, "each once"),
        (swapped, "must be the last two"),
        (renamed, "no id, the first is 'a'"),
    ):
        (folder / "vocab.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_clip(file, [], image_size=NATIVE, tokenizer=folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"merges\.txt: a merge must be of two pieces, got 'a b c'"):
        load_clip(file, [], image_size=NATIVE, tokenizer=folder)
    plain = written(tmp_path / "merges.gz", b"not compressed")
    with pytest.raises(ValueError, match=r"merges\.gz must be bpe_simple_vocab_16e6\.txt\.gz"):
        load_clip(file, [], image_size=NATIVE, tokenizer=plain)


# --------------------------------------------------------------------------------------------------- without weights


def test_random_weights_follow_from_the_seed_alone() -> None:
    states = []
    for seed, before in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(before)
        generator = torch.get_rng_state()
        model, tokenizer, report = load_clip(None, ["a red coat"], image_size=STRIP, tiny=True, seed=seed)
        assert torch.equal(generator, torch.get_rng_state())
        assert f"seed {seed}" in report.source and report.sha256 is None and "dry run" in str(report)
        states.append(model.state_dict())
    matrices = [name for name, tensor in states[0].items() if tensor.ndim > 1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in matrices)
    assert model.grid == (6, 2) and model.clip.vision_model.embeddings.position_embedding.weight.shape[0] == 13
    assert tokenizer.words(tokenizer(["a red hat"])[0]) == ["a", "red", "?"]


def test_a_tiny_model_has_no_weights_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny is a model with random weights, got weights too"):
        load_clip(tmp_path, [], tiny=True)


# ------------------------------------------------------------------------------------------------- files with an intent


def endless() -> dict[str, Any]:
    itself: dict[str, Any] = {}
    itself["again"] = itself
    return itself


def doubled() -> dict[str, Any]:
    content: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(20):
        content = {"a": content, "b": content}
    return content


HOSTILE: dict[str, tuple[Callable[[OpenAICLIP], dict[str, Any]], str]] = {
    "holds itself": (lambda m: {**state(m), "more": endless()}, "more than 100000 modules and tensors, or names"),
    "two of two of two": (lambda m: {**state(m), "more": doubled()}, "more than 100000 modules and tensors, or names"),
    "a huge number": (
        lambda m: {**state(m), "transformer.resblocks.99999999.ln_1.weight": torch.ones(64)},
        "transformer.resblocks must have blocks from 0 on, it has 3, one of them 99999999",
    ),
    "repeated numbers": (
        lambda m: changed(m, "visual.conv1.weight", torch.zeros(1).expand(64 << 20, 3, 16, 16)),
        "visual.conv1.weight must have its numbers stored one by one",
    ),
    "sparse": (lambda m: changed(m, "text_projection", torch.eye(64, 32).to_sparse()), "got sparse_coo"),
    "no numbers": (lambda m: changed(m, "text_projection", torch.ones(64, 32, device="meta")), "numbers, got none"),
    "a third": (
        lambda m: without(m, "visual.transformer.resblocks.0.attn.in_proj_bias"),
        "lacks 1 of the towers' tensors: visual.transformer.resblocks.0.attn.in_proj_bias; expected",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_state_dict_claims_is_not_built(what: str, openai: OpenAICLIP, folder: Path) -> None:
    write, message = HOSTILE[what]
    file = saved(write(openai), folder / "weights.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(file, [], image_size=NATIVE)
    assert str(file) in str(caught.value)


def test_modules_that_hold_themselves_are_refused(openai: OpenAICLIP, folder: Path) -> None:
    payload = b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x01\x00\x00\x00aq\x01h\x00ub."
    file = traced(openai, folder / "a.pt")
    bad = rewritten(file, folder / "b.pt", lambda name, data: payload if name.endswith("/data.pkl") else data)
    with pytest.raises(ValueError, match="names of more than 1000 letters"):
        load_clip(bad, [])


def test_nothing_in_a_zip_unfolds_to_more_than_the_file(openai: OpenAICLIP, folder: Path) -> None:
    for write, member in ((traced, "/byteorder"), (lambda m, p: saved(state(m), p), "/data/0")):
        source, packed = write(openai, folder / "a.pt"), folder / "packed.pt"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name.endswith(member) else None)
            if not any(name.endswith(member) for name in old.namelist()):  # older versions of torch write none
                new.writestr(f"a{member}", b"little", zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match=r"packed\.pt.*uncompressed"):
            load_clip(packed, [])


def test_a_damaged_state_dict_is_known_by_its_checksums(openai: OpenAICLIP, folder: Path) -> None:
    """torch does not look at them."""
    file = saved(state(openai), folder / "a.pt")
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        directory = archive.start_dir
    content = bytearray(file.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1  # of a number
    with pytest.raises(ValueError, match=rf"b\.pt is damaged, the checksum of {largest.filename} is wrong"):
        load_clip(written(folder / "b.pt", bytes(content)), [], image_size=NATIVE)
    content = bytearray(file.read_bytes())
    content[directory] ^= 1  # of the list of members
    with pytest.raises(ValueError, match=r"c\.pt is a damaged zip archive \(Bad magic number"):
        load_clip(written(folder / "c.pt", bytes(content)), [], image_size=NATIVE)
