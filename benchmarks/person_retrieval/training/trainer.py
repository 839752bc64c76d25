"""The training loop: any objectives, IRRA's optimizer and schedule, checkpoints that resume, one process or many.

A run is a function of its settings: order, augmentation and masks follow from (seed, epoch), so that a run that was
stopped and resumed ends with the same weights as one that was not, bit for bit on a CPU.

The number of processes is no such setting. W of them with batches of b train as one with batches of W b, up to the
order of sums: each reads its slice of those batches, objectives and batch normalisation see all of them, and gradients
are averaged.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from fmfa_losses import FMFAOutput, mask_tokens

from ..data import Batches, IdentitySampler, Pairs, RandomSampler
from ..errors import RunError
from . import checkpoint
from .info_nce import InfoNCE
from .log import EpochReport, Log
from .objectives import Contrastive, Trainee
from .optimizer import describe_groups, make_optimizer
from .precision import Precision
from .recipe import Recipe
from .run_folder import RunFolder
from .schedule import LRSchedule
from .world import World

__all__ = ["Trainer"]

STATE = ("run", "epoch", "trainee", "optimizer", "scaler", "history", "validations", "best", "rng")


class Trainer:
    """Trains `trainee` on `pairs`; keeps every term and accuracy of every step in `history`.

    Args:
        tokens: mask_id and special_ids of the tokenizer.
        folder: keeps checkpoints, the best epoch's weights and the number of epochs; None keeps none.
        validate: called with the model after every epoch, on the leading process while the others wait; returns figures
            in percent, "R1" among them. The epoch with the highest R1, the earliest of equals, is the selected one.
        selected: what `validate` reads, "val" or "test", for the log; "last" without it.
        log: silent bars and lines on stdout, unless given.

    Attributes:
        history: every term and accuracy, by step. With more than one process, means over them.
        validations: {"epoch": n, "R1": ..., ...} of every epoch; `best` is the selected one of them.
    """

    def __init__(
        self,
        trainee: Trainee | Contrastive | InfoNCE,
        pairs: Pairs,
        recipe: Recipe,
        *,
        tokens: dict[str, Any],
        world: World | None = None,
        folder: RunFolder | None = None,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
        selected: str = "last",
        log: Log | None = None,
    ) -> None:
        if (validate is None) != (selected == "last"):
            raise ValueError(f"selected must be 'last' without validate, a split's name with it, got {selected!r}")
        self.world = world or World()
        self.precision = Precision(recipe.precision, self.world.device)
        self.trainee = trainee.to(self.world.device, self.precision.weights)
        self.pairs, self.recipe, self.tokens, self.folder = pairs, recipe, tokens, folder
        self.validate, self.selected = validate, selected
        self.log = log or Log(leads=self.world.leads)
        self.epochs, self.epoch = folder.epochs if folder else recipe.epochs, 0
        self.history: dict[str, list[float]] = {}
        self.validations: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.optimizer = make_optimizer(self.trainee, recipe)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scaler = self.precision.scaler()
        self.module: nn.Module = self.trainee
        if self.world.size > 1:
            # Heads of the model that no term uses get no gradient, which DDP takes where that never changes.
            self.module = DistributedDataParallel(self.trainee, static_graph=not self.trainee.uses_tokens)
        self.batches = self._batches()
        self.loader = DataLoader(
            self.pairs,
            batch_sampler=self.batches,
            num_workers=recipe.workers,
            pin_memory=self.world.device.type == "cuda",
        )
        self._best_weights: dict[str, Tensor] | None = None  # where there is no folder

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def fit(self, *, until: int | None = None) -> None:
        """Trains to the last epoch, or stops after epoch `until`.

        Raises:
            RunError: a loss that is no number, a checkpoint that could not be written. The last checkpoint stands.
        """
        last = self.epochs if until is None else min(until, self.epochs)
        self.log.begin(self.epoch)
        if self.epoch == 0:
            for line in describe_groups(self.optimizer):
                self.log.say(line)
        with self.log.bar((last - self.epoch) * self.steps_per_epoch) as bar, closing(self.log):
            while self.epoch < last:
                start = time.perf_counter()
                steps = self._train_epoch(bar)
                self._check_finite(steps)
                seconds = time.perf_counter() - start
                for name, values in steps.items():
                    self.history.setdefault(name, []).extend(values)
                self.epoch += 1
                self._validate()
                self.log.epoch(self._report(steps, seconds))
                self._save()

    def select(self) -> int:
        """Puts the weights of the selected epoch into the model of the leading process, after training.

        Returns:
            The epoch, counted from 1: the best, or the last where nothing was validated.
        """
        if self.best is None:
            return self.epoch
        if self.world.leads:
            weights = self._best_weights
            if self.folder is not None:
                weights = checkpoint.load(self.folder.best, keys=("model",))["model"]
            assert weights is not None
            self.trainee.model.load_state_dict(weights)
        return int(self.best["epoch"])

    # ------------------------------------------------------------------------------------------------------ a step

    def steps(self, epoch: int) -> Iterator[FMFAOutput]:
        """Trains one epoch, counted from 0, a step each time the next output is asked for."""
        self.module.train()
        self.pairs.epoch = epoch
        self.batches.set_epoch(epoch)
        schedule = LRSchedule(self.epochs, self.recipe)
        # Drawn for all captions at once, so that the mask of a caption does not depend on the batch it is in.
        generator = torch.Generator().manual_seed(self.recipe.seed * 1009 + epoch)
        masked_ids, labels = mask_tokens(self.pairs.token_ids, generator=generator, **self.tokens)
        for step, batch in enumerate(self.loader):
            factor = schedule(epoch + step / self.steps_per_epoch)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            yield self._step(batch, masked_ids[batch["index"]], labels[batch["index"]])

    def _train_epoch(self, bar: "tqdm[Any]") -> dict[str, list[float]]:
        """Every term at every step, the mean over the processes."""
        steps: list[dict[str, Tensor]] = []
        for out in self.steps(self.epoch):
            steps.append(
                {name: value.detach() for name, value in {"loss": out.loss, **out.terms, **out.metrics}.items()}
            )
            bar.update()
            if not bar.disable and len(steps) % 10 == 0:  # reading the loss waits for the device
                loss = float(out.loss.detach())
                bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}  loss {loss:.3f}", refresh=False)
        return {name: self._mean(torch.stack([step[name] for step in steps])) for name in steps[0]}

    def _step(self, batch: dict[str, Tensor], masked_ids: Tensor, labels: Tensor) -> FMFAOutput:
        device = self.world.device
        inputs = [batch["pixels"], batch["token_ids"], masked_ids]
        pixels, token_ids, masked_ids = (tensor.to(device, non_blocking=True) for tensor in inputs)
        with self.precision.autocast():
            # The labels stay on the host, which then knows how many words are masked without asking the device.
            out: FMFAOutput = self.module(pixels, token_ids, masked_ids, labels, batch["pids"].to(device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss).backward()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return out

    def _batches(self) -> Batches:
        recipe, world = self.recipe, self.world
        sampler: Any = RandomSampler(len(self.pairs), seed=recipe.seed)
        if recipe.sampler == "identity":
            pids = self.pairs.split.caption_pids
            sampler = IdentitySampler(pids, per_identity=recipe.per_identity, seed=recipe.seed)
            if not len(sampler):
                raise RunError(
                    f"--per-identity must be at most the captions of an identity, got {recipe.per_identity}, which no "
                    "identity has; give fewer, or --sampler random"
                )
        try:
            return Batches(sampler, recipe.batch_size, rank=world.rank, world_size=world.size)
        except ValueError as error:
            raise RunError(str(error)) from error

    def _mean(self, values: Tensor) -> list[float]:
        """Over the processes."""
        values = values.double().to(self.world.device)
        if self.world.size > 1:
            dist.all_reduce(values)
        return (values / self.world.size).tolist()

    # ---------------------------------------------------------------------------------------------- after an epoch

    def _check_finite(self, steps: dict[str, list[float]]) -> None:
        """Once an epoch: a look at every step would wait for the device each time."""
        terms = {name: values for name, values in steps.items() if not name.endswith("accuracy")}
        for step, values in enumerate(zip(*terms.values(), strict=True)):
            broken = {name: value for name, value in zip(terms, values, strict=True) if not math.isfinite(value)}
            if broken:
                named = ", ".join(f"{name} was {value}" for name, value in sorted(broken.items(), key=_terms_first))
                stands = f"the checkpoint of epoch {self.epoch} stands" if self.epoch else "no epoch was done"
                raise RunError(
                    f"every term must be finite, but {named} at step {step + 1} of {self.steps_per_epoch} of epoch "
                    f"{self.epoch + 1} (looked at after the epoch); {stands}; try a smaller --lr or --precision float32"
                )

    def _validate(self) -> None:
        """On the leading process, without touching the random numbers of training; all processes then know it."""
        if self.validate is None:
            return
        found: list[Any] = [None]
        if self.world.leads:
            devices = [self.world.device] if self.world.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.no_grad():
                found = [dict(self.validate(self.trainee.model.eval()))]
        if self.world.size > 1:
            dist.broadcast_object_list(found, src=0)
        entry = {"epoch": self.epoch, **{name: float(value) for name, value in found[0].items()}}
        self.validations.append(entry)
        if self.best is None or entry["R1"] > self.best["R1"]:
            self.best = entry
            if self.folder is None and self.world.leads:
                self._best_weights = {name: x.detach().clone() for name, x in self.trainee.model.state_dict().items()}

    def _report(self, steps: dict[str, list[float]], seconds: float) -> EpochReport:
        best = self.best
        return EpochReport(
            epoch=self.epoch,
            epochs=self.epochs,
            means={name: math.fsum(values) / len(values) for name, values in steps.items()},
            rates=[float(group["lr"]) for group in self.optimizer.param_groups],
            seconds=seconds,
            images=self.steps_per_epoch * self.batches.whole,
            validation=self.validations[-1] if best else None,
            best=(int(best["epoch"]), best["R1"]) if best else None,
            selected=self.selected,
        )

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        """First the checkpoint, then the best weights, which after a kill in between are in the checkpoint."""
        if self.folder is None or not self.world.leads:
            return
        before = f"nothing is lost, the checkpoint of epoch {self.epoch - 1} stands"
        state = {
            "run": self.folder.run,
            "epoch": self.epoch,
            "trainee": self.trainee.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "validations": self.validations,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }
        stands = before if self.epoch > 1 else "no earlier epoch was saved"
        checkpoint.save(self.folder.checkpoint, state, stands=stands)
        if self.best and self.best["epoch"] == self.epoch:
            self._save_best()

    def _save_best(self) -> None:
        assert self.folder is not None and self.best is not None
        state = {"run": self.folder.run, **self.best, "model": self.trainee.model.state_dict()}
        stands = f"nothing is lost, the checkpoint of epoch {self.epoch} stands"
        checkpoint.save(self.folder.best, state, stands=stands)

    def resume(self) -> None:
        """Continues from the folder's checkpoint; where there is none yet, from the beginning.

        Raises:
            RunError: a checkpoint that is broken or another run's; best weights that went missing.
        """
        if self.folder is None or not self.folder.resuming:
            return
        if not self.folder.checkpoint.exists():
            self.log.say("no checkpoint yet: from the beginning")
            return
        state = checkpoint.load(self.folder.checkpoint, keys=STATE)
        if state["run"] != self.folder.run:
            raise RunError(
                f"{self.folder.checkpoint} must be of the run in run.json beside it, got another run's; "
                "restore the file, or start anew with --overwrite"
            )
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.validations, self.best = state["validations"], state["best"]
        torch.set_rng_state(state["rng"])
        if self.world.leads:
            self._resume_best()
        self.log.begin(self.epoch)
        self.log.say(f"resumed after epoch {self.epoch} of {self.epochs}")
        for note in self.folder.notes:
            self.log.say(note)

    def _resume_best(self) -> None:
        assert self.folder is not None
        if self.best is None:
            return
        if self.best["epoch"] == self.epoch:
            self._save_best()  # the run may have ended between the two files
            return
        found = checkpoint.load(self.folder.best, keys=("run", "epoch"), mmap=True)
        if (found["run"], found["epoch"]) != (self.folder.run, self.best["epoch"]):
            raise RunError(
                f"{self.folder.best} must hold the weights of epoch {int(self.best['epoch'])} of this run, got others; "
                "restore the file, or start anew with --overwrite"
            )


def _terms_first(item: tuple[str, float]) -> tuple[bool, str]:
    return item[0] == "loss", item[0]
