"""Fused steps on CUDA devices: Triton kernels. Importing this imports Triton.

All layers of one kind, dtype and width share launches, which find them in a table (`table`):

1. `observe` and `settle`: squares of the gradient's rows and columns, and rows that are not finite, where a codec needs
   them;
2. `add_rows` and `fold_rows`: means of rows into a sketch of row scalars;
   `reduce_columns` and `finish_factored`: sums of columns;
   `hash_rows` and `insert`: whole rows into sketches, sorted by bucket (`orders`);
3. `apply`: every element's update, from the states as they are then; `finish_sm3`: maxima of columns.

Only integers are added or compared atomically, which depends on no order: a step gives the same bits each time.
"""

from lightning_sketch.kernels.triton.launch import observe_gradients, step

__all__ = ["observe_gradients", "step"]
