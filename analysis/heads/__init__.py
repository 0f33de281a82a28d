"""Which heads carry state: minimal pairs, patching sweeps, and the study that runs them."""
