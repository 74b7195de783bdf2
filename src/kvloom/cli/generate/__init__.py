"""`kvloom generate`: its options, one run of it, and how that is shown."""
