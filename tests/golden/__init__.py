"""Golden answers of the reference implementations, and the scripts and inputs that made them."""
