"""Scenarios as YAML: every key and type is checked when read, and what is written reads back the same."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmsched_env import profiles, workloads
from llmsched_env.core.config import EngineConfig
from llmsched_env.errors import InputError, unknown
from llmsched_env.profiles import Profile
from llmsched_env.scenarios import reference
from llmsched_env.scenarios.reference import Reference
from llmsched_env.scenarios.scenario import Scenario
from llmsched_env.workloads import Lengths, RequestClass, Shuffled, Synthetic, Workload, arrivals, lengths
from llmsched_env.workloads import predictions as pred
from llmsched_env.workloads.lengths import Fixed, Rank

# What each mapping may hold, as annotations by key.
_SCENARIO = {
    "name": "str",
    "summary": "str",
    "source": "str",
    "profile": "str | dict",
    "engine": "dict",
    "horizon_s": "float",
    "optimum": "float | None",
    "references": "list | str",
    "workload": "dict",
}
_ENGINE = dict(EngineConfig.__annotations__)
_OPTIONS = {k: v for k, v in workloads.get.__annotations__.items() if k not in ("name", "other", "return")}
_TRACE = {**workloads.traces.read.__annotations__, **workloads.trace.__annotations__}
_TRACE = {k: v for k, v in _TRACE.items() if k not in ("path", "limit", "options", "return")}
_CLASS = {**RequestClass.__annotations__, "lengths": "str | dict"}
_LENGTHS = {"prompt": "str | int", "output": "str | int", "rank_correlation": "float"}
_SHUFFLED = {"prompt_tokens": "int", "seed": "int"}
_KINDS = {
    "name": {"name": "str", **_OPTIONS},
    "classes": {"classes": "list", **_OPTIONS},
    "trace": {"trace": "str", **_TRACE},
    "outputs": {"outputs": "list", **_SHUFFLED},
}
_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a text"),
    "list": (list, "a list"),
    "tuple": (list, "a list"),
    "dict": (dict, "a mapping"),
    "Mapping": (dict, "a mapping"),
    "None": (type(None), "null"),
}


def read(path: Path) -> Scenario:
    """The scenario in a file; see `scenarios.load`."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"scenario {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"scenario {path}: is not a text file") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"scenario {path}: is not YAML: {_one_line(error)}") from None
    try:
        return _scenario(data, path.stem, path.absolute().parent)
    except InputError as error:
        raise InputError(f"scenario {path}: {error}") from None


def write(scenario: Scenario) -> str:
    """The text from which `read` makes an equal scenario.

    Raises:
        InputError: if there is none.
    """
    data = _described(scenario)
    name = scenario.name
    again = _scenario(data, name, None)
    # What a workload is called matters to nobody, and a profile may go by its name.
    ours, theirs = (
        {**_fields(s), "profile": profiles.get(s.profile), "workload": {**_fields(s.workload), "name": name}}
        for s in (scenario, again)
    )
    if ours != theirs:
        raise InputError(f"scenario {name}: its parts cannot all be written as YAML; keep it in Python")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


# ---------------------------------------------------------------------- reading


def _scenario(data: Any, name: str, folder: Path | None) -> Scenario:
    check("the scenario", data, _SCENARIO)
    for key in ("workload", "profile"):
        if key not in data:
            raise InputError(f"lacks {key}")
    data = {"name": name, **data}
    check("engine", data.get("engine", {}), _ENGINE)
    data["engine"] = EngineConfig(**data.get("engine", {}))
    data["profile"] = read_profile(data["profile"], folder)
    data["workload"] = _workload(data["workload"], data["name"], folder)
    if "references" in data:
        data["references"] = _references(data["references"], folder)
    made = Scenario(**data)
    profiles.get(made.profile)  # complains of a name that there is not
    return made


def read_profile(data: Any, folder: Path | None) -> str | Profile:
    """A profile's name, or the profile that a mapping describes; paths are relative to `folder`."""
    if isinstance(data, str):
        return str(folder / data) if folder is not None and data.endswith(".json") else data
    fields = dataclasses.fields(Profile)
    check("profile", data, {field.name: str(field.type) for field in fields})
    for key in ("name", "form", "params"):
        if key not in data:
            raise InputError(f"profile lacks {key}")
    if data["form"] == "custom":
        raise InputError("a custom profile is a function and cannot come from a file; use Profile.custom")
    return Profile(**data)


