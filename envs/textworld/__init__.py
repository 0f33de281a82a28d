"""TextWorld games as finite-state systems: their logic as bit masks, their words, what a reader knows, their pools."""
