"""What a smaller cache costs: measured on held-out text and on facts that have to be recalled."""
