"""`python -m umbel_simulations.cli`: the same as `umbel-simulate`."""

from umbel_simulations.cli import main

if __name__ == "__main__":
    main()
