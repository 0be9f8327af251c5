"""Go's regular expressions, as far as filters need them, on Python's engine."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from .errors import InvalidArgument

log = logging.getLogger("wherry.filters")

PATTERN_MAX = 1024


def compile_regexp(pattern: str) -> Callable[[str], bool]:
    """Whether a text has a match anywhere. InvalidArgument over 1 KiB; what does not compile matches nothing."""
    if len(pattern) > PATTERN_MAX:
        raise InvalidArgument(f"the pattern is longer than {PATTERN_MAX} characters")
    try:
        search = re.compile(pattern).search
    except (re.error, RecursionError, OverflowError) as e:
        log.warning("pattern %r is no regular expression and matches nothing: %s", pattern, e)
        return lambda text: False
    return lambda text: search(text) is not None
