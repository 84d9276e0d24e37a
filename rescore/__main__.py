"""The installed command `rescore`, and `python -m rescore`: the command line of `cli`, wherever it is started."""

import sys

from rescore import import_neighbours

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def main() -> None:
    """Runs `cli.main`. Ctrl-C while it is loaded ends the command as it does later."""
    try:
        import_neighbours("cli")
        from cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
