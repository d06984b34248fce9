"""Where pickles of version 0.1 look for converted optimizers without an update rule."""
