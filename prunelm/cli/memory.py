"""How the commands that train hold memory."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets glibc's malloc reuse what large tensors give back; elsewhere nothing happens.

    By default the memory of a large tensor (32 MiB, often less) returns to the system when it is
    freed, and the next one is mapped, faulted in page by page and zeroed again: a quarter of the
    CPU time of a training step of the recogniser. The process keeps its largest size to its end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 2**26)
