"""TextWorld games as finite-state systems: logic as bit masks, texts, readers, and pools of games."""
