"""Words made at random: values of settings, and what is typed behind `sami`."""

from contextlib import redirect_stderr, redirect_stdout
from functools import partial
import io
import os
from pathlib import Path
import sys
from typing import Any
from unittest.mock import patch
import warnings

import numpy as np

from benchmarks.torture_inputs import ODD, pick
from benchmarks.torture_trials import Refused, Sandbox, Tally, Wrong, command_error
from sami_ppl.runs import cli
from sami_ppl.runs import run as runs
from sami_ppl.runs.settings import default_configs
from sami_ppl.saving.files import find, list_files, load_file


def any_word(rng: np.random.Generator) -> str:
    """A value as somebody types it."""
    made = (
        "1",
        "0",
        "-1",
        "1e3",
        "1e400",
        "nan",
        "inf",
        "True",
        "none",
        "",
        "()",
        "(1, 2)",
        "[1]",
        "{'a': 1}",
        "1_0",
        "0x10",
        "'a'",
        "__import__('os').system('touch mine')",
        "exec('1')",
        "9" * 400,
        "(" * 200,
        "1j",
        "b'a'",
        "f()",
        "½",
        "١",
        *ODD,
    )
    return (
        str(pick(rng, made))
        if rng.random() < 0.8
        else "".join(chr(int(c)) for c in rng.integers(32, 500, int(rng.integers(1, 20))))
    )


def any_setting(rng: np.random.Generator) -> str:
    """A value that may be a good one."""
    good = ("1", "2", "64", "0.5", "1e-3", "True", "false", "None", "(16, 32)", "(1.0, 2.0)", "normal", "{'z': 0.5}")
    return str(pick(rng, good)) if rng.random() < 0.6 else any_word(rng)


def settings(count: int, seed: int, folder: Path) -> Tally:
    """Settings of all programs and inferences."""
    tally = Tally("settings")
    models, inferences = (
        {name: load_file(find(name, kind)) for name in list_files(kind)} for kind in ("models", "inference")
    )

    def trial(model: Any, inference: Any, words: dict[str, str]) -> None:
        found = default_configs(model, inference, words)
        if set(found) != {"model", "inference"}:
            raise Wrong(f"configurations of {list(found)}")

    for i in range(count):
        rng = np.random.default_rng([seed, i])
        model, inference = pick(rng, models), pick(rng, inferences)
        known = [
            *vars(models[model].Config()),
            *vars(inferences[inference].Config()),
            "encoder.steps",
            "denoiser.beta",
            "both.train",
            "encoder.site_beta",
            "model.latents",
            "inference.draws",
            "encoder.proposal",
            "encoder.penalties",
        ]
        words = {str(pick(rng, known)) if rng.random() < 0.9 else any_word(rng): any_setting(rng) for _ in range(2)}
        call = partial(trial, models[model], inferences[inference], words)
        tally.take({"seed": [seed, i], "words": words, "of": (model, inference)}, call, ("setting",))
    return tally


class Accepted(BaseException):
    """A run whose words have passed: what follows takes long."""


def commands(count: int, seed: int, folder: Path) -> Tally:
    """Words of the command line, up to where a run would begin: exit code 0, or 2 with one message."""
    tally, box = Tally("command line"), Sandbox.make(folder)
    out = folder / "out"

    def trial(words: list[str]) -> None:
        said = io.StringIO()
        with patch.object(sys, "argv", ["sami", *words]), redirect_stdout(io.StringIO()), redirect_stderr(said):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Accepted:
                code = 0
        if code and (why := command_error(code, said.getvalue())):
            raise Wrong(why)
        if code:
            raise Refused(said.getvalue())

    def begins(*words: Any, **more: Any) -> Any:
        raise Accepted

    options = (
        "--set",
        "--data",
        "--seed",
        "--out",
        "--resume",
        "--quiet",
        "--with",
        "--devices",
        "--limit",
        "--levels",
        "--draws",
        "--obs",
        "--help",
        "--version",
        "--unknown",
        "-x",
        "--",
    )
    names = (
        "run",
        "ls",
        "cp",
        "report",
        "evidence",
        "evaluate",
        "compare",
        "calibrate",
        "refine",
        "linear_gaussian",
        "two_stage",
    )
    home = patch.dict("os.environ", {"HOME": str(box.home)})
    with (
        home,
        patch.object(runs.programs, "build_program", begins),
        patch.object(runs, "use_compilation_cache", lambda: None),
        warnings.catch_warnings(),  # which puts back how they are shown
    ):
        before = Path.cwd()
        try:
            os.chdir(box.cwd)
            for i in range(count):
                rng = np.random.default_rng([seed, i])
                words = [str(pick(rng, names))]
                for _ in range(int(rng.integers(0, 6))):
                    words.append(str(pick(rng, options)) if rng.random() < 0.5 else any_word(rng).replace("\0", ""))
                if rng.random() < 0.3:
                    words += [
                        "--set",
                        f"{pick(rng, ('observations', 'spreads', 'draws', 'encoder.steps'))}={any_setting(rng)}",
                    ]
                if rng.random() < 0.5:
                    words = ["run", "linear_gaussian", "--out", str(out), *words[1:]]
                tally.take({"seed": [seed, i], "words": words}, partial(trial, words), ("",))
        finally:
            os.chdir(before)
    if (why := box.untouched()) is not None:
        tally.fail("home and working directory", why)
    return tally
