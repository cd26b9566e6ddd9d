"""Lets `python -m nmoe_edge` run the command nmoe-edge."""

from nmoe_edge.cli import main

if __name__ == "__main__":
    main()
