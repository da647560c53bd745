"""Finds and reads recipes, and applies KEY=VALUE overrides from the command line.

Knows no setting: a recipe's keys are checked when its stage runs.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .recipe import suggest


def recipes() -> dict[str, Path]:
    """The recipes of the package: name, such as `smollm2/distill`, -> file."""
    package = Path(importlib.util.find_spec("modeling_vikdf").origin).parent
    # A wheel has configs/ inside the package; a checkout, also an editable install, beside it.
    folder = next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in files.items() if name != "study" and not name.startswith("accelerate/")}


def find_recipe(name: str) -> Path:
    """
    The file of a recipe.

    Args:
        name: a file, if it exists; otherwise the name of one of [`recipes`].

    Raises:
        FileNotFoundError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        raise FileNotFoundError(
            f"There is no recipe {name!r}: neither a file nor one of the package's ({', '.join(known)})"
            f"{suggest([name], known)}"
        )
    return known[name]


def read_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """
    Reads a recipe and applies overrides.

    Args:
        name: see [`find_recipe`].
        overrides: `section.key=value`, or `key=value` for the section `training`; values are YAML.

    Returns:
        Section -> its settings, unchecked.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if the file is not a recipe, or an override is malformed.
    """
    try:
        recipe = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name} is not a recipe: expected a YAML mapping with sections such as model and data.")
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator:
            raise ValueError(f"Expected section.key=value, or key=value for training, got {override!r}.")
        section, _, key = key.rpartition(".")
        section = section or "training"
        settings = recipe.get(section) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"The section {section!r} must hold settings (key: value), not {settings!r}.")
        recipe[section] = {**settings, key: yaml.safe_load(value)}
    return recipe


__all__ = ["find_recipe", "read_recipe", "recipes"]
