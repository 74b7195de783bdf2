"""How commands speak: to people on a terminal, to programs, and in pictures."""
