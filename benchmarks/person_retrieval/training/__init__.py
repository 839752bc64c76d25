"""The training loop and what it is made of."""

from .checkpoint import load, save
from .log import EpochReport, Log
from .objectives import Contrastive, Trainee
from .optimizer import describe_groups, make_optimizer, parameter_groups
from .pace import affordable_epochs, measure_pace
from .precision import Precision
from .recipe import Recipe
from .run_folder import RunFolder, holds_run
from .schedule import LRSchedule
from .settings import differences, plain, settings_of
from .trainer import Trainer
from .world import World

__all__ = [
    "Contrastive",
    "EpochReport",
    "LRSchedule",
    "Log",
    "Precision",
    "Recipe",
    "RunFolder",
    "Trainee",
    "Trainer",
    "World",
    "affordable_epochs",
    "describe_groups",
    "differences",
    "holds_run",
    "load",
    "make_optimizer",
    "measure_pace",
    "parameter_groups",
    "plain",
    "save",
    "settings_of",
]
