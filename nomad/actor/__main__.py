"""`python -m nomad.actor`: the process of one operator. See `nomad.actor.host`."""

from nomad.actor import init

if __name__ == "__main__":
    init.stand_aside()

    from nomad.actor.host import main

    main()
