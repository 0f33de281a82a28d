"""Play: what agents do when they give the commands."""