def _references(data: list[Any] | str, folder: Path | None) -> tuple[Reference, ...]:
    if isinstance(data, str):
        return reference.load((folder or Path()) / data)
    return tuple(Reference.of(row) for row in data)


def _workload(data: dict[str, Any], name: str, folder: Path | None) -> Workload:
    kinds = [kind for kind in _KINDS if kind in data]
    if len(kinds) != 1:
        raise InputError(f"workload needs one of {', '.join(_KINDS)}; it has {' and '.join(kinds) or 'none'}")
    check("workload", data, _KINDS[kinds[0]])
    options = {k: v for k, v in data.items() if k != kinds[0]}
    value = data[kinds[0]]
    if kinds[0] == "name":
        return workloads.get(value, **options)
    if kinds[0] == "trace":
        if isinstance(options.get("window"), list):
            options["window"] = tuple(options["window"])
        return workloads.trace((folder or Path()) / value, **options)
    if kinds[0] == "outputs":
        for tokens in value:
            check("outputs", {"each": tokens}, {"each": "int"})
        return Shuffled(name, tuple(value), **options)
    classes = [each for one in value for each in _classes(one)]
    return Synthetic(name, tuple(classes)).replace(**options)


def _classes(data: Any) -> list[RequestClass]:
    """The class, or the classes of the workload that it names: their shares are parts of its share."""
    check("a class", data, _CLASS)
    if "lengths" not in data:
        raise InputError("a class lacks lengths")
    marks = {k: v for k, v in data.items() if k not in ("lengths", "share")}
    if isinstance(data["lengths"], str):
        named = workloads.get(data["lengths"]).classes
    else:
        check("lengths", data["lengths"], _LENGTHS)
        if not {"prompt", "output"} <= data["lengths"].keys():
            raise InputError("lengths lack prompt or output")
        prompt, output = (lengths.get(data["lengths"][side]) for side in ("prompt", "output"))
        tie = Rank(data["lengths"].get("rank_correlation", 0.0))
        named = (RequestClass(Lengths(prompt, output, tie)),)
    part = data.get("share", 1.0) / sum(c.share for c in named)
    return [dataclasses.replace(c, share=c.share * part, **marks) for c in named]


def check(what: str, data: Any, annotations: Mapping[str, str]) -> None:
    """Complain of a key that is not annotated, or a value of another type."""
    if not isinstance(data, dict):
        raise InputError(f"{what} must be a mapping of names to values, not {data!r}")
    for key, value in data.items():
        if key not in annotations:
            raise unknown(f"key of {what}", key, annotations)
        words = [word for word in _TYPES if re.search(rf"\b{word}\b", annotations[key])]
        fits = [word for word in words if isinstance(value, _TYPES[word][0])]
        if not fits or (isinstance(value, bool) and "bool" not in fits):  # True is an int in Python
            wanted = " or ".join(dict.fromkeys(_TYPES[word][1] for word in words if word != "None"))
            raise InputError(f"{key} must be {wanted}, not {value!r}")


