"""The command `kvloom`, also as `python -m kvloom`."""

import signal


def main() -> None:
    """Read the command's own code, then run it."""
    # Reading takes some tenths of a second, in which Ctrl-C ends the process quietly, as it does any program without a
    # handler. Whoever started us with the signal ignored, as `nohup` does, means it.
    quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if quiet:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kvloom.cli import main as command

    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
