"""The command `broadcastable`. Extra `cli`; each command's own needs are imported when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 not done and said why, 2 used wrongly."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(
            "The command line needs an extra that is not installed. Install it: pip install 'broadcastable[cli]' "
            "(or 'broadcastable[demo]' for all that the demo uses)"
        )
    run()
