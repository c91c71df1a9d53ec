"""The server's engines on many machines, with Ray: an endpoint (serve_app) and a list of pairs to score (batch)."""

import os

# Read when Ray is imported. Nothing is reported to anyone, and no warning is about what a user cannot change.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
