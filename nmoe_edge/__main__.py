"""`python -m nmoe_edge`, the same as `nmoe-edge`."""

from nmoe_edge.cli import main

if __name__ == "__main__":
    main()
