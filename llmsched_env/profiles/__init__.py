"""Cost profiles: how long an iteration takes with a model on GPUs, and how much KV cache there is.

>>> get("a100-llama3-8b").form
'hinge'
"""

from __future__ import annotations

from pathlib import Path

from llmsched_env.errors import unknown
from llmsched_env.profiles import roofline
from llmsched_env.profiles.profile import Profile, load, save

__all__ = ["Profile", "get", "load", "names", "save"]

_DATA = Path(__file__).with_name("data")


def names() -> list[str]:
    """The names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in _DATA.glob("*.json"))


def get(name: str | Path | Profile) -> Profile:
    """A profile by name: one of `names()`, the path of a JSON file, or `roofline:SHAPE@GPU[:tpN]`.

    `roofline:llama-3-8b@h100:tp2` is analytic: see `profiles.roofline` for its shapes and GPUs.

    Raises:
        InputError: an unknown name, with the nearest known one, or a bad file.
    """
    if isinstance(name, Profile):
        return name
    if str(name).startswith("roofline:"):
        return roofline.parse(str(name))
    known = names()
    if str(name) in known:
        return load(_DATA / f"{name}.json")
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return load(path)
    raise unknown("profile", name, [*known, "roofline:llama-3-8b@h100", "a file's path"])
