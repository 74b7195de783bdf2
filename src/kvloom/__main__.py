"""`python -m kvloom` is the command `kvloom`."""

from kvloom.cli import main

if __name__ == "__main__":
    main()
