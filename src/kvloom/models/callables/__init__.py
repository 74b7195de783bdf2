"""Functions from token ids to logits: with a cache that they hand out and take back, or without any."""
