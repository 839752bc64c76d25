"""The blocks of docs/recipes: found, applied to text as a patch, loaded as a codebase's module."""

import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

from . import codebases

__all__ = ["RECIPES", "apply", "blocks", "load", "run_recipe"]

RECIPES = Path(__file__).parents[2] / "docs/recipes"


def blocks(recipe, language):
    """Fenced blocks of a recipe: {label or running number: text}."""
    found = re.findall(rf"```{language}(?: (\S+))?\n(.*?)```", (RECIPES / f"{recipe}.md").read_text(), re.S)
    return {label or str(number): text for number, (label, text) in enumerate(found)}


def apply(diff, source):
    """The source after the diff; a removed or context line must be there exactly once, `...` stands for anything."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = [line for line in hunk.splitlines() if line]
        there = [line[1:].rstrip() for line in lines if line[0] in " -"]
        pattern = "\n".join(r"[\s\S]*?".join(map(re.escape, line.split("..."))) for line in there)
        matches = list(re.finditer(rf"^{pattern}[ ]*$", source, re.M))
        assert len(matches) == 1, f"{len(matches)} places for the hunk\n{hunk}"
        kept = [line[1:] for line in lines if line[0] in " +"]
        source = source[: matches[0].start()] + "\n".join(kept) + source[matches[0].end() :]
    return source


def load(monkeypatch, source):
    """The names that a codebase's module defines; its own `model` package has nothing left to call."""
    package = types.ModuleType("model")
    package.objectives = SimpleNamespace()
    loss = types.ModuleType("model.loss")
    loss.compute_simclr_loss = None
    monkeypatch.setitem(sys.modules, "model", package)
    monkeypatch.setitem(sys.modules, "model.loss", loss)
    layers = types.ModuleType("model.CrossEmbeddingLayer_tse")
    exec(compile(codebases.RDE_LAYERS, "model/CrossEmbeddingLayer_tse.py", "exec"), layers.__dict__)
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    for name, value in (("misc.utils.is_using_distributed", lambda: False), ("utils.metrics.Evaluator", None)):
        folder, file, attribute = name.split(".")
        module = types.ModuleType(f"{folder}.{file}")
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, folder, types.ModuleType(folder))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = {"__name__": "model.build", "__package__": "model"}
    exec(compile(source, "model/build.py", "exec"), namespace)
    return SimpleNamespace(**namespace)


def run_recipe(recipe, **namespace):
    """All Python blocks of a recipe, one after the other; returns what they defined."""
    for number, text in blocks(recipe, "python").items():
        exec(compile(text, f"docs/recipes/{recipe}.md, block {number}", "exec"), namespace)
    return SimpleNamespace(**namespace)
