"""Settings of a process in which networks run on the CPU."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 2**31 - 1  # bytes, what mallopt can be told


def prepare_cpu() -> None:
    """Let this process flush subnormal numbers and keep the memory of freed tensors.

    Subnormal numbers slow a CPU down. And glibc gives blocks of more than 32 MB back to the system
    when they are freed; each next one is mapped anew and cleared page by page, which a network pays
    at every layer whose maps are as large. After this call freed blocks (up to 2 GB) are used again;
    the process holds its peak until it ends. Other C libraries are left as they are.

    The recipes and ``python -m speechbrain_mrl`` call it. It concerns the whole process, so
    importing the package does not.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        if set_option is not None:
            set_option(M_MMAP_THRESHOLD, LARGEST)
            set_option(M_TRIM_THRESHOLD, LARGEST)
