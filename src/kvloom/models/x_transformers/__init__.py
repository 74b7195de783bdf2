"""Models of the package x-transformers: a wrapper around a decoder, and a decoder alone."""
