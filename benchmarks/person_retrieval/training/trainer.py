"""The training loop: four objectives, Adam, warm-up and cosine, checkpoints that resume, one process or many.

A run is a function of its settings: order, augmentation and masks follow from (seed, epoch), so that a run that was
stopped and resumed ends with the same weights as one that was not, bit for bit on a CPU.

The number of processes is no such setting. W of them with batches of b train as one with batches of W b, up to the
order of sums: each reads its slice of those batches, objectives and batch normalisation see all of them, and gradients
are averaged.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fmfa_losses import FMFAOutput, mask_tokens

from ..data import Batches, IdentitySampler, Pairs, RandomSampler
from .objectives import Beginner, Trainee
from .optimizer import parameter_groups
from .recipe import Recipe
from .world import World

__all__ = ["Trainer"]


class Trainer:
    """Trains `trainee` on `pairs`, and keeps every term and accuracy of every step in `history`.

    Args:
        tokens: mask_id and special_ids of the tokenizer.
        checkpoint: file that holds the state after the latest epoch; None keeps none.
    """

    def __init__(
        self,
        trainee: Trainee | Beginner,
        pairs: Pairs,
        recipe: Recipe,
        *,
        tokens: dict[str, Any],
        world: World | None = None,
        checkpoint: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.world = world or World()
        self.trainee = trainee.to(self.world.device)
        self.pairs, self.recipe, self.tokens, self.checkpoint, self.quiet = pairs, recipe, tokens, checkpoint, quiet
        self.epochs, self.epoch = recipe.epochs, 0
        self.history: dict[str, list[float]] = {}
        self.optimizer = torch.optim.Adam(
            parameter_groups(self.trainee, recipe), betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.scaler = torch.amp.GradScaler(enabled=self.world.device.type == "cuda")
        self.module: nn.Module = self.trainee
        if self.world.size > 1:
            self.module = DistributedDataParallel(self.trainee)
        self.batches = self._batches()
        self.loader = DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            num_workers=recipe.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def fit(self, *, until: int | None = None, minutes: float | None = None) -> None:
        """Trains to the last epoch, or stops after epoch `until`.

        `minutes`: where the pace foretells a longer run, the schedule is shortened, aloud, and regains its length when
        the pace does.
        """
        start, first = time.perf_counter(), self.epoch
        last = self.epochs if until is None else min(until, self.epochs)
        bar = tqdm(total=(last - first) * self.steps_per_epoch, unit="step", disable=self.quiet or not self.world.leads)
        while self.epoch < last:
            for name, values in self._train_epoch(bar).items():
                self.history.setdefault(name, []).extend(values)
            self.epoch += 1
            if minutes is not None and self.epoch < last:
                pace = (time.perf_counter() - start) / (self.epoch - first)
                possible = max(self.epoch, min(self.recipe.epochs, first + int(minutes * 60 / pace)))
                if (possible := self._agree(possible)) != self.epochs:
                    self.epochs = last = possible
                    if self.world.leads:
                        bar.write(f"At this pace {last} of {self.recipe.epochs} epochs fit into {minutes:.1f} minutes.")
                    bar.total = (last - first) * self.steps_per_epoch
            self._save()
        bar.close()

    # ------------------------------------------------------------------------------------------------------ a step

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, list[float]]:
        """Every term at every step, the mean over the processes."""
        self.module.train()
        self.pairs.epoch = self.epoch
        self.batches.set_epoch(self.epoch)
        # Drawn for all captions at once, so that the mask of a caption does not depend on the batch it is in.
        generator = torch.Generator().manual_seed(self.recipe.seed * 1009 + self.epoch)
        masked_ids, labels = mask_tokens(self.pairs.token_ids, generator=generator, **self.tokens)
        steps: list[dict[str, Tensor]] = []
        for batch in self.loader:
            out = self._step(batch, masked_ids[batch["index"]], labels[batch["index"]])
            steps.append(
                {name: value.detach() for name, value in {"loss": out.loss, **out.terms, **out.metrics}.items()}
            )
            bar.update()
            if bar.n % 10 == 0:
                bar.set_description(
                    f"{self.trainee.title}  epoch {self.epoch + 1}/{self.epochs}  loss {float(out.loss.detach()):.3f}",
                    refresh=False,
                )
        return {name: self._mean(torch.stack([step[name] for step in steps])) for name in steps[0]}

    def _step(self, batch: dict[str, Tensor], masked_ids: Tensor, labels: Tensor) -> FMFAOutput:
        device = self.world.device
        inputs = [batch["pixels"], batch["token_ids"], masked_ids]
        pixels, token_ids, masked_ids = (tensor.to(device, non_blocking=True) for tensor in inputs)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            # The labels stay on the host, which then knows how many words are masked without asking the device.
            out: FMFAOutput = self.module(pixels, token_ids, masked_ids, labels, batch["pids"].to(device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss).backward()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return out

    def _factor(self, step: int) -> float:
        """Of the learning rate: linear warm-up, then a cosine down."""
        progress = step / len(self.loader) if hasattr(self, "loader") else 0.0
        warmup = min(self.recipe.warmup_epochs, self.epochs / 2)
        if progress < warmup:
            return self.recipe.warmup_factor + (1 - self.recipe.warmup_factor) * progress / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(self.epochs - warmup, 1e-9)))
        return self.recipe.final_factor + (1 - self.recipe.final_factor) * cosine

    def _batches(self) -> Batches:
        recipe, world = self.recipe, self.world
        if recipe.sampler == "identity":
            sampler: Any = IdentitySampler(self.pairs.split.caption_pids, seed=recipe.seed)
        else:
            sampler = RandomSampler(len(self.pairs), seed=recipe.seed)
        return Batches(sampler, recipe.batch_size, rank=world.rank, world_size=world.size)

    def _mean(self, values: Tensor) -> list[float]:
        """Over the processes."""
        values = values.double().to(self.world.device)
        if self.world.size > 1:
            dist.all_reduce(values)
        return (values / self.world.size).tolist()

    def _agree(self, epochs: int) -> int:
        """The fewest that any process proposes."""
        if self.world.size > 1:
            count = torch.tensor(epochs, device=self.world.device)
            dist.all_reduce(count, op=dist.ReduceOp.MIN)
            return int(count)
        return epochs

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _settings(self) -> dict[str, Any]:
        """The recipe as a resumed run must keep it, with as many processes or others."""
        settings = asdict(self.recipe)
        settings["batch_size of all processes"] = settings.pop("batch_size") * self.world.size
        return settings

    def _save(self) -> None:
        if self.checkpoint is None or not self.world.leads:
            return
        state = {
            "trainee": self.trainee.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "epochs": self.epochs,
            "history": self.history,
            "rng": torch.get_rng_state(),
            "recipe": self._settings(),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")  # a run killed while it writes keeps the previous state
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self, file: Path) -> None:
        """Continues from a checkpoint of a run with the same recipe."""
        if not file.is_file():
            raise FileNotFoundError(f"no checkpoint to resume from at {file}")
        state = torch.load(file, map_location=self.world.device, weights_only=True)
        ours, theirs = self._settings(), state["recipe"]
        differing = [name for name in ours if ours[name] != theirs.get(name) and name != "workers"]
        if differing:
            told = ", ".join(f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in differing)
            raise ValueError(f"a resumed run must keep its recipe, got another: {told}; start anew with another --out")
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.epochs, self.history = state["epoch"], state["epochs"], state["history"]
        torch.set_rng_state(state["rng"].cpu())
