"""The version, and the source that is running."""

import hashlib
from pathlib import Path

__version__ = "0.1.0"

_FOLDER = Path(__file__).parent


def source_on_disk() -> str:
    """Hash of this package's source as it is on disk now; empty where there is none to read."""
    found = hashlib.sha256()
    try:
        # Some installations have what Python has made of it alone.
        files = sorted(_FOLDER.rglob("[!.]*.py")) or sorted(_FOLDER.rglob("[!.]*.pyc"))
        for path in files:
            found.update(path.relative_to(_FOLDER).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:  # it is being changed
        return ""
    return found.hexdigest() if files else ""


#: The source that runs: this module is imported before all others, and what is edited later is not what was imported.
SOURCE = source_on_disk()
