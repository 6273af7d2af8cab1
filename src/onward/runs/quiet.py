"""What libraries say that is none of the user's."""

from __future__ import annotations

import logging


def quiet() -> None:
    """PEFT imports both of these: they warn of kernels and devices not used here. DeepSpeed sets its own level, and
    writes to stdout.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
