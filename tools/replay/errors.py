"""Why a recording can't be played."""


class ReplayError(Exception):
    """The recording can't be played; the message says why."""
