"""The command `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .checks import directory
from .environment import drawing
from .exit_codes import FAILED, INTERRUPTED
from .options import Json, Seed, Set, SettingPath
from .output import cannot_write, print_json, say, warn, with_setting, write_json
from .tables import describe, verification_tables


@dataclass
class Verify:
    """Is the theory right for this setting? Training at several D, extrapolated, beside every prediction.

    Stopped at any moment, the same command goes on. Exit code 0 only where the theory stands.
    """

    setting: SettingPath
    set: Set = ()
    dimensions: Annotated[str, arg(help="D of the whole model, separated by commas, or none.")] = "50,100,200"
    alone: Annotated[str, arg(help="D of fine-tuning alone, separated by commas, or none.")] = "100,200,400,800"
    runs: Annotated[int, arg(help="Runs at the largest D; more at smaller ones.")] = 4
    seed: Seed = 0
    starts: Annotated[int | None, arg(help="Starts of fine-tuning (3; 6 random ones for fine-tuning alone).")] = None
    moves: Annotated[int | None, arg(help="Deep moves, for fine-tuning alone (10).")] = None
    out: Annotated[Path, arg(help="Directory for runs, verify.json and the figure.")] = Path("results")
    json: Json = False

    def __call__(self) -> int:
        from ..errors import SettingError
        from ..setting.files import load_setting
        from ..verification.verify import VerificationInterrupted, verify

        setting = load_setting(self.setting, self.set)
        sizes = {name: _dimensions(f"--{name}", getattr(self, name)) for name in ("dimensions", "alone")}
        out, figures = directory(self.out), drawing()
        try:
            found = verify(
                setting, out=out, runs=self.runs, seed=self.seed, starts=self.starts, moves=self.moves, progress=True,
                **sizes,
            )  # fmt: skip
        except VerificationInterrupted as stop:
            warn(f"interrupted: {stop}")
            return INTERRUPTED
        except OSError as error:
            raise SettingError(cannot_write(out, error)) from None
        summary = with_setting(found.summary(), setting)
        write_json(out / "verify.json", summary)
        written = [out / "verify.json", *figures.verification(found, out)]
        if self.json:
            print_json(summary)
        else:
            say(describe(setting))
            say(verification_tables(found))
            say("written: " + ", ".join(map(str, written)))
        return 0 if found.stands else FAILED


def _dimensions(option: str, text: str) -> list[int]:
    from ..errors import SettingError

    words = [] if text.strip() == "none" else text.split(",")
    try:
        return [int(word) for word in words]
    except ValueError:
        raise SettingError(f"{option} {text!r} is no list of dimensions; allowed: as 50,100,200, or none") from None
