"""What a device takes, measured: `nmoe-edge bench`. Nothing that serves imports it."""
