"""``python -m minitf`` is the command ``minitf``."""

from minitf.cli import main

if __name__ == "__main__":
    main()
