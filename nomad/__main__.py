"""`python -m nomad`: the command line."""

from nomad.cli import main

if __name__ == "__main__":
    main()
