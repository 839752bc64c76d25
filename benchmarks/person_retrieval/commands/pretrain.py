"""`pretrain`: the small two-stream model on rendered pictures in general, contrastively; the weights that training on
rendered pedestrians starts from.

What CLIP is to the paper. The pictures show other people than the street does, each once, in better light, wearing
other things, beside lines in another style; the losses are CLIP's on global features and FILIP's on tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from ..data import Augmentation, Pairs, catalogue_split
from ..hashes import sha256
from ..models import TwoStream
from ..models.pretrained import tokenizer_of
from ..options import add_recipe, add_run, check_recipe_applies, command_of, parser_of, positive, recipe_of
from ..pedestrians import vocabulary
from ..task import RENDERED_SIZE, progress_bar
from ..training import Contrastive, Log, Recipe, RunFolder, Trainer, World, save, settings_of

__all__ = ["main"]

SEED = 7  # of the pictures
WIDTH, HEADS = 96, 3
RECIPE = Recipe(
    epochs=8,
    batch_size=128,
    lr=2e-3,
    bias_lr_factor=1.0,
    eps=1e-8,
    warmup_epochs=0.5,
    lr_per="step",
    clip_norm=1.0,
    erase=0.25,
)
DEFAULTS = (
    f"Defaults of the recipe that differ here: {RECIPE.epochs} epochs, batches of {RECIPE.batch_size}, "
    f"--lr {RECIPE.lr:g}, --bias-lr-factor {RECIPE.bias_lr_factor:g}, --eps {RECIPE.eps:g}, "
    f"--warmup-epochs {RECIPE.warmup_epochs:g}, --lr-per {RECIPE.lr_per}, "
    f"--clip-norm {RECIPE.clip_norm:g}, --erase {RECIPE.erase:g}."
)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("pretrain", __doc__, epilog=DEFAULTS)
    parser.add_argument("--pictures", type=positive, default=36000, help="default: %(default)s")
    add_recipe(parser)
    add_run(parser, "runs/pretrain", select=False)
    args = parser.parse_args(argv)
    check_recipe_applies(args)
    args.command = command_of("pretrain", argv)
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    world = World.join(args.device)
    recipe = recipe_of(args, RECIPE)
    words = vocabulary()
    tokenizer = tokenizer_of(words)
    split = catalogue_split(args.pictures, size=RENDERED_SIZE, seed=SEED, progress=progress_bar(args, world))
    pairs = Pairs(
        split, tokenizer(split.captions), size=RENDERED_SIZE, seed=recipe.seed, keep=True,
        augmentation=Augmentation(flip=recipe.flip, pad=recipe.pad, erase=recipe.erase),
    )  # fmt: skip
    settings = settings_of(recipe, world, pictures=args.pictures, seed_of_pictures=SEED)
    options = {"resume": args.resume, "overwrite": args.overwrite, "leads": world.leads, "command": args.command}
    with RunFolder(args.out, settings, **options) as folder:
        log = Log(folder.path, quiet=args.quiet, tensorboard=args.tensorboard, leads=world.leads)
        torch.manual_seed(recipe.seed)
        shape = {"width": WIDTH, "heads": HEADS, "context_length": tokenizer.context_length}
        model = TwoStream(tokenizer.vocab_size, image_size=RENDERED_SIZE, **shape)
        trainer = Trainer(
            Contrastive(model, gather=world.gather(recipe)), pairs, recipe, world=world, folder=folder, log=log,
            tokens={"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids},
        )  # fmt: skip
        if args.overwrite and world.leads:
            for file in folder.path.glob("epoch_*.pt"):
                file.unlink()
        trainer.resume()
        if trainer.epoch and not weights_file(folder, trainer).exists():
            keep(folder, trainer, log, words, settings)  # the run may have ended between the two files
        while trainer.epoch < trainer.epochs:
            trainer.fit(until=trainer.epoch + 1)
            keep(folder, trainer, log, words, settings)
    world.leave()
    return 0


def weights_file(folder: RunFolder, trainer: Trainer) -> Path:
    return folder.path / f"epoch_{trainer.epoch}.pt"


def keep(folder: RunFolder, trainer: Trainer, log: Log, words: list[str], settings: dict[str, Any]) -> None:
    """Writes the weights of the epoch that was done, beside the run's checkpoint."""
    if not folder.leads:
        return
    file = weights_file(folder, trainer)
    save(file, content(trainer.trainee.model, words, {"epoch": trainer.epoch, **settings}))
    log.say(f"{file}  {file.stat().st_size / 2**20:.2f} MiB  sha256 {sha256(file)}")


def content(model: TwoStream, words: list[str], made: dict[str, Any]) -> dict[str, Any]:
    """What `load_two_stream` reads: weights in half precision, and how they were made."""
    state = {
        name: x.detach().cpu().half() if x.is_floating_point() else x.cpu() for name, x in model.state_dict().items()
    }
    return {"width": WIDTH, "heads": HEADS, "vocabulary": words, "made": made, "model": state}
