"""Errors that a user can act on: each names the field, what came, what is allowed and the fix."""


class UsageError(ValueError):
    """The request is wrong: bad options, a bad config or a bad input file (exit code 2)."""


class RunError(ValueError):
    """The request was fine but the run failed: no network, a corrupted artefact, a diverged loss (exit code 1)."""
