#!/usr/bin/env python3
"""Fit a cost profile to measured iterations, and write it as JSON for `--profile FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from llmsched_env.errors import InputError
from llmsched_env.files import require_writable_file
from llmsched_env.profiles import fit, save


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, as the command line `llmsched` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(
        description=__doc__,
        epilog=f"Columns of the CSV: seconds, and of {', '.join(fit.FEATURES)} those that you have.",
    )
    parser.add_argument("csv", type=Path, help="measured iterations: CSV or CSV.gz, one row each")
    parser.add_argument("output", type=Path, help="the profile to write: a JSON file")
    parser.add_argument("--form", choices=list(fit.FORMS), default="hinge")
    parser.add_argument("--name", help="of the profile; default: the file's")
    parser.add_argument("--kv-tokens", type=int, help="KV cache in tokens, all GPUs together")
    parser.add_argument("--kv-bytes-per-token", type=float, help="needed where schedulers swap")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the engine (tensor parallel)")
    parser.add_argument("--gpu", default="unknown")
    parser.add_argument("--model", default="unknown")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="part of the rows that only judges the fit"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of those rows")
    options = parser.parse_args(arguments)
    try:
        require_writable_file(options.output)
        if options.output.resolve() == options.csv.resolve():
            raise InputError(f"{options.output} holds the measurements; name another file for the profile")
        profile = fit.fit(
            *fit.read(options.csv),
            options.form,
            held_out=options.held_out,
            seed=options.seed,
            name=options.name or options.output.stem,
            kv_tokens=options.kv_tokens,
            kv_bytes_per_token=options.kv_bytes_per_token,
            gpus=options.gpus,
            gpu=options.gpu,
            model=options.model,
            provenance=f"{options.form} fitted to iterations measured in {options.csv.name}",
        )
        save(profile, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in profile.params.items():
        print(f"{name:>14} {value:.6g}")
    print(f"on {profile.fit['rows_held_out']:.0f} rows held out:")
    for name in ("R2", "median_rel", "p95_rel", "max_rel", "mean_bias"):
        print(f"{name:>14} {profile.fit[name]:.4f}")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
