"""Modules that know nothing about experts or devices: strict schemas, npz, atomic folders, logging, command endings."""
