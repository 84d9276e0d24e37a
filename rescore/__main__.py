"""The installed command `rescore`, and `python -m rescore`: the command line of `cli`, wherever it is started."""

from rescore import import_neighbours


def main() -> None:
    """Runs `cli.main`."""
    import_neighbours("cli")
    from cli import main as run

    run()


if __name__ == "__main__":
    main()
