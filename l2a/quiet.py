"""Keeps libraries from writing over the run's own progress."""


def silence_transformers() -> None:
    """Switch off the progress bars and the warnings about fresh heads that transformers prints while it loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
