"""Fused steps on CUDA devices: Triton kernels behind a torch operator. Importing this imports Triton.

A step of a layer is up to three kinds of kernels, in this order:

1. `reduce`: sums of squares of rows and columns, as partial sums that a second kernel adds up;
2. `insert`: rows into a sketch, sorted by bucket, so that one lane owns a bucket and adds its rows in order;
3. `apply`: every element's update, from the states as they are then.

No kernel uses atomics, so a step gives the same bits each time.
"""

from lightning_sketch.kernels.triton.ops import step

__all__ = ["step"]
