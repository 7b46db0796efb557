"""How processes that compute are started: their environment."""

from __future__ import annotations

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    # Freed memory is kept and lies in huge pages: a round's tensors are megabytes, and having the kernel hand them out
    # and clear them page by page took a third of the online time of LeNet at batch 128.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=17179869184",
}
"""One thread each: parties of one machine share its cores, and small tensors lose by threads."""