class _Loader(yaml.SafeLoader):
    """Plain values only; a key given twice is an error, and 1e3 a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if not key.tag.endswith(":merge")):
            name, where = self.construct_object(key, deep=True), f"line {key.start_mark.line + 1}"
            if not isinstance(name, str):
                raise yaml.YAMLError(f"{where}: the key {name!r} is not a text")
            if name in seen:
                raise yaml.YAMLError(f"{where}: {name} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return " ".join(f"{where}{text}".split())


# ---------------------------------------------------------------------- writing


def _described(scenario: Scenario) -> dict[str, Any]:
    data: dict[str, Any] = {"name": scenario.name}
    data |= {key: getattr(scenario, key) for key in ("summary", "source") if getattr(scenario, key)}
    data["profile"] = _described_profile(scenario.profile)
    engine = _changed(scenario.engine, EngineConfig())
    if engine:
        data["engine"] = engine
    if not math.isinf(scenario.horizon_s):
        data["horizon_s"] = float(scenario.horizon_s)
    if scenario.optimum is not None:
        data["optimum"] = float(scenario.optimum)
    if scenario.references:
        data["references"] = [_plain(row) for row in reference.described(scenario.references)]
    data["workload"] = _described_workload(scenario)
    return data


def _described_profile(profile: str | Profile) -> str | dict[str, Any]:
    if isinstance(profile, str):
        return profile
    if profile.name in profiles.names() and profiles.get(profile.name) == profile:
        return profile.name
    if profile.form == "custom":
        raise InputError(f"profile {profile.name} is custom, a function: it cannot be written as YAML")
    data = dataclasses.asdict(profile)
    defaults = {f.name: f.default for f in dataclasses.fields(Profile)} | {"fit": {}}
    return {k: _plain(v) for k, v in data.items() if v != defaults[k]}


def _described_workload(scenario: Scenario) -> dict[str, Any]:
    made = scenario.workload
    if isinstance(made, Shuffled):
        data: dict[str, Any] = {"outputs": [int(x) for x in made.outputs]}
        return data | _changed(made, Shuffled("", (1,)), "outputs")
    if not isinstance(made, Synthetic):
        raise InputError(
            f"scenario {scenario.name}: a {type(made).__name__} cannot be written as YAML; name its trace "
            "file, or the options that it is made with, in a file of your own"
        )
    data, plain = _described_classes(made)
    data |= _changed(made, plain, "classes", "own_rate", "arrivals", "prediction", "declared", "clip")
    data |= _changed(made.clip, plain.clip)
    for key, known in (
        ("arrivals", arrivals.KNOWN),
        ("prediction", pred.PREDICTIONS),
        ("declared", pred.DECLARED),
    ):
        rule = getattr(made, key)
        if rule != getattr(plain, key):
            spec = arrivals.spell(known, rule)
            if spec is None:
                raise InputError(f"scenario {scenario.name}: {key} {rule!r} cannot be written as YAML")
            data[key] = spec
    return data


def _described_classes(made: Synthetic) -> tuple[dict[str, Any], Synthetic]:
    """By the name of a workload, or one by one; and the workload that this makes without further options."""
    targets = {key: getattr(made.classes[0], key) for key in ("ttft_target_s", "tpot_target_s")}
    known = workloads.names()
    if made.name in known or made.name.startswith("fixed-"):
        plain = workloads.get(made.name)
        if plain.replace(**targets).classes == made.classes and plain.own_rate == made.own_rate:
            asked = {k: v for k, v in targets.items() if any(getattr(c, k) != v for c in plain.classes)}
            return {"name": made.name, **asked}, plain.replace(**targets)
    sources = [workloads.get(name) for name in known]
    by_name = {s.classes[0].lengths: s.name for s in sources if len(s.classes) == 1}
    classes = []
    for one in made.classes:
        data: dict[str, Any] = {"lengths": by_name.get(one.lengths) or _described_lengths(one.lengths)}
        classes.append(data | _changed(one, RequestClass(one.lengths), "lengths"))
    return {"classes": classes}, Synthetic(made.name, made.classes)


def _described_lengths(made: Lengths) -> dict[str, Any]:
    tie = made.dependence
    data: dict[str, Any] = {}
    for key, side in (("prompt", made.prompt), ("output", made.output)):
        data[key] = side.tokens if isinstance(side, Fixed) else arrivals.spell(lengths.KNOWN, side)
    if None in data.values() or not isinstance(tie, Rank):
        raise InputError("lengths that no workload has by itself cannot be written as YAML")
    return data | ({"rank_correlation": float(tie.correlation)} if tie.correlation else {})


def _fields(made: Any) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


def _changed(made: Any, plain: Any, *but: str) -> dict[str, Any]:
    """The attributes of `made` that differ from those of `plain`, except its name and those in `but`."""
    changed = {k: v for k, v in _fields(made).items() if v != getattr(plain, k)}
    return {k: _plain(v) for k, v in changed.items() if k not in ("name", *but)}


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, tuples and mappings as Python's own."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
