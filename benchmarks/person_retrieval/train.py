"""The training loop: four objectives, Adam, warm-up and cosine, checkpoints that resume, one process or many.

A run is a function of its settings: order, augmentation and masks follow from (seed, epoch), so that a run that was
stopped and resumed ends with the same weights as one that was not, bit for bit on a CPU.

The number of processes is no such setting. W of them with batches of b train as one with batches of W b, up to the
order of sums: each reads its slice of those batches, objectives and batch normalisation see all of them, and gradients
are averaged.
"""

import gc
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fmfa_losses import FMFALoss, FMFAOutput, mask_tokens
from fmfa_losses.distributed.handshake import handshake
from fmfa_losses.distributed.peers import Peers
from fmfa_losses.functional import hard_similarity

from .datasets import Batches, IdentitySampler, Pairs, RandomSampler

__all__ = ["Beginner", "Recipe", "Trainee", "Trainer", "World", "parameter_groups"]

FAST_PARTS = ("cross", "classifier", "mlm_head")  # modules that start from nothing learn five times as fast


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's."""

    epochs: int = 60
    batch_size: int = 64  # of one process
    gather: bool | str = True  # of the objectives, where there is more than one process
    lr: float = 1e-5
    fast_factor: float = 5.0
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.1
    final_factor: float = 0.0
    weight_decay: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    sampler: str = "random"
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class World:
    """The processes of this run. Under torchrun: one a device, NCCL on GPUs and Gloo on CPUs."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, device: str | None) -> "World":
        """Joins the process group that torchrun announced, or stays alone."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "RANK" not in os.environ:
            return cls(device=torch.device(kind))
        if kind.startswith("cuda"):
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(kind))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, recipe: Recipe) -> bool | str:
        """What the objectives are given; one process has nobody to gather from."""
        return recipe.gather if self.size > 1 else False

    def leave(self) -> None:
        """Leaves together: whoever tears the group down while another process still talks may be aborted."""
        if self.size > 1:
            gc.collect()  # trainers stand in reference cycles, and hold on to the group
            dist.barrier()
            dist.destroy_process_group()


class Trainee(nn.Module):
    """Model and objective as one module, so that one forward under DDP sees every parameter."""

    title = "FMFA"

    def __init__(self, model: nn.Module, objective: FMFALoss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, pixels: Tensor, token_ids: Tensor, masked_ids: Tensor, labels: Tensor, pids: Tensor
    ) -> FMFAOutput:
        image_features, image_tokens = self.model.encode_image(pixels)
        # Captions and masked captions share one pass through the text stream.
        features, tokens = self.model.encode_text(torch.cat([token_ids, masked_ids]))
        text_features, _ = features.chunk(2)
        text_tokens, masked_tokens = tokens.chunk(2)
        return self.objective(
            image_features,
            text_features,
            image_tokens,
            text_tokens,
            pids,
            masked_text_tokens=masked_tokens,
            masked_labels=labels,
            text_mask=self.model.text_mask(token_ids),
        )


class Beginner(nn.Module):
    """The model alone with contrastive losses: what the objectives of FMFA expect to have happened before.

    A-SDM is a reverse KL divergence. From fresh weights its nearest minimum is a model that finds everything alike; it
    sharpens an alignment, it does not begin one. The paper starts from CLIP, the rendered pedestrians start from here:
    CLIP's loss on the global features, and FILIP's (arXiv 2111.07783) on tokens, where each word picks its best patch.

    Args:
        gather: False contrasts within this process's batch; True and "ring" do so with the images, captions and patches
            of all processes, gathered either way: this model's patches are few.
    """

    title = "contrastive beginning"

    def __init__(self, model: nn.Module, temperature: float = 0.07, *, gather: bool | str = False) -> None:
        super().__init__()
        self.model, self.temperature, self.gather = model, temperature, gather

    def forward(
        self, pixels: Tensor, token_ids: Tensor, masked_ids: Tensor, labels: Tensor, pids: Tensor
    ) -> FMFAOutput:
        image, patches = self.model.encode_image(pixels)
        text, words = self.model.encode_text(token_ids)
        keep = self.model.text_mask(token_ids)
        peers, _ = handshake(self.gather, None, {"image": image, "patches": patches})
        similarity = F.normalize(text, dim=1) @ peers.gather(F.normalize(image, dim=1)).T  # own rows, [b, B]
        token_similarity = hard_similarity(words, peers.gather(patches), x_mask=keep, pool="mean")
        terms = {
            "contrastive": self._contrast(similarity, peers),
            "token_contrastive": self._contrast(token_similarity, peers),
        }
        return FMFAOutput(torch.stack(list(terms.values())).sum(), terms, {})

    def _contrast(self, similarity: Tensor, peers: Peers) -> Tensor:
        """Cross-entropy of the own pairs on the diagonal of [B, B], own rows of which are given, both ways."""
        pairs = peers.offset + torch.arange(len(similarity), device=similarity.device)
        both = [similarity / self.temperature, peers.transpose(similarity) / self.temperature]
        return peers.mean(
            torch.stack([F.cross_entropy(logits, pairs, reduction="none") for logits in both]).mean(dim=0)
        )


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters that start from nothing, told by their name, at `fast_factor` times the learning rate."""
    slow, fast = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (fast if any(part in name for part in FAST_PARTS) else slow).append(parameter)
    groups = [{"params": slow, "lr": recipe.lr}, {"params": fast, "lr": recipe.lr * recipe.fast_factor}]
    return [group for group in groups if group["params"]]


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
