"""CLIP and its tokenizer from the files in which others publish them, or with random weights.

Weights come from the disk, never from the network, and no code in them is run. Everything is on the CPU in float32.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from ..hashes import sha256
from .byte_pairs import CLIPWords, find_clip_words
from .clip import CLIP, TINY, VIT_B_16, patch_grid
from .clip_names import Towers, find_towers
from .filling import CONTEXT_LENGTH, fill_clip, hollow_clip
from .load_report import LoadReport, few
from .tokenizer import WordTokenizer
from .weight_files import EXPECTED, Contents, read_weights

__all__ = ["LoadReport", "Loaded", "load_clip"]

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ACTIVATIONS = ("quick_gelu", "gelu")


class Loaded(NamedTuple):
    model: CLIP
    tokenizer: CLIPWords | WordTokenizer
    report: LoadReport


def load_clip(
    weights: str | Path | None,
    captions: Iterable[str],
    *,
    image_size: tuple[int, int] = (384, 128),
    tiny: bool = False,
    tokenizer: str | Path | None = None,
    activation: str | None = None,
    seed: int = 1,
) -> Loaded:
    """CLIP, its tokenizer, and a report of what was loaded.

    Position embeddings of the image tower are resized here, once, to the grid of `image_size`: bilinearly, as IRRA
    does.

    Args:
        weights: OpenAI's ViT-B-16.pt (the TorchScript archive or a state dict), a folder or a file of Hugging Face or
            of open_clip, a checkpoint of IRRA, RDE, NAM, HAM, GA-DMS or FMFA: what it is, is seen from its content.
            None gives random weights that follow from `seed`, of ViT-B/16 or of a `tiny` model, with a tokenizer of
            the words of `captions`: enough to see that a run starts, saves and resumes.
        image_size: (height, width) in pixels, multiples of the patch size.
        tokenizer: a folder with vocab.json and merges.txt or with tokenizer.json, or bpe_simple_vocab_16e6.txt.gz.
            None looks for these beside the weights, then in an installed open_clip or clip.
        activation: "quick_gelu" or "gelu". None takes what the configuration beside the weights says, else
            "quick_gelu", with which OpenAI trained, and IRRA and its successors. LAION's need "gelu"; no tensor tells.

    Raises:
        FileNotFoundError: no such weights, or no tokenizer.
        ValueError: the file is damaged, no CLIP, lacks a part of it, or does not fit the tokenizer or `image_size`.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if weights is None:
        return _random(captions, image_size, tiny=tiny, activation=activation or "quick_gelu", seed=seed)
    if tiny:
        raise ValueError("tiny is a model with random weights, got weights too; leave out one of them")
    file = _weight_file(Path(weights))
    contents = read_weights(file)
    try:
        return _from_file(file, contents, image_size, tokenizer=tokenizer, activation=activation)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_file(
    file: Path,
    contents: Contents,
    image_size: tuple[int, int],
    *,
    tokenizer: str | Path | None,
    activation: str | None,
) -> Loaded:
    towers = _towers(contents)
    config, known = _config(file, contents, towers, activation)
    words = find_clip_words(file.parent, tokenizer)
    if words.vocab_size != config.text_config.vocab_size:
        raise ValueError(
            f"the text tower has {config.text_config.vocab_size} tokens, and its tokenizer, {words.source}, has "
            f"{words.vocab_size}; they must be of the same model"
        )
    config.text_config.bos_token_id, config.text_config.eos_token_id = words.sot_id, words.eot_id
    grid = patch_grid(image_size, config.vision_config.patch_size)
    model = hollow_clip(config, positions=1 + grid[0] * grid[1])
    found = fill_clip(model, contents, towers, grid)
    report = LoadReport(
        source=_source(contents, towers),
        architecture=_architecture(config),
        activation=f"{config.vision_config.hidden_act} ({known})",
        tokenizer=words.source,
        file=str(file),
        sha256=sha256(file),
        **found,
    )
    return Loaded(CLIP(model, eot_id=words.eot_id, image_size=image_size), words, report)


