"""A line on the screen that says what is being done, from the first moment on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

#: What programs do, by the name of their function; others are called by that name.
_WORDS = {
    "solve_pretraining": "search of pre-training",
    "solve_symmetric": "search of fine-tuning",
    "solve_broken": "search with broken symmetry",
    "answer": "predictions and error bars",
    "value_and_slopes": "derivatives",
}
_EVERY = 0.25


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Shows, on a terminal, which program is compiled or run, how many were compiled, and for how long it has been at
    it; nothing where stderr is a file or a pipe. Bars of longer work stand below it."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    begin, done = time.monotonic(), threading.Event()
    now = {"text": "starting", "since": begin, "compiled": 0}
    bar = tqdm(bar_format="{desc}", leave=False, file=sys.stderr)

    def show() -> None:
        bar.set_description_str(f"{now['text']}, {time.monotonic() - now['since']:.0f} s")

    def heard(name: str, new: bool) -> None:
        now["compiled"] += new
        words = _WORDS.get(name, name.strip("_").replace("_", " "))
        now["text"], now["since"] = f"compiling ({now['compiled']}): {words}" if new else words, time.monotonic()

    def watch() -> None:
        while not done.wait(_EVERY):
            show()

    show()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        from ..runtime.progress import listening

        with listening(heard):
            yield
    finally:
        done.set()
        thread.join()
        bar.close()
