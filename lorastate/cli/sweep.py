"""The command `sweep`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from .checks import check_fields, check_objective, directory
from .environment import drawing, share_cores
from .exit_codes import FAILED, INTERRUPTED
from .options import OBJECTIVE, Json, Set, SettingPath
from .output import cannot_write, print_json, say, warn, with_setting
from .tables import describe, sweep_lines


@dataclass
class Sweep:
    """Every prediction on a grid of settings, on all devices; stopped at any moment, the same command goes on."""

    setting: SettingPath
    grid: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="KEY=VALUES", help="An axis, as pretraining.lam=log:1e-3:1:64, ...=lin:0:1:5, ...=0.5,1,2."),
    ] = ()
    set: Set = ()
    out: Annotated[Path, arg(help="Directory for sweep.nc and what is finished on the way.")] = Path("results")
    gradient: Annotated[str | None, arg(help=f"Also derivatives of {OBJECTIVE}.")] = None
    optimize: Annotated[
        str, arg(help="Fields, separated by commas, that are descended at every point: a curve of optima.")
    ] = ""
    minimize: Annotated[str, arg(help=f"Where those are lowest: {OBJECTIVE}.")] = "test_error"
    devices: Annotated[str, arg(help="Number of local devices (of a CPU: cores), or all.")] = "all"
    chunk: Annotated[int | None, arg(help="Points that each device takes at a time.")] = None
    coordinator: Annotated[str | None, arg(help="HOST:PORT of process 0, in a job of several processes.")] = None
    processes: Annotated[int | None, arg(help="How many processes there are.")] = None
    process: Annotated[int | None, arg(help="Which of them this is, from 0.")] = None
    json: Json = False

    def __call__(self) -> int:
        import jax

        from ..errors import SettingError
        from ..setting.fields import continuous_fields
        from ..setting.files import load_setting
        from ..sweeps import sweep as sweeps
        from ..sweeps.dataset import summary
        from ..sweeps.grid import parse_axis

        devices = self._prepare()
        setting = load_setting(self.setting, self.set)
        grid = dict(map(parse_axis, self.grid))
        if len(grid) < len(self.grid):
            raise SettingError("--grid names a field more than once; allowed: each field once")
        if self.gradient is not None:
            check_objective("--gradient", self.gradient)
        check_objective("--minimize", self.minimize)
        over = tuple(field.strip() for field in self.optimize.split(",") if field.strip())
        if over:
            check_fields("--optimize", over, continuous_fields(setting))
        out = directory(self.out)
        try:
            data = sweeps.sweep(
                setting, grid, out=out, gradient=self.gradient, devices=devices, chunk=self.chunk, progress=True,
                optimize=over, minimize=self.minimize,
            )  # fmt: skip
        except sweeps.SweepInterrupted as stop:
            warn(f"interrupted: {stop}")
            return INTERRUPTED
        except sweeps.SweepIncomplete as lost:
            warn(str(lost))
            # The runtime of several processes would wait for the one that is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED)
        except OSError as error:
            raise SettingError(cannot_write(out, error)) from None
        if jax.process_index():
            return 0
        found = summary(data)
        written = [out / "sweep.nc", *drawing().sweep(data, out)]
        if self.json:
            print_json(with_setting(found, setting))
        else:
            say(describe(setting))
            say(sweep_lines(found))
            say("written: " + ", ".join(map(str, written)))
        return FAILED if found["failed"] == found["points"] else 0

    def _prepare(self) -> Any:
        """Before JAX looks for its devices: cores of a CPU as devices, and the other processes."""
        from ..errors import SettingError
        from ..runtime.cores import cores

        if self.devices != "all" and not (self.devices.isdecimal() and int(self.devices) > 0):
            raise SettingError(f"--devices {self.devices!r} is unknown; allowed: a number of at least 1, or all")
        devices = self.devices if self.devices == "all" else int(self.devices)
        if devices != "all":  # never more than cores: the sweep then says how many devices there are
            share_cores(min(cores(), devices))
        given = (self.coordinator, self.processes, self.process)
        if any(v is not None for v in given):
            if any(v is None for v in given):
                raise SettingError("--coordinator, --processes and --process belong together; allowed: all three")
            assert self.processes is not None and self.process is not None
            if not 0 <= self.process < self.processes:
                raise SettingError(f"--process {self.process} is out of range; allowed: 0 to {self.processes - 1}")
            self._join()
        return devices

    def _join(self) -> None:
        """Meets the other processes."""
        import jax

        from ..errors import SettingError

        host, _, port = (self.coordinator or "").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise SettingError(f"--coordinator {self.coordinator!r} is no address; allowed: HOST:PORT of process 0")
        if hasattr(jax.config, "jax_enable_recoverability"):
            jax.config.update("jax_enable_recoverability", True)  # one that dies must not take the others along
        try:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise SettingError(
                f"--coordinator {self.coordinator!r} does not answer, or not all of {self.processes} processes came "
                f"({reason}); allowed: the HOST:PORT of process 0, and every process once"
            ) from None