def _random(captions: Iterable[str], image_size: tuple[int, int], *, tiny: bool, activation: str, seed: int) -> Loaded:
    words = WordTokenizer(captions, context_length=CONTEXT_LENGTH)
    shape = TINY if tiny else VIT_B_16
    ids = {"bos_token_id": words.sot_id, "eos_token_id": words.eot_id, "pad_token_id": words.pad_id}
    text = {**shape["text_config"], "vocab_size": words.vocab_size, "max_position_embeddings": CONTEXT_LENGTH, **ids}
    vision = shape["vision_config"]
    config = CLIPConfig(
        text_config={**text, "hidden_act": activation},
        vision_config={**vision, "hidden_act": activation},
        projection_dim=shape["projection_dim"],
    )
    rows, columns = patch_grid(image_size, vision["patch_size"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        model = CLIPModel(config).float()
        positions = nn.Embedding(1 + rows * columns, vision["hidden_size"], dtype=torch.float32)
        nn.init.normal_(positions.weight, std=config.vision_config.initializer_range)
    model.vision_model.embeddings.position_embedding = positions
    report = LoadReport(
        source=f"random, of seed {seed}: a dry run",
        architecture=_architecture(config),
        activation=activation,
        tokenizer="words of the captions",
    )
    return Loaded(CLIP(model, eot_id=words.eot_id, image_size=image_size), words, report)


# ------------------------------------------------------------------------------------------------- what a file holds


def _weight_file(path: Path) -> Path:
    """The file itself, or that of a folder which Hugging Face's or open_clip's configuration makes one of a model."""
    if not path.is_dir():
        return path
    if not any((path / name).is_file() for name in ("config.json", "open_clip_config.json")):
        raise FileNotFoundError(f"a folder of weights must hold config.json, {path} does not; expected {EXPECTED}")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"a folder of weights must hold one of {', '.join(WEIGHT_FILES)}, {path} does not")


def _towers(contents: Contents) -> Towers:
    names = contents.tensors
    towers = find_towers(names)
    if towers is None:
        held = f"its {len(names)} tensors are {few(names)}" if names else "it holds no tensor with a name"
        raise ValueError(f"it holds no CLIP, {held}; expected {EXPECTED}")
    if f"{towers.prefix}visual.layer1.0.conv1.weight" in names:
        raise ValueError(f"it holds a CLIP whose image tower is a ResNet; expected a vision transformer: {EXPECTED}")
    return towers


def _source(contents: Contents, towers: Towers) -> str:
    names = "OpenAI's and open_clip's" if towers.naming == "OpenAI" else "Hugging Face's"
    family = ""
    if "base_model" in towers.prefix.split("."):
        rde = any("visul_emb_layer" in name.split(".") for name in contents.tensors)
        family = ", as RDE saves it" if rde else ", as IRRA and its successors save it"
    return f"{contents.container} with {names} names" + (f" under '{towers.prefix}'" if towers.prefix else "") + family


def _config(file: Path, contents: Contents, towers: Towers, activation: str | None) -> tuple[CLIPConfig, str]:
    """Of the model in the file, and where its activation is known from."""
    if towers.naming == "Hugging Face" and (file.parent / "config.json").is_file():
        saved = _json(file.parent / "config.json")
        if saved.get("model_type") != "clip":
            raise ValueError(f"config.json must be of model_type 'clip', got {saved.get('model_type')!r}")
        try:
            config = CLIPConfig.from_dict(saved)
        except Exception as error:  # newer versions of transformers have an exception of their own
            raise ValueError(f"config.json must describe a CLIPModel: {' '.join(str(error).split())}") from error
        acts = {config.text_config.hidden_act, config.vision_config.hidden_act}
        if activation and acts != {activation}:
            raise ValueError(f"activation {activation!r} was asked for, and its config.json says {' and '.join(acts)}")
        known = "config.json"
    else:
        known = "as asked for" if activation else "assumed: tensors do not tell"
        opened = file.parent / "open_clip_config.json"
        if not activation and towers.naming == "OpenAI" and opened.is_file():
            activation = "quick_gelu" if _json(opened).get("model_cfg", {}).get("quick_gelu") else "gelu"
            known = opened.name
        config = _config_of_shapes(contents, towers, activation or "quick_gelu")
    if config.text_config.max_position_embeddings != CONTEXT_LENGTH:
        raise ValueError(
            f"captions have {CONTEXT_LENGTH} tokens, and the text tower has position embeddings for "
            f"{config.text_config.max_position_embeddings}; weights with {CONTEXT_LENGTH} are needed"
        )
    return config, known


def _json(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be JSON, got {error}") from error
    return saved if isinstance(saved, dict) else {}


def _config_of_shapes(contents: Contents, towers: Towers, activation: str) -> CLIPConfig:
    """What the shapes tell; attention heads are 64 wide, in all of OpenAI's models."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        piece = towers.piece(name)
        stored = contents.tensors.get(piece.source)
        if stored is None:
            raise ValueError(f"a CLIP must have both towers, {piece.source} is missing; expected {EXPECTED}")
        if len(stored.shape) != dimensions:
            raise ValueError(f"{piece.source} must have {dimensions} dimensions, got shape {stored.shape}")
        return piece.shape(stored)

    def tower(name: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise ValueError(f"without a config.json attention heads are 64 wide, and the {name} tower is {width} wide")
        return {
            "hidden_size": width,
            "intermediate_size": shape(f"{name}_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": towers.blocks(name, contents.tensors),
            "num_attention_heads": width // 64,
            "hidden_act": activation,
        }

    vocab_size, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    vision_width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions = shape("text_model.embeddings.position_embedding.weight", 2)[0]
    return CLIPConfig(
        text_config={**tower("text", text_width), "vocab_size": vocab_size, "max_position_embeddings": positions},
        vision_config={**tower("vision", vision_width), "patch_size": patch, "image_size": 224},
        projection_dim=shape("visual_projection.weight", 2)[0],
    )


def _architecture(config: CLIPConfig) -> str:
    text, vision = config.text_config, config.vision_config
    towers = [
        f"{name} {part.num_hidden_layers} blocks of {part.hidden_size}"
        for name, part in (("image", vision), ("text", text))
    ]
    return f"ViT with patches of {vision.patch_size}; {', '.join(towers)}; joint space {config.projection_dim}"
