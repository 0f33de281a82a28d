"""The claims of the published studies, what was measured of each, and the verdict."""
