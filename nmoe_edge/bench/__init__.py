"""The benchmark of a device, `nmoe-edge bench`. The serving code does not import it."""
