"""Report pages: their contents, templates and scripts, and every figure as a file."""
