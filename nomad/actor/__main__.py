"""`python -m nomad.actor`: the process of one operator. See `nomad.actor.host`."""

from nomad.actor.host import main

if __name__ == "__main__":
    main()
