"""Leaves that know nothing of experts or devices: strict schemas, npz, atomic folders, logging, command endings."""
