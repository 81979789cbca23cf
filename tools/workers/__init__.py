"""Which servers there are, and what they would make of a model."""
