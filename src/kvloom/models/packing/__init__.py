"""Linear layers over weights that are packed for the CPU they run on."""
