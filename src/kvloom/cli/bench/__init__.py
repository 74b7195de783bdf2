"""`kvloom bench`: two measurements, speed and quality, as tables and as pictures."""
