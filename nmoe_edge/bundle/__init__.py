"""The bundle: the folder that export writes and a device reads. BUNDLE.md describes every file and key."""
