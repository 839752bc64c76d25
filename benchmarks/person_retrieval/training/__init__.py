"""The training loop and what it is made of."""

from .objectives import Beginner, Trainee
from .optimizer import parameter_groups
from .recipe import Recipe
from .trainer import Trainer
from .world import World

__all__ = ["Beginner", "Recipe", "Trainee", "Trainer", "World", "parameter_groups"]
