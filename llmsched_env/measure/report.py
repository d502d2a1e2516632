"""What was measured, condensed: fits of several forms, their errors on other batches, and the profile."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsched_env.errors import InputError, unknown
from llmsched_env.measure import journal, memory
from llmsched_env.measure.grid import CHOOSING, FITTED, JUDGED, KINDS
from llmsched_env.measure.session import Outcome
from llmsched_env.measure.settings import GIB
from llmsched_env.profiles import fit, save
from llmsched_env.profiles.profile import Profile

FORMS = ("linear", "hinge", "staircase", "roofline")
"""Forms of cost models that are fitted."""

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Report:
    """Fits to a measurement.

    Attributes:
        fits: profiles by form; their `fit` has the errors on the held-out mixes.
        errors: by form and kind of the held-out batches (`grid.KINDS`) what `profiles.fit.judge` gives.
        chosen: the form with the least median error on mixes of their own (`grid.CHOOSING`), so that the
            errors on the held-out ones stay honest; or the one asked for.
        measured: features (n, 6) and seconds (n,) by part.
    """

    fits: dict[str, Profile]
    errors: dict[str, dict[str, dict[str, float]]]
    chosen: str
    measured: dict[str, tuple[Array, Array]]

    @property
    def profile(self) -> Profile:
        """The one to use."""
        return self.fits[self.chosen]


def of(outcome: Outcome, form: str | None = None) -> Report:
    """Fit all forms and judge them.

    Args:
        form: to choose; None: the best.

    Raises:
        InputError: an unknown form, or too few batches could be measured.
    """
    if form is not None and form not in FORMS:
        raise unknown("form to fit", form, FORMS)
    measured = {part: journal.arrays(outcome.rows, part) for part in (FITTED, JUDGED)}
    features, seconds = measured[JUDGED]
    prefills, decodes = features[:, 0] > 0, features[:, 4] > 0
    kinds = dict(zip(KINDS, (prefills & ~decodes, decodes & ~prefills, prefills & decodes), strict=True))
    mixes, choosing = kinds["mix"], journal.arrays(outcome.rows, CHOOSING)
    if len(measured[FITTED][1]) < 10 or mixes.sum() < 2 or len(choosing[1]) < 2:
        raise InputError(
            f"{len(measured[FITTED][1])} batches of the grid, {len(choosing[1])} mixes to choose by and "
            f"{mixes.sum()} held-out mixes could be measured, too few to fit; {len(outcome.skipped)} were "
            "skipped for lack of memory"
        )
    attributes = _attributes(outcome)
    fits = {}
    for name in FORMS:
        found = fit.fit(*measured[FITTED], name, judged=(features[mixes], seconds[mixes]), **attributes)
        checks = {
            f"{key}_over_floor": outcome.about["checks"][f"{key}_over_floor"] for key in ("decode", "prefill")
        }
        fits[name] = found.replace(
            provenance=_provenance(outcome, name, int(mixes.sum())), fit={**found.fit, **checks}
        )
    errors = {
        name: {
            kind: fit.judge(profile, features[of_kind], seconds[of_kind])
            for kind, of_kind in kinds.items()
            if of_kind.any()
        }
        for name, profile in fits.items()
    }
    best = min(FORMS, key=lambda name: fit.judge(fits[name], *choosing)["median_rel"])
    return Report(fits, errors, form or best, measured)


def write(report: Report, outcome: Outcome) -> None:
    """Write the profile.

    Raises:
        InputError: the system refuses to.
    """
    save(report.profile, outcome.files.profile)


def kv_tokens(outcome: Outcome) -> int | None:
    """Tokens of KV cache that an engine would have on the device; None: the weights do not fit.

    vLLM's way: its memory times the utilization, less all weights, less what the largest iteration was seen
    to take (on the CPU, an estimate of it), less what the libraries take.
    """
    settings = outcome.settings
    used = outcome.plan.memory.activations
    seen = outcome.about["checks"].get("activation_bytes")
    if seen is not None:
        used = seen + memory.SPARE[settings.device]
    return memory.capacity(settings.shape, outcome.plan.memory.total, used)


def _attributes(outcome: Outcome) -> dict[str, Any]:
    from llmsched_env.measure.device import short_name

    shape, hardware = outcome.settings.shape, outcome.about["hardware"]
    return {
        "name": outcome.files.profile.stem,
        "kv_tokens": kv_tokens(outcome),
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "gpu": short_name(str(hardware["device"]), hardware.get("memory_gib")),
        "model": shape.name,
    }


def _provenance(outcome: Outcome, form: str, mixes: int) -> str:
    settings, about = outcome.settings, outcome.about
    shape, hardware, checks = settings.shape, about["hardware"], about["checks"]
    versions = ", ".join(f"{key} {value}" for key, value in hardware.items() if key != "device" and value)
    kernels = ", ".join(f"{found['chosen']} ({use})" for use, found in about["kernels"]["attention"].items())
    fitted = [row for row in outcome.rows.values() if row.part == FITTED]
    layers = (
        f"all {shape.layers} layers"
        if settings.built_layers == shape.layers
        else f"{settings.built_layers} of {shape.layers} layers, the times scaled to all"
    )
    graphs = f", CUDA graphs up to {settings.graph_tokens} tokens" if settings.device == "cuda" else ""
    skipped = f", {len(outcome.skipped)} more skipped for lack of memory" if outcome.skipped else ""
    launching = sum(row.launching for row in fitted)
    bound = f", {launching} of them as slow as their kernels were launched" if launching else ""
    gib = outcome.plan.memory.total / settings.utilization / GIB
    decode, prompt = (f"{checks[f'{kind}_over_floor']:.2f}" for kind in ("decode", "prefill"))
    return (
        f"Measured by `llmsched profiles measure`, begun {about['begun']}, on {hardware['device']} "
        f"({versions}): a decoder of {shape.name}'s shape with random weights, {settings.dtype}, {layers}, "
        f"KV cache in pages of {memory.PAGE} tokens; attention by {kernels}; small operations "
        f"{about['kernels']['small operations']}{graphs}. Medians of {settings.repeats} or more iterations "
        f"of each of {len(fitted)} batches up to {settings.max_tokens:,} tokens, {settings.max_decodes} "
        f"decodes and contexts of {settings.max_context:,}{bound}{skipped}; the {form} form fitted to them. "
        f"The errors are those on {mixes} other mixes at random. Measured over floor: a decode {decode} "
        f"(bytes over {checks['bandwidth'] / 1e9:,.0f} GB/s reached), a prompt {prompt} (operations over "
        f"{checks['flops'] / 1e12:,.1f} TFLOP/s reached). Time of the device alone; set cpu_s for an engine "
        f"that does not schedule asynchronously. KV capacity: computed, {settings.utilization:g} x "
        f"{gib:.1f} GiB less weights and activations."
    )
