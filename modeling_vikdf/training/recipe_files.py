"""Where the files of recipes are, and how settings on the command line change them.

Knows no setting: what a recipe may say is checked when its stage runs.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .trainer import _suggest


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: `smollm2/distill`."""
    package = Path(importlib.util.find_spec("modeling_vikdf").origin).parent
    # A wheel holds configs/ inside the package; in a checkout, also one that is installed editable, it is beside it.
    folder = next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if name != "study" and not name.startswith("accelerate/")}


def find_recipe(name: str) -> Path:
    """
    The file of a recipe.

    Args:
        name: a file, which is taken if it is there; or what one of [`recipes`] is called.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        raise FileNotFoundError(
            f"There is no recipe {name!r}, neither a file nor among the package's ({', '.join(known)})"
            f"{_suggest([name], known)}"
        )
    return known[name]


def read_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """
    A recipe, with settings in place of its own.

    Args:
        name: see [`find_recipe`].
        overrides: `section.key=value` each, or `key=value` for the section `training`.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if it is none, or an override cannot be one.
    """
    try:
        recipe = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no recipe: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name} is no recipe: expected a YAML mapping with sections such as model and data.")
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator:
            raise ValueError(f"{override!r} is no override: expected section.key=value, or key=value for training.")
        section, _, key = key.rpartition(".")
        section = section or "training"
        settings = recipe.get(section) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"The section {section!r} must hold settings (key: value), not {settings!r}.")
        recipe[section] = {**settings, key: yaml.safe_load(value)}
    return recipe


__all__ = ["find_recipe", "read_recipe", "recipes"]
