"""What the C library does with memory that a compiled piece on the CPU has freed.

A whole model compiled as one graph passes its large buffers on from block to block. Pieces free theirs, and ask for the
same sizes again a moment later. The GNU C library gives the top of its heap back to the system where more than twice
the largest chunk that was ever mapped and freed is free (``mallopt(3)``, "dynamic mmap threshold"; 128 KiB at first,
32 MiB at most), and the next piece pays for it with a page fault every 4 KiB: 3 to 9 % of a step of a DiT of 1024
tokens. One large chunk, mapped and freed before, is all it takes to have it keep up to 64 MiB.
"""

from __future__ import annotations

import ctypes
import functools
import platform

#: The largest chunk that the threshold follows (``DEFAULT_MMAP_THRESHOLD_MAX``), less room for its header.
_LARGEST = 4 * 2**20 * ctypes.sizeof(ctypes.c_long) - 8192


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next piece; once a process. False where it has no such threshold.

    Nothing is touched, so it takes microseconds and no memory. Who has set ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or their like is not overruled: these switch the threshold's adjustment off.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.free.restype = [ctypes.c_void_p], None
    library.free(library.malloc(_LARGEST))  # of a failed malloc too: free(NULL) does nothing
    return True
