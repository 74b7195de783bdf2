"""What sequences are decoded from, where there is an encoder."""
