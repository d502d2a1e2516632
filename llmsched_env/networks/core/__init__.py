"""Networks of engines as packed arrays, and the compiled functions that advance them."""
