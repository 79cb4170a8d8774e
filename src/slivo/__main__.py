"""``python -m slivo`` is the command ``slivo``."""

from slivo.cli import main

if __name__ == "__main__":
    main()
