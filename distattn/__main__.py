"""``python -m distattn`` is the ``distattn`` command."""

from distattn.cli.main import main

if __name__ == "__main__":
    main()
