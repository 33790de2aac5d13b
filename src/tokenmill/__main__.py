"""``python -m tokenmill`` and the ``tokenmill`` command."""

import sys


def run() -> None:
    """Imports and runs the command line; Ctrl-C is quiet during the import too."""
    try:
        from tokenmill.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
